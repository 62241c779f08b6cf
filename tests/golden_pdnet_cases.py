# SPDX-License-Identifier: Apache-2.0
"""Small golden cases of PDNet, made by plain loops: no torch, nothing of the package.

They are in the authors' conventions: (top, left, bottom, right) in cells, y before x, labels from
1, legacy boxes. The loops count as the package does, so each number is turned here, one by one.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from pdnet_loops import (
    IGNORED,
    Box,
    Cell,
    cells_of,
    coarse_matches,
    final_matches,
    focal_cost,
    giou_cost,
    overlap,
)

SEED = 4711
CLASSES = 3
STRIDES = [8, 16, 32, 64, 128]
PADDED = (64, 96)
SIZES = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
FINE = {"float32": {"rtol": 1e-4, "atol": 1e-4}, "float64": {"rtol": 1e-9, "atol": 1e-9}}
EXACT = {dtype: {"rtol": 0.0, "atol": 0.0} for dtype in FINE}


def draw(name: str, shape: Sequence[int], scale: float = 1.0, offset: float = 0.0) -> np.ndarray:
    """The rule of generated arrays."""
    generator = np.random.Generator(np.random.PCG64(SEED ^ zlib.crc32(name.encode())))
    return offset + scale * generator.standard_normal(shape)


def write(
    path: Path,
    kind: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, Any],
    outputs: Mapping[str, np.ndarray],
    weights: Sequence[Any] = (),
) -> Path:
    """Both files of a case; an input is an array, or an entry as the json has it."""
    arrays, entries = {}, {}
    for name, value in inputs.items():
        entries[name] = value
        if isinstance(value, np.ndarray):
            arrays[f"in/{name}"] = value.astype(np.float32)
            entries[name] = {"npz": f"in/{name}", "shape": list(value.shape)}
    arrays |= {f"out/{name}": np.asarray(value) for name, value in outputs.items()}
    header = {
        "kind": kind,
        "seed": SEED,
        "config": config,
        "weights": {"rule": "crc32-pcg64", "entries": list(weights)},
        "inputs": entries,
        "outputs": {
            name: {
                "npz": f"out/{name}",
                "shape": list(np.shape(value)),
                "tolerance": EXACT if np.asarray(value).dtype.kind == "i" else FINE,
            }
            for name, value in outputs.items()
        },
    }
    path.write_text(json.dumps(header), encoding="utf-8")
    np.savez(path.with_suffix(".npz"), **arrays)
    return path


def ours(box: Box, stride: float) -> list[float]:
    """(top, left, bottom, right) in cells -> (x1, y1, x2, y2) in pixels."""
    top, left, bottom, right = (float(value) * stride for value in box)
    return [left, top, right, bottom]


def theirs(values: Sequence[Any]) -> list[Any]:
    """What belongs to left, top, right, bottom, in their order."""
    left, top, right, bottom = values
    return [top, left, bottom, right]


# Targets and losses.

OBJECTS: list[list[list[float]]] = [
    [[10.0, 8.0, 57.0, 50.0], [60.0, 20.0, 66.5, 27.0], [30.0, 4.0, 89.0, 30.0]],
    [[4.0, 4.0, 40.0, 30.0]],
    [],
]
LABELS = [[2, 1, 3], [3], []]
IMAGE_SIZES = [(60, 90), (30, 50), (64, 96)]


def write_loss_case(folder: Path) -> Path:
    """Three images: with three objects, in a part of the batch's size, and without objects."""
    cells = cells_of(SIZES, STRIDES)
    strides = np.array([cell.stride for cell in cells], dtype=np.float64)[:, None]
    grid = np.array([[cell.y, cell.x] for cell in cells], dtype=np.float64)
    priors = np.concatenate((grid - 2, grid + 2), 1)
    inputs: dict[str, Any] = {}
    for name in ("coarse_box", "reg_box"):
        moved = draw(name, (3, len(cells), 4), 0.6)
        inputs[name] = np.round((priors + moved) * 64) / 64
    coarse = inputs["coarse_box"]
    for image, row, box in (
        (0, 40, OBJECTS[0][0]),
        (0, 60, OBJECTS[0][1]),
        (0, 61, [60.0, 20.0, 63.75, 27.0]),  # overlaps the same by 0.63, without the + 1 by 0.58
        (1, 20, OBJECTS[1][0]),
    ):
        coarse[image, row] = np.array(theirs(box)) / strides[row]
    coarse[:, 41] = coarse[:, 40, [2, 1, 0, 3]]  # inverted
    inputs["logits"] = np.round(draw("logits", (3, len(cells), CLASSES), 2.0, -1.0) * 64) / 64
    for image, boxes in enumerate(OBJECTS):
        inputs[f"gt_boxes/{image}"] = {"value": boxes}
        inputs[f"gt_labels/{image}"] = {"value": LABELS[image]}
        inputs[f"image_size_hw/{image}"] = {"value": list(IMAGE_SIZES[image])}
    config = {
        "num_classes": CLASSES,
        "batch": 3,
        "strides": STRIDES,
        "level_sizes": SIZES,
        "pos_iou": 0.6,
        "neg_iou": 0.6,
        "focal_alpha": 0.25,
        "focal_gamma": 2.0,
        "weight_cls": 1.0,
        "weight_coarse": 0.5,
        "weight_reg": 2.0,
        "num_gpus": 1,
    }
    outputs = loss_outputs(cells, inputs)
    return write(folder / "pdnet_loss_small.json", "pdnet_loss", config, inputs, outputs)


def loss_outputs(cells: Sequence[Cell], inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Of the kind ``pdnet_loss``, but for the gradients."""
    labels: list[int] = []
    found: dict[str, list[int]] = {"pos": [], "pos_gt": [], "coarse": [], "coarse_gt": []}
    cls, coarse_cost, final_cost = 0.0, 0.0, 0.0
    for image, objects in enumerate(OBJECTS):
        size = IMAGE_SIZES[image]
        coarse, final = (
            [ours(box, cell.stride) for box, cell in zip(inputs[name][image], cells, strict=True)]
            for name in ("coarse_box", "reg_box")
        )
        for row, index in enumerate(coarse_matches(cells, objects, size, 1.0)):
            if index >= 0:
                found["coarse"].append(image * len(cells) + row)
                found["coarse_gt"].append(index)
                coarse_cost += giou_cost(coarse[row], objects[index])
        for row, index in enumerate(final_matches(cells, coarse, objects, size, side=1.0)):
            label = LABELS[image][index] if index >= 0 else -1 if index == IGNORED else 0
            labels.append(label)
            if label > 0:
                found["pos"].append(image * len(cells) + row)
                found["pos_gt"].append(index)
                final_cost += giou_cost(final[row], objects[index])
            if label >= 0:
                cls += focal_cost(inputs["logits"][image, row], label - 1)
    return {
        "loss_cls": np.array(cls / len(found["pos"])),
        "loss_crs": np.array(0.5 * coarse_cost / len(found["coarse"])),
        "loss_reg": np.array(2.0 * final_cost / len(found["pos"])),
        "num_pos": np.array(len(found["pos"])),
        "num_coarse_pos": np.array(len(found["coarse"])),
        "labels": np.array(labels),
        "pos_index": np.array(found["pos"]),
        "pos_gt": np.array(found["pos_gt"]),
        "coarse_pos_index": np.array(found["coarse"]),
        "coarse_pos_gt": np.array(found["coarse_gt"]),
    }


# Detections.


def write_infer_case(folder: Path) -> Path:
    """Two images: one with boxes of every kind, one without any detection."""
    cells = cells_of(SIZES, STRIDES)
    inputs: dict[str, Any] = {
        "reg_box": np.zeros((2, len(cells), 4)),
        "logits": np.full((2, len(cells), CLASSES), -6.0),
        "image_size_hw/0": {"value": [60, 90]},
        "image_size_hw/1": {"value": [64, 96]},
    }
    # Location, pixels (x1, y1, x2, y2), class, logit. With widths + 1 the second overlaps the
    # first by 8.75 * 12 of 183, which is 0.57, and the third by 10 * 12 of 168, 0.71. The fifth
    # and the sixth overlap by 12 * 20 of 390, 0.615; without the + 1 by 11 * 19 of 351, 0.595.
    planted: list[tuple[int, list[float], int, float]] = [
        (3, [10, 10, 21, 21], 0, 2.0),
        (20, [13.25, 10, 24.25, 21], 0, 1.5),
        (100, [12, 10, 23, 21], 0, 1.0),
        (101, [12, 10, 23, 21], 1, 0.75),  # another class
        (121, [40, 20, 54, 40], 2, 0.5),
        (122, [43, 21, 57, 41], 2, 0.25),
        (126, [-30, 50, 200, 90], 1, 0.125),  # larger than the image
        (102, [50, 30, 40, 35], 1, -0.5),  # inverted
        (128, [95, 70, 99, 99], 1, -1.0),  # beyond the image
        (40, [0, 0, 5, 5], 2, -2.94),  # a score of 0.0502
        (60, [0, 0, 5, 5], 1, -2.95),  # 0.0497
        (80, [1, 1, 5, 5], 1, -2.0),  # P3 has more pairs than it may hand on
    ]
    for row, box, label, logit in planted:
        inputs["reg_box"][0, row] = np.array(theirs(box)) / cells[row].stride
        inputs["logits"][0, row, label] = logit
    config = {
        "num_classes": CLASSES,
        "strides": STRIDES,
        "level_sizes": SIZES,
        "score_threshold": 0.05,
        "pre_nms_top_n_per_level": 3,
        "nms_threshold": 0.6,
        "detections_per_image": 7,
        "min_size": 0,
    }
    outputs = infer_outputs(cells, inputs, config)
    return write(folder / "pdnet_infer_small.json", "pdnet_infer", config, inputs, outputs)


def infer_outputs(
    cells: Sequence[Cell], inputs: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Of the kind ``pdnet_infer``."""
    outputs: dict[str, Any] = {"num_pairs_over_threshold": [], "num_candidates": []}
    outputs["num_after_nms"] = []
    for image in range(2):
        height, width = inputs[f"image_size_hw/{image}"]["value"]
        counts, pool = [], []
        for stride in STRIDES:
            found = []
            for row, cell in enumerate(cells):
                for label in range(CLASSES if cell.stride == stride else 0):
                    score = 1 / (1 + np.exp(-inputs["logits"][image, row, label]))
                    if score > config["score_threshold"]:
                        x1, y1, x2, y2 = ours(inputs["reg_box"][image, row], stride)
                        x2, y2 = max(x1, x2), max(y1, y2)
                        limits = (width - 1, height - 1) * 2
                        box = [
                            min(max(value, 0.0), limit)
                            for value, limit in zip((x1, y1, x2, y2), limits, strict=True)
                        ]
                        found.append((score, label + 1, box))
            counts.append(len(found))
            pool.append(sorted(found, reverse=True)[: config["pre_nms_top_n_per_level"]])
        kept: list[Any] = []
        for score, label, box in sorted(chain(*pool), reverse=True):
            rivals = [x for _, other, x in kept if other == label]
            if all(overlap(box, x, 1.0) <= config["nms_threshold"] for x in rivals):
                kept.append((score, label, box))
        outputs["num_pairs_over_threshold"].append(counts)
        outputs["num_candidates"].append([len(level) for level in pool])
        outputs["num_after_nms"].append(len(kept))
        best = kept[: config["detections_per_image"]]
        outputs[f"boxes/{image}"] = np.array([x[2] for x in best], dtype=float).reshape(-1, 4)
        outputs[f"scores/{image}"] = np.array([x[0] for x in best], dtype=float)
        outputs[f"labels/{image}"] = np.array([x[1] for x in best], dtype=int)
    return {name: np.asarray(value) for name, value in outputs.items()}
