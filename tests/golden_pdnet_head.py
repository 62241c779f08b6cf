# SPDX-License-Identifier: Apache-2.0
"""A small golden case of PDNet's head, without towers, made by plain loops."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from golden_pdnet_cases import CLASSES, SIZES, STRIDES, draw, theirs, write
from pdnet_loops import Kinds, Level, predict

CHANNELS = 2
LEVELS = ("p3", "p4", "p5", "p6", "p7")
PREFIX = "rpn.head.pred_head."
WEIGHTS: list[Any] = [
    [f"{PREFIX}dyn_pt_pred.weight", [34, CHANNELS, 3, 3], 0.8, 0.0],
    [f"{PREFIX}dyn_pt_pred.bias", [34], 1.0, 0.0],
    [f"{PREFIX}reg_map_pred.weight", [4, CHANNELS, 1, 1], 0.5, 0.0],
    [f"{PREFIX}cls_map_pred.weight", [9 * CLASSES, CHANNELS, 1, 1], 0.5, 0.0],
    [f"{PREFIX}cls_pred_collect.bias", [CLASSES], 0.3, -2.0],
]
# Whose channel of theirs each of our 34 channels is: coarse x1, y1, x2, y2 | slides of left, top,
# right, bottom | x and y of nine points | two levels of left, top, right, bottom.
CHANNEL_OF = [
    *(1, 0, 3, 2),
    *(5, 4, 7, 6),
    *[channel for point in range(9) for channel in (9 + 2 * point, 8 + 2 * point)],
    *(28, 29, 26, 27, 32, 33, 30, 31),
]
OUTPUTS = ("coarse_box", "reg_box", "logits")


def write_head_case(folder: Path) -> Path:
    """One image, five levels; of the gradients those of parameters that act linearly."""
    parameters = {
        name.removeprefix(PREFIX): draw(name, shape, scale, offset)
        for name, shape, scale, offset in WEIGHTS
    }
    inputs: dict[str, Any] = {}
    shapes = {"coarse_box": 4, "reg_box": 4, "logits": CLASSES}
    for level, size in zip(LEVELS, SIZES, strict=True):
        inputs[f"feature/{level}"] = rule(f"feature/{level}", (1, CHANNELS, *size))
        for kind, channels in shapes.items():
            name = f"upstream/{kind}/{level}"
            inputs[name] = rule(name, (1, channels, *size))
    config = {
        "num_classes": CLASSES,
        "channels": CHANNELS,
        "num_convs": 0,
        "gn_groups": 1,
        "gn_eps": 1e-5,
        "num_points": 9,
        "batch": 1,
        "strides": STRIDES,
        "level_sizes": SIZES,
        "limit_ratio": 1.5,
    }
    outputs = forward(parameters)
    for name in ("reg_map_pred.weight", "cls_pred_collect.bias"):
        gradient = slope(parameters, name)
        outputs[f"grad/{PREFIX}{name}"] = gradient
        norm = np.sqrt((gradient**2).sum())
        outputs[f"gradnorm/{PREFIX}{name}"] = np.array([gradient.sum(), norm])
    return write(folder / "pdnet_head_small.json", "pdnet_head", config, inputs, outputs, WEIGHTS)


def rule(name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """The entry of an array that is drawn."""
    return {
        "rule": "crc32-pcg64",
        "name": name,
        "shape": list(shape),
        "scale": 1.0,
        "offset": 0.0,
    }


def convolved(feature: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A 3x3 convolution with padding 1: (C, H, W) -> (O, H, W)."""
    height, width = feature.shape[1:]
    padded = np.pad(feature, ((0, 0), (1, 1), (1, 1)))
    out = np.zeros((len(weight), height, width)) + bias[:, None, None]
    for row in range(3):
        for column in range(3):
            seen = padded[:, row : row + height, column : column + width]
            out += np.einsum("oc,chw->ohw", weight[:, :, row, column], seen)
    return out


def forward(parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The five kinds of maps of each level, as theirs."""
    levels = []
    for name, size in zip(LEVELS, SIZES, strict=True):
        feature = draw(f"feature/{name}", (1, CHANNELS, *size))[0]
        dynamic = convolved(
            feature, parameters["dyn_pt_pred.weight"], parameters["dyn_pt_pred.bias"]
        )
        values, classes = (
            np.einsum("oc,chw->ohw", parameters[part][:, :, 0, 0], feature)
            for part in ("reg_map_pred.weight", "cls_map_pred.weight")
        )
        levels.append(Level(dynamic[CHANNEL_OF], values[[1, 0, 3, 2]], classes))
    cells = predict(levels, Kinds(), CLASSES)
    bias = parameters["cls_pred_collect.bias"]
    outputs, first = {}, 0
    for name, (height, width) in zip(LEVELS, SIZES, strict=True):
        own = cells[first : first + height * width]
        first += height * width
        rows = {
            "coarse_box": [theirs(cell["coarse"]) for cell in own],
            "reg_box": [theirs(cell["box"]) for cell in own],
            "logits": [np.array(cell["logits"]) + bias for cell in own],
            "bound_pt": [[v for x, y in theirs(cell["sides"]) for v in (y, x)] for cell in own],
            "semantic_pt": [[v for x, y in cell["semantic"] for v in (y, x)] for cell in own],
        }
        for kind, values in rows.items():
            array = np.array(values).T.reshape(1, -1, height, width)
            outputs[f"{kind}/{name}"] = array
    return outputs


def slope(parameters: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Gradient of the weighted sum of outputs by a parameter in which they are linear."""
    gradient = np.zeros(parameters[name].shape)
    for index in np.ndindex(gradient.shape):
        totals = []
        for sign in (1, -1):
            changed = parameters[name].copy()
            changed[index] += sign
            totals.append(weighted({**parameters, name: changed}))
        gradient[index] = (totals[0] - totals[1]) / 2
    return gradient


def weighted(parameters: Mapping[str, np.ndarray]) -> float:
    """Sum of outputs times their upstream gradients."""
    found = forward(parameters)
    return sum(
        float((found[f"{kind}/{level}"] * draw(name, found[f"{kind}/{level}"].shape)).sum())
        for kind in OUTPUTS
        for level in LEVELS
        for name in [f"upstream/{kind}/{level}"]
    )
