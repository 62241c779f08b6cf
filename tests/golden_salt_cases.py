# SPDX-License-Identifier: Apache-2.0
"""Small golden cases of SALT-Net, made by plain loops: no torch, nothing of the package."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gfl_loops import Box, Cell, assign, cells_of, distance, giou_cost, sigmoid, softmax
from golden_gfl_cases import (
    BINS,
    CHANNELS,
    CLASSES,
    FACTORS,
    IMAGE,
    LABELS,
    LEVELS,
    SCENES,
    SIZES,
    STRIDES,
    activated,
    detected,
    losses,
    padded,
    tower,
)
from golden_pdnet_cases import draw, write
from golden_pdnet_head import convolved, rule
from salt_loops import aligned, box_points

SCORES = CLASSES + 1  # one that no object has
HIDDEN = 5  # of the network that reads distributions

Weights = Mapping[str, np.ndarray]


# The head.


def layer(name: str, outputs: int, scale: float, bias: tuple[float, float]) -> list[Any]:
    """A 3x3 convolution; the bias is (scale, offset)."""
    return [
        [f"{name}.weight", [outputs, CHANNELS, 3, 3], scale, 0.0],
        [f"{name}.bias", [outputs], *bias],
    ]


def norm(name: str) -> list[Any]:
    return [[f"{name}.weight", [CHANNELS], 0.2, 1.0], [f"{name}.bias", [CHANNELS], 0.2, 0.0]]


def without_bias(name: str) -> list[Any]:
    return [[f"{name}.weight", [CHANNELS, CHANNELS, 3, 3], 0.3, 0.0]]


WEIGHTS: list[Any] = [
    *without_bias("cls_convs.0.conv"),
    *norm("cls_convs.0.gn"),
    *without_bias("reg_convs.0.conv"),
    *norm("reg_convs.0.gn"),
    *layer("reg_init_out.conv", CHANNELS, 0.3, (0.1, 0.0)),
    *norm("reg_init_out.bn"),
    *layer("reg_init_out.regression", 4, 0.3, (0.3, 1.0)),
    *layer("reg_init_out.scale_fs", 14, 0.3, (0.3, 0.0)),
    *without_bias("salt_reg_conv.conv"),
    *norm("salt_reg_conv.bn"),
    *layer("salt_reg", 4 * BINS, 0.3, (0.5, 0.0)),
    *layer("salt_cls_refinement.conv", CHANNELS, 0.3, (0.1, 0.0)),
    *norm("salt_cls_refinement.bn"),
    *layer("salt_cls_refinement.proposal", 18, 0.15, (0.1, 0.0)),
    *without_bias("salt_cls_conv.conv"),
    *norm("salt_cls_conv.bn"),
    *layer("salt_cls", SCORES, 0.3, (0.3, -1.0)),
    ["reg_conf.0.bias", [HIDDEN], 0.1, 0.0],
    ["reg_conf.2.weight", [1, HIDDEN, 1, 1], 0.4, 0.0],
    ["reg_conf.2.bias", [1], 0.2, 0.5],
    *[
        [f"{x}.{level}.scale", [], 0.3, 1.0]
        for x in ("scales", "scales_init")
        for level in range(5)
    ],
]


def write_head_case(folder: Path, topk: int = 4) -> Path:
    """One image; towers of one convolution; of the gradients those of the last layers.

    The quality is told by the ``topk`` greatest shares of each distribution.
    """
    entries = [*WEIGHTS, ["reg_conf.0.weight", [HIDDEN, 4 * (topk + 1), 1, 1], 0.4, 0.0]]
    inputs: dict[str, Any] = {"images_hw": {"value": [list(IMAGE)]}}
    inputs["scale_factor"] = {"value": FACTORS}
    for level, size in zip(LEVELS, SIZES, strict=True):
        inputs[f"feature/{level}"] = rule(f"feature/{level}", (1, CHANNELS, *size))
        for kind, channels in (("p", SCORES), ("z", 4 * BINS), ("d", 4)):
            name = f"probe/{kind}/{level}"
            inputs[name] = rule(name, (1, channels, *size))
    config = {
        "classes": CLASSES,
        "cls_channels": SCORES,
        "channels": CHANNELS,
        "gn_groups": 2,
        "stacked_convs": 1,
        "reg_max": BINS - 1,
        "strides": STRIDES,
        "batch": 1,
        "nms_pre": 20,
        "score_thr": 0.1,
        "nms_iou": 0.4,
        "max_per_img": 25,
        "reg_topk": topk,
    }
    weights = {name: draw(name, *entry) for name, *entry in entries}
    outputs, boxes = {}, []
    cells = iter(cells_of(SIZES, STRIDES))
    for number, (level, size) in enumerate(zip(LEVELS, SIZES, strict=True)):
        feature = draw(f"feature/{level}", (1, CHANNELS, *size))[0]
        maps = level_maps(feature, weights, number)
        outputs |= {f"{kind}/{level}": x[None] for kind, x in maps.items()}
        for row in range(size[0]):
            for column in range(size[1]):
                sides = maps["z"][:, row, column].reshape(4, BINS)
                box = next(cells).box([distance(side) for side in sides])
                boxes.append([min(max(v, 0.0), IMAGE[1 - i % 2]) for i, v in enumerate(box)])
    outputs["boxes"] = np.array([boxes])
    scores = [outputs[f"p/{level}"][0] for level in LEVELS]
    outputs |= detected(outputs["boxes"][0], scores, config)
    outputs |= slopes(outputs, weights)
    return write(folder / "salt_head_small.json", "salt_head", config, inputs, outputs, entries)


def level_maps(feature: np.ndarray, weights: Weights, number: int) -> dict[str, np.ndarray]:
    """Every step of a level: (channels, H, W) by their names in a case."""

    def conv(x: np.ndarray, name: str) -> np.ndarray:
        return convolved(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    box = tower(feature, weights, "reg_convs")
    hidden = activated(conv(box, "reg_init_out.conv"), weights, "reg_init_out.bn")
    factor = weights[f"scales_init.{number}.scale"]
    sides = np.maximum(conv(hidden, "reg_init_out.regression"), 0) * factor
    scales = 1 / (1 + np.exp(-conv(hidden, "reg_init_out.scale_fs")))
    regression = np.zeros((18, *feature.shape[1:]))
    for row, column in np.ndindex(*feature.shape[1:]):
        found = box_points(sides[:, row, column], scales[:, row, column])
        regression[:, row, column] = [value for point in found for value in point]
    read = activated(
        aligned(box, regression, weights["salt_reg_conv.conv.weight"]),
        weights,
        "salt_reg_conv.bn",
    )
    logits = conv(read, "salt_reg") * weights[f"scales.{number}.scale"]
    quality = np.zeros((1, *feature.shape[1:]))
    for row, column in np.ndindex(*feature.shape[1:]):
        quality[0, row, column] = sharpness(logits[:, row, column].reshape(4, BINS), weights)

    cls = tower(feature, weights, "cls_convs") + feature
    name = "salt_cls_refinement"
    vectors = conv(activated(conv(cls, f"{name}.conv"), weights, f"{name}.bn"), f"{name}.proposal")
    points = np.exp(vectors) * regression
    read = activated(
        aligned(cls, points, weights["salt_cls_conv.conv.weight"]), weights, "salt_cls_conv.bn"
    )
    classes = 1 / (1 + np.exp(-conv(read, "salt_cls")))
    return {
        "d": sides,
        "s": scales,
        "r_points": regression,
        "c_points": points,
        "q": quality,
        "z": logits,
        "p": classes * quality,
    }


def sharpness(sides: np.ndarray, weights: Weights) -> float:
    """The quality that four distributions tell: their greatest shares, and the mean of these."""
    topk = weights["reg_conf.0.weight"].shape[1] // 4 - 1
    statistics: list[float] = []
    for logits in sides.tolist():
        best = sorted(softmax(logits), reverse=True)[:topk]
        statistics += [*best, sum(best) / topk]
    hidden = weights["reg_conf.0.weight"][:, :, 0, 0] @ statistics + weights["reg_conf.0.bias"]
    last = weights["reg_conf.2.weight"][0, :, 0, 0] @ np.maximum(hidden, 0)
    return sigmoid(float(last) + float(weights["reg_conf.2.bias"][0]))


def slopes(outputs: Mapping[str, np.ndarray], weights: Weights) -> dict[str, np.ndarray]:
    """Derivatives of the three probes by parameters that act on them directly."""
    found = {
        "grad_p/salt_cls.bias": np.zeros(SCORES),
        "grad_z/salt_reg.bias": np.zeros(4 * BINS),
        "grad_d/reg_init_out.regression.bias": np.zeros(4),
        "grad_z/salt_cls.bias": np.zeros(SCORES),
        "grad_d/reg_init_out.scale_fs.bias": np.zeros(14),
        "grad_d/salt_reg.bias": np.zeros(4 * BINS),
    }
    for number, (level, size) in enumerate(zip(LEVELS, SIZES, strict=True)):
        probes = {
            kind: draw(f"probe/{kind}/{level}", outputs[f"{kind}/{level}"].shape)[0]
            for kind in ("p", "z", "d")
        }
        p, q, d = (outputs[f"{kind}/{level}"][0] for kind in ("p", "q", "d"))
        found["grad_p/salt_cls.bias"] += (probes["p"] * p * (1 - p / q)).sum((1, 2))
        factor = weights[f"scales.{number}.scale"]
        found["grad_z/salt_reg.bias"] += (probes["z"] * factor).sum((1, 2))
        factor = weights[f"scales_init.{number}.scale"]
        by_sides = (probes["d"] * (d != 0) * factor).sum((1, 2))
        found["grad_d/reg_init_out.regression.bias"] += by_sides
        scale = (probes["d"] * d / factor).sum()
        found[f"grad_d/scales_init.{number}.scale"] = np.array(scale)
        assert probes["d"].shape == (4, *size)
    return found


# Targets and losses.


def write_loss_case(folder: Path) -> Path:
    """GFL's scenes; scores have a class more, and coarse distances are added."""
    inputs: dict[str, Any] = {
        "images_hw": {"value": [list(size) for size, _ in SCENES]},
        "pad_hw": {"value": [list(padded(size)) for size, _ in SCENES]},
        "level_sizes": {"value": [list(x) for x in SIZES]},
    }
    for image, (_, boxes) in enumerate(SCENES):
        inputs[f"gt_boxes/{image}"] = {"value": boxes}
        inputs[f"gt_labels/{image}"] = {"value": LABELS[image]}
    maps: dict[str, list[np.ndarray]] = {"p": [], "z": [], "d": []}
    for kind, channels, scale, offset, transform in (
        ("p", SCORES, 1.0, -4.0, "sigmoid"),
        ("z", 4 * BINS, 1.6, 0.0, "identity"),
        ("d", 4, 1.5, 2.5, "relu"),
    ):
        for level, size in zip(LEVELS, SIZES, strict=True):
            name, shape = f"{kind}/{level}", (len(SCENES), channels, *size)
            entry = {**rule(name, shape), "scale": scale, "offset": offset}
            inputs[name] = {**entry, "transform": transform}
            maps[kind].append(draw(name, shape, scale, offset))
    config = {
        "classes": CLASSES,
        "cls_channels": SCORES,
        "strides": STRIDES,
        "reg_max": BINS - 1,
        "beta": 2.0,
        "loss_weights": {"cls": 1.0, "bbox": 2.0, "dfl": 0.25, "bbox_init": 1.0},
        "batch": len(SCENES),
    }
    outputs = losses(maps["p"], maps["z"])
    for level, logits in zip(LEVELS, maps["p"], strict=True):  # by the probability
        p = 1 / (1 + np.exp(-logits))
        outputs[f"grad/p/{level}"] = outputs[f"grad/p/{level}"] / (p * (1 - p))
    outputs |= coarse_losses(maps["p"], [np.maximum(x, 0) for x in maps["d"]])
    outputs["total"] = outputs["total"] + outputs["loss_bbox_init"]
    return write(folder / "salt_loss_small.json", "salt_loss", config, inputs, outputs)


def coarse_losses(p: Sequence[np.ndarray], d: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """The coarse boxes' loss, and its derivatives by the distances, from differences."""
    cells = cells_of(SIZES, STRIDES)
    raw, total = [0.0] * len(LEVELS), 0.0
    gradients = [np.zeros_like(x) for x in d]
    for image, (size, boxes) in enumerate(SCENES):
        owners = assign(cells, boxes, padded(size)).objects
        for cell, owner in zip(cells, owners, strict=True):
            if owner < 0:
                continue
            place = (image, slice(None), int(cell.y) // cell.stride, int(cell.x) // cell.stride)
            weight = max(sigmoid(x) for x in p[cell.level][place])
            sides = d[cell.level][place].tolist()
            total += weight
            raw[cell.level] += weight * giou_cost(cell.box(sides), boxes[owner])
            gradients[cell.level][place] = weight * difference(cell, sides, boxes[owner])
    return {
        "loss_bbox_init/raw": np.array(raw),
        "loss_bbox_init/level": np.array(raw) / total,
        "loss_bbox_init": np.array(sum(raw) / total),
        **{f"grad/d/{x}": grad / total for x, grad in zip(LEVELS, gradients, strict=True)},
    }


def difference(cell: Cell, sides: list[float], box: Box, step: float = 1e-4) -> np.ndarray:
    """(4,) derivatives of the cost by each side, from four values of it around."""
    found = []
    for index in range(4):

        def cost(moved: float, index: int = index) -> float:
            changed = [x + moved * (i == index) for i, x in enumerate(sides)]
            return giou_cost(cell.box(changed), box)

        near = (cost(step) - cost(-step)) / (2 * step)
        far = (cost(2 * step) - cost(-2 * step)) / (4 * step)
        found.append((4 * near - far) / 3)
    return np.array(found)
