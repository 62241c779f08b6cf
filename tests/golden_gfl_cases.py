# SPDX-License-Identifier: Apache-2.0
"""Small golden cases of ATSS and GFL, made by plain loops: no torch, nothing of the package."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gfl_loops import (
    UNUSED,
    Cell,
    assign,
    cells_of,
    distance,
    distribution_cost,
    giou_cost,
    iou,
    quality_cost,
    quality_slope,
    sigmoid,
)
from golden_decoupled_cases import suppressed
from golden_pdnet_cases import draw, write
from golden_pdnet_head import convolved, rule

STRIDES = [8, 16, 32, 64, 128]
LEVELS = ["p3", "p4", "p5", "p6", "p7"]
SIZES = [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]  # of a batch of 96 x 128 pixels
CLASSES = 3
BINS = 7  # so few that some distances are cut


# Assignment.

SCENES: list[tuple[tuple[int, int], list[list[float]]]] = [  # (height, width) and boxes
    (
        (90, 120),
        [
            [10.5, 8.25, 70.0, 60.75],
            [30.0, 20.5, 90.25, 80.0],
            [99.25, 3.5, 107.0, 12.75],
            [3.25, 60.5, 118.0, 89.25],
            [-70.25, -60.5, 170.0, 150.25],
        ],
    ),
    ((60, 50), [[-20.5, -11.25, 75.0, 90.75], [12.5, 30.0, 21.75, 47.25]]),
    ((96, 128), []),
]


def padded(size: Sequence[int]) -> tuple[int, int]:
    height, width = (math.ceil(side / 32) * 32 for side in size)
    return height, width


def write_assign_case(folder: Path) -> Path:
    """Objects that overlap, small and wide ones, some larger than their image; an image smaller
    than the batch, and one without objects."""
    inputs: dict[str, Any] = {}
    outputs: dict[str, np.ndarray] = {}
    for number, (size, boxes) in enumerate(SCENES):
        scene = f"s{number}"
        found = assign(cells_of(SIZES, STRIDES), boxes, padded(size))
        counts = [found.objects.count(index) for index in range(len(boxes))]
        inputs |= {
            f"{scene}/image_hw": {"value": list(size)},
            f"{scene}/pad_hw": {"value": list(padded(size))},
            f"{scene}/level_sizes": {"value": [list(x) for x in SIZES]},
            f"{scene}/gt_boxes": {"value": boxes},
        }
        outputs |= {
            f"{scene}/assigned": np.array(found.objects),
            f"{scene}/num_positive": np.array(sum(counts)),
            f"{scene}/positives_per_gt": np.array(counts, dtype=int),
            f"{scene}/thresholds": np.array(found.thresholds, dtype=float),
        }
    config = {
        "strides": STRIDES,
        "anchor_side_in_strides": 8,
        "center_offset_in_strides": 0.0,
        "topk": 9,
        "min_center_distance_px": 0.01,
        "ignore_iof_thr": -1,
        "scenes": len(SCENES),
    }
    return write(folder / "atss_assign_small.json", "atss_assign", config, inputs, outputs)


# The head.

CHANNELS = 4
WEIGHTS: list[Any] = [
    *[
        [f"{tower}.0.{name}", shape, scale, offset]
        for tower in ("cls_convs", "reg_convs")
        for name, shape, scale, offset in (
            ("conv.weight", [CHANNELS, CHANNELS, 3, 3], 0.3, 0.0),
            ("gn.weight", [CHANNELS], 0.2, 1.0),
            ("gn.bias", [CHANNELS], 0.2, 0.0),
        )
    ],
    ["gfl_cls.weight", [CLASSES, CHANNELS, 3, 3], 0.3, 0.0],
    ["gfl_cls.bias", [CLASSES], 0.3, -2.0],
    ["gfl_reg.weight", [4 * BINS, CHANNELS, 3, 3], 0.3, 0.0],
    ["gfl_reg.bias", [4 * BINS], 0.5, 0.0],
    *[[f"scales.{level}.scale", [], 0.3, 1.0] for level in range(len(LEVELS))],
]
IMAGE = (90, 120)
FACTORS = [1.25, 1.5, 1.25, 1.5]


def write_head_case(folder: Path) -> Path:
    """One image; a tower of one convolution; more detections than are kept."""
    inputs: dict[str, Any] = {
        f"feature/{level}": rule(f"feature/{level}", (1, CHANNELS, *size))
        for level, size in zip(LEVELS, SIZES, strict=True)
    }
    inputs |= {"images_hw": {"value": [list(IMAGE)]}, "scale_factor": {"value": FACTORS}}
    config = {
        "classes": CLASSES,
        "cls_channels": CLASSES,
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
        "reg_topk": None,
    }
    outputs = forward({name: draw(name, *entry) for name, *entry in WEIGHTS})
    scores = [1 / (1 + np.exp(-outputs[f"p_logits/{level}"][0])) for level in LEVELS]
    outputs |= detected(outputs["boxes"][0], scores, config)
    return write(folder / "gfl_head_small.json", "gfl_head", config, inputs, outputs, WEIGHTS)


def tower(feature: np.ndarray, weights: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """A convolution, normalised in two groups of channels, cut at zero."""
    found = convolved(feature, weights[f"{name}.0.conv.weight"], np.zeros(CHANNELS))
    return activated(found, weights, f"{name}.0.gn")


def activated(found: np.ndarray, weights: Mapping[str, np.ndarray], norm: str) -> np.ndarray:
    """A map (C, H, W), normalised in two groups of channels, cut at zero."""
    groups = np.split(found, 2)
    normal = np.concatenate([(x - x.mean()) / np.sqrt(x.var() + 1e-5) for x in groups])
    scale, shift = (weights[f"{norm}.{kind}"][:, None, None] for kind in ("weight", "bias"))
    return np.maximum(normal * scale + shift, 0)


def forward(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Both kinds of maps of each level, and the boxes cut to the image."""
    outputs: dict[str, np.ndarray] = {}
    boxes: list[list[float]] = []
    cells = iter(cells_of(SIZES, STRIDES))
    for number, (level, size) in enumerate(zip(LEVELS, SIZES, strict=True)):
        feature = draw(f"feature/{level}", (1, CHANNELS, *size))[0]
        found = {
            part: convolved(
                tower(feature, weights, source), weights[f"{part}.weight"], weights[f"{part}.bias"]
            )
            for part, source in (("gfl_cls", "cls_convs"), ("gfl_reg", "reg_convs"))
        }
        logits = found["gfl_reg"] * weights[f"scales.{number}.scale"]
        outputs |= {f"z/{level}": logits[None], f"p_logits/{level}": found["gfl_cls"][None]}
        for row in range(size[0]):
            for column in range(size[1]):
                sides = logits[:, row, column].reshape(4, BINS)
                box = next(cells).box([distance(side) for side in sides])
                boxes.append([min(max(v, 0.0), IMAGE[1 - i % 2]) for i, v in enumerate(box)])
    return {**outputs, "boxes": np.array([boxes])}


def detected(
    boxes: np.ndarray, maps: Sequence[np.ndarray], config: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The best locations of each level, and what suppression leaves of them.

    ``maps`` are (classes, H, W) scores of each level, ``boxes`` (R, 4).
    """
    first, channels = 0, len(maps[0])
    found: list[tuple[float, int, list[float]]] = []
    for scores in (x.reshape(channels, -1).T.tolist() for x in maps):
        order = sorted(range(len(scores)), key=lambda row: -max(scores[row]))
        for row in order[: config["nms_pre"]]:
            for label, score in enumerate(scores[row]):
                if score > config["score_thr"]:
                    found.append((score, label, boxes[first + row].tolist()))
        first += len(scores)
    kept = []
    for label in range(channels):
        own = [x for x in found if x[1] == label]
        survivors = suppressed([x[2] for x in own], [x[0] for x in own], config["nms_iou"])
        kept += [own[index] for index in survivors]
    assert len(found) > len(kept) > config["max_per_img"]
    kept = sorted(kept, key=lambda x: -x[0])[: config["max_per_img"]]
    return {
        "det_boxes/0": np.array([[*np.divide(box, FACTORS), score] for score, _, box in kept]),
        "det_labels/0": np.array([label for _, label, _ in kept]),
    }


# Targets and losses.

LABELS = [[2, 0, 1, 1, 2], [1, 2], []]


def write_loss_case(folder: Path) -> Path:
    """The scenes of the assignment as a batch; the positives' scores add to less than 1."""
    inputs: dict[str, Any] = {
        "images_hw": {"value": [list(size) for size, _ in SCENES]},
        "pad_hw": {"value": [list(padded(size)) for size, _ in SCENES]},
        "level_sizes": {"value": [list(size) for size in SIZES]},
    }
    for image, (_, boxes) in enumerate(SCENES):
        inputs[f"gt_boxes/{image}"] = {"value": boxes}
        inputs[f"gt_labels/{image}"] = {"value": LABELS[image]}
    maps: dict[str, list[np.ndarray]] = {"p": [], "z": []}
    for kind, channels, scale, offset in (("p", CLASSES, 1.0, -5.5), ("z", 4 * BINS, 1.6, 0.0)):
        for level, size in zip(LEVELS, SIZES, strict=True):
            name, shape = f"{kind}/{level}", (len(SCENES), channels, *size)
            inputs[name] = {**rule(name, shape), "scale": scale, "offset": offset}
            maps[kind].append(draw(name, shape, scale, offset))
    config = {
        "classes": CLASSES,
        "cls_channels": CLASSES,
        "strides": STRIDES,
        "reg_max": BINS - 1,
        "beta": 2.0,
        "loss_weights": {"cls": 1.0, "bbox": 2.0, "dfl": 0.25},
        "batch": len(SCENES),
    }
    outputs = losses(maps["p"], maps["z"])
    assert 0 < outputs["avg_factor"] < 1
    return write(folder / "gfl_loss_small.json", "gfl_loss", config, inputs, outputs)


class Sums:
    """What adds up over the locations of a batch."""

    def __init__(self, channels: int) -> None:
        self.cls, self.bbox, self.dfl, self.weight = ([0.0] * len(LEVELS) for _ in range(4))
        self.slopes = [np.zeros((len(SCENES), channels, *size)) for size in SIZES]
        self.labels: list[list[int]] = []
        self.used: list[list[float]] = []
        self.boxes: list[list[list[float]]] = []

    def add(self, image: int, cell: Cell, scores: Sequence[float], sides: Any, owner: int) -> None:
        """One location: the scores of its classes, its distributions, its object."""
        targets = [0.0] * len(scores)
        boxes, label = SCENES[image][1], CLASSES
        self.used[image].append(float(owner != UNUSED))
        self.boxes[image].append([0.0] * 4)
        if owner >= 0:
            box, label = boxes[owner], LABELS[image][owner]
            self.boxes[image][-1] = box
            predicted = cell.box([distance(side) for side in sides])
            targets[label] = iou(predicted, box)
            weight = max(scores)
            self.weight[cell.level] += weight
            self.bbox[cell.level] += 2 * weight * giou_cost(predicted, box)
            for side, length in zip(sides, cell.sides(box), strict=True):
                cost = distribution_cost(side, length / cell.stride)
                self.dfl[cell.level] += 0.25 * weight * cost / 4
        self.labels[image].append(label)
        if owner == UNUSED:
            return
        row, column = int(cell.y) // cell.stride, int(cell.x) // cell.stride
        for index, (score, target) in enumerate(zip(scores, targets, strict=True)):
            self.cls[cell.level] += quality_cost(score, target)
            slope = quality_slope(score, target)
            self.slopes[cell.level][image, index, row, column] = slope


def losses(p: Sequence[np.ndarray], z: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Of the kind ``gfl_loss``, but for the gradients of the distributions."""
    sums, cells = Sums(p[0].shape[1]), cells_of(SIZES, STRIDES)
    count = 0
    for image, (size, boxes) in enumerate(SCENES):
        for rows in (sums.labels, sums.used, sums.boxes):
            rows.append([])
        owners = assign(cells, boxes, padded(size)).objects
        count += max(sum(owner >= 0 for owner in owners), 1)
        for cell, owner in zip(cells, owners, strict=True):
            row, column = int(cell.y) // cell.stride, int(cell.x) // cell.stride
            scores = [sigmoid(x) for x in p[cell.level][image, :, row, column]]
            sides = z[cell.level][image, :, row, column].reshape(4, BINS)
            sums.add(image, cell, scores, sides, owner)
    total = sum(sums.weight)
    cls = [x / count for x in sums.cls]
    outputs: dict[str, Any] = {
        "labels": sums.labels,
        "label_weights": sums.used,
        "bbox_targets": sums.boxes,
        "num_pos": float(count),
        "avg_factor": total,
        "avg_factor/level": sums.weight,
        "loss_cls/raw": cls,
        "loss_cls/level": cls,
        "loss_cls": sum(cls),
        "total": sum(cls) + (sum(sums.bbox) + sum(sums.dfl)) / total,
    }
    for name, raw in (("loss_bbox", sums.bbox), ("loss_dfl", sums.dfl)):
        outputs |= {f"{name}/raw": raw, f"{name}/level": [x / total for x in raw]}
        outputs[name] = sum(raw) / total
    for level, slopes in zip(LEVELS, sums.slopes, strict=True):
        outputs[f"grad/p/{level}"] = slopes / count
    return {name: np.array(value) for name, value in outputs.items()}
