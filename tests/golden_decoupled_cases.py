# SPDX-License-Identifier: Apache-2.0
"""Small golden cases of Decoupled R-CNN, made by plain loops: no torch, nothing of the package.

They are in the authors' conventions: regions image by image, of the class branch with ground truth
in front, the regressors' losses divided by all regions of stage 0 and twice those of later ones.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from golden_pdnet_cases import draw, write

Box = Sequence[float]
Size = tuple[int, int]

MARGIN = 1e-4  # no overlap is nearer to a threshold, so rounding cannot decide


def iou(a: Box, b: Box) -> float:
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    inner = max(width, 0.0) * max(height, 0.0)
    return inner / (area(a) + area(b) - inner)


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def suppressed(boxes: Sequence[Box], scores: Sequence[float], limit: float) -> list[int]:
    """Indices of the survivors, best first."""
    kept: list[int] = []
    for index in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        overlaps = [iou(boxes[index], boxes[other]) for other in kept]
        assert all(abs(x - limit) > MARGIN for x in overlaps)
        if all(x <= limit for x in overlaps):
            kept.append(index)
    return kept


def decoded(deltas: Sequence[float], box: Box, stds: Sequence[float], size: Size) -> list[float]:
    """The box after a change, cut to the image (height, width)."""
    sides = [box[2] - box[0], box[3] - box[1]]
    low, high = [], []
    for axis, limit in ((0, size[1]), (1, size[0])):
        middle = box[axis] + sides[axis] / 2 + deltas[axis] * stds[axis] * sides[axis]
        grown = min(max(deltas[axis + 2] * stds[axis + 2], -math.log(62.5)), math.log(62.5))
        half = sides[axis] * math.exp(grown) / 2
        low.append(min(max(middle - half, 0.0), limit))
        high.append(min(max(middle + half, 0.0), limit))
    return low + high


def encoded(box: Box, target: Box, stds: Sequence[float]) -> list[float]:
    shifts, growths = [], []
    for axis in (0, 1):
        side, other = box[axis + 2] - box[axis], target[axis + 2] - target[axis]
        apart = (target[axis] + other / 2) - (box[axis] + side / 2)
        shifts.append(apart / side / stds[axis])
        growths.append(math.log(other / side) / stds[axis + 2])
    return shifts + growths


def float32(array: np.ndarray) -> np.ndarray:
    """The numbers that are stored, as float64."""
    return array.astype(np.float32).astype(np.float64)


# Proposals.

LIMITS = (0.7, 0.85)
PRE, POST = 120, 40
IMAGE = (88, 120)
SCALE = 8  # sides of an anchor, in strides: neighbours overlap by 0.78
LEVELS: list[tuple[int, Size]] = [(8, (11, 15)), (16, (6, 8))]  # strides and map sizes


def write_proposals_case(folder: Path) -> Path:
    """Two levels, of which the first has more anchors than are looked at."""
    inputs: dict[str, Any] = {
        "image_hw": {"value": list(IMAGE)},
        "level_sizes": {"value": [list(size) for _, size in LEVELS]},
    }
    boxes: list[list[float]] = []
    logits: list[float] = []
    levels: list[int] = []
    for level, (stride, size) in enumerate(LEVELS):
        inputs[f"logits/{level}"] = float32(draw(f"logits/{level}", (3, *size), 2.0))
        inputs[f"deltas/{level}"] = float32(draw(f"deltas/{level}", (12, *size), 0.1))
        found = []
        for row in range(size[0]):
            for column in range(size[1]):
                for anchor, ratio in enumerate((0.5, 1.0, 2.0)):
                    half = [SCALE * stride * side / 2 for side in (ratio**-0.5, ratio**0.5)]
                    x, y = column * stride, row * stride
                    box = [x - half[0], y - half[1], x + half[0], y + half[1]]
                    raw = inputs[f"deltas/{level}"][4 * anchor : 4 * anchor + 4, row, column]
                    score = inputs[f"logits/{level}"][anchor, row, column]
                    found.append((score, decoded(raw, box, [1, 1, 1, 1], IMAGE)))
        found = sorted(found, key=lambda pair: -pair[0])[:PRE]
        logits += [score for score, _ in found]
        boxes += [box for _, box in found]
        levels += [level] * len(found)
    assert all(area(box) > 0 for box in boxes)
    scores = [1 / (1 + math.exp(-x)) for x in logits]
    inputs["candidates/boxes"], inputs["candidates/scores"] = np.array(boxes), np.array(scores)
    inputs["candidates/levels"] = {"value": levels}
    outputs: dict[str, np.ndarray] = {}
    survivors = []
    for name, limit in zip("ab", LIMITS, strict=True):
        kept = []
        for level in range(len(LEVELS)):
            mine = [i for i in range(len(boxes)) if levels[i] == level]
            chosen = suppressed([boxes[i] for i in mine], [scores[i] for i in mine], limit)
            kept += [mine[i] for i in chosen]
        kept.sort(key=lambda i: -scores[i])
        survivors.append(kept)
        outputs[f"keep_{name}/full"] = np.array(kept)
        outputs[f"proposals_{name}"] = np.array([[*boxes[i], scores[i]] for i in kept[:POST]])
    only_first = len({*survivors[0]} - {*survivors[1]})
    outputs["counts"] = np.array([*map(len, survivors), only_first])
    config = {
        "strides": [stride for stride, _ in LEVELS],
        "anchor_scale": SCALE,
        "ratios": [0.5, 1.0, 2.0],
        "nms_thr": list(LIMITS),
        "nms_pre": PRE,
        "nms_post": POST,
        "min_bbox_size": 0,
    }
    path = folder / "decoupled_proposals_small.json"
    return write(path, "decoupled_proposals", config, inputs, outputs)


# Branches and stages.

CLASSES, CHANNELS, WIDTH, CELLS = 3, 2, 6, 2
STDS = [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
STAGE_WEIGHTS = [1, 0.5, 0.25]
STRIDES = [4, 8, 16, 32]
SIZES: list[Size] = [(150, 180), (128, 160)]
PADDED = (160, 192)
OBJECTS = [
    [[12.0, 20.0, 60.0, 75.0], [70.5, 30.0, 170.0, 146.0]],
    [[20.0, 10.0, 150.0, 120.0]],
]
LABELS = [[2, 0], [1]]
THRESHOLD, KEPT = 0.2, 12
CODED = {  # the second change shrinks a side, and lets the other grow, beyond the limit
    "boxes": [[60.0, 50.0, 90.0, 100.0], [60.0, 50.0, 90.0, 100.0]],
    "deltas": [[1.5, -0.5, 0.25, -0.75], [0.0, 1.0, -150.0, 150.0]],
    "targets": [[55.0, 52.0, 99.5, 90.0], [10.0, 20.0, 30.0, 40.0]],
}


def _weights() -> list[list[Any]]:
    entries: list[list[Any]] = []
    for stage in range(3):
        for trunk, layer, outputs, std in (
            ("cls_fcs", "fc_cls", CLASSES + 1, 0.6),
            ("reg_fcs", "fc_reg", 4 if stage else 4 * CLASSES, 0.3),
        ):
            if stage and trunk == "cls_fcs":
                continue
            shapes = [(f"{trunk}.0", WIDTH, CHANNELS * CELLS**2, 0.5)]
            shapes += [(f"{trunk}.1", WIDTH, WIDTH, 0.5), (layer, outputs, WIDTH, std)]
            for name, rows, columns, scale in shapes:
                entries.append([f"bbox_head.{stage}.{name}.weight", [rows, columns], scale, 0.0])
                entries.append([f"bbox_head.{stage}.{name}.bias", [rows], 0.2, 0.1])
    return entries


WEIGHTS = _weights()


class Network:
    """The branches, on maps (N, C, H, W) of each level."""

    def __init__(self, maps: Sequence[np.ndarray]) -> None:
        self.maps = maps
        self.parameters = {
            name: draw(name, shape, scale, offset) for name, shape, scale, offset in WEIGHTS
        }

    def classes(self, image: int, box: Box) -> list[float]:
        """Logits, of background last."""
        return self._branch("cls", 0, image, box)

    def changes(self, stage: int, image: int, box: Box, label: int) -> list[float]:
        """Of one class at the first stage, of all at later ones."""
        found = self._branch("reg", stage, image, box)
        return found if stage else found[4 * label : 4 * label + 4]

    def _branch(self, kind: str, stage: int, image: int, box: Box) -> list[float]:
        values = self._pooled(image, box)
        for layer in (f"{kind}_fcs.0", f"{kind}_fcs.1", f"fc_{kind}"):
            weight, bias = (
                self.parameters[f"bbox_head.{stage}.{layer}.{part}"] for part in ("weight", "bias")
            )
            values = [
                sum(float(w) * x for w, x in zip(row, values, strict=True)) + float(b)
                for row, b in zip(weight, bias, strict=True)
            ]
            if not layer.startswith("fc_"):
                values = [max(x, 0.0) for x in values]
        return values

    def _pooled(self, image: int, box: Box) -> list[float]:
        """Channel by channel, row by row: one value from the middle of each cell."""
        level = math.floor(math.log2(math.sqrt(area(box)) / 56 + 1e-6))
        level = min(max(level, 0), 3)
        values = []
        for plane in self.maps[level][image]:
            for row in range(CELLS):
                for column in range(CELLS):
                    x = box[0] + (column + 0.5) * (box[2] - box[0]) / CELLS
                    y = box[1] + (row + 0.5) * (box[3] - box[1]) / CELLS
                    stride = STRIDES[level]
                    values.append(_read(plane, x / stride - 0.5, y / stride - 0.5))
        return values


def _read(plane: np.ndarray, x: float, y: float) -> float:
    """Bilinear; half a cell beyond the border has the border's value."""
    height, width = plane.shape
    x, y = min(max(x, 0.0), width - 1), min(max(y, 0.0), height - 1)
    left, top = min(int(x), width - 2), min(int(y), height - 2)
    right, low = x - left, y - top
    upper = plane[top, left] * (1 - right) + plane[top, left + 1] * right
    lower = plane[top + 1, left] * (1 - right) + plane[top + 1, left + 1] * right
    return float(upper * (1 - low) + lower * low)


def _match(image: int, box: Box) -> int:
    """Which object a region belongs to; -1 for none."""
    overlaps = [iou(box, other) for other in OBJECTS[image]]
    best = max(range(len(overlaps)), key=lambda i: overlaps[i])
    assert abs(overlaps[best] - 0.5) > MARGIN
    return best if overlaps[best] >= 0.5 else -1


def write_head_case(folder: Path) -> Path:
    inputs, proposals = _head_inputs()
    network = Network([inputs[f"feature/{name}"] for name in ("p2", "p3", "p4", "p5")])
    outputs = _training(network, proposals["cls"], proposals["reg"])
    for image, boxes in enumerate(proposals["test"]):
        outputs |= _test(network, image, boxes)
    for stage, stds in enumerate(STDS):
        rows = list(zip(*CODED.values(), strict=True))
        moved = [decoded(change, box, stds, SIZES[0]) for box, change, _ in rows]
        changes = [encoded(box, target, stds) for box, _, target in rows]
        outputs[f"coder/decoded/{stage}"] = np.array(moved)
        outputs[f"coder/encoded/{stage}"] = np.array(changes)
    config = {
        "classes": CLASSES,
        "channels": CHANNELS,
        "fc_out_channels": WIDTH,
        "roi_size": CELLS,
        "sampling_ratio": 1,
        "aligned": True,
        "featmap_strides": STRIDES,
        "stage_stds": STDS,
        "stage_loss_weights": STAGE_WEIGHTS,
        "pos_iou": 0.5,
        "cls_sample": 512,
        "cls_pos_fraction": 0.25,
        "reg_sample": 512,
        "batch": 2,
        "score_thr": THRESHOLD,
        "nms_iou": 0.5,
        "max_per_img": KEPT,
    }
    path = folder / "decoupled_rcnn_head_small.json"
    return write(path, "decoupled_rcnn_head", config, inputs, outputs, WEIGHTS)


def _head_inputs() -> tuple[dict[str, Any], dict[str, list[list[Box]]]]:
    inputs: dict[str, Any] = {
        "images_hw": {"value": [list(size) for size in SIZES]},
        "scale_factor": {"value": [1.25, 1.5, 1.25, 1.5]},
        "roi_feature": np.zeros((1, CHANNELS, CELLS, CELLS)),
    }
    for name, stride in zip(("p2", "p3", "p4", "p5"), STRIDES, strict=True):
        shape = (2, CHANNELS, PADDED[0] // stride, PADDED[1] // stride)
        inputs[f"feature/{name}"] = float32(draw(f"feature/{name}", shape, 1.5))
    inputs |= {f"coder/{name}": np.array(values) for name, values in CODED.items()}
    proposals: dict[str, list[list[Box]]] = {}
    for kind, copies in (("cls", 3), ("reg", 5), ("test", 4)):
        proposals[kind] = []
        for image, ((height, width), objects) in enumerate(zip(SIZES, OBJECTS, strict=True)):
            inputs[f"gt_boxes/{image}"] = {"value": objects}
            inputs[f"gt_labels/{image}"] = {"value": LABELS[image]}
            boxes = []
            for index, box in enumerate(objects * copies):
                shift = draw(f"{kind}/{image}/{index}", (4,), 0.12)
                sides = [box[2] - box[0], box[3] - box[1]] * 2
                boxes.append([a + side * b for a, side, b in zip(box, sides, shift, strict=True)])
            boxes.append([2.0, 2.0, 20.0, 30.0])  # far from every object
            array = np.array(boxes).clip(0, [width, height, width, height])
            proposals[kind].append(float32(array).tolist())
            inputs[f"proposals_{kind}/{image}"] = np.array(proposals[kind][-1])
    return inputs, proposals


def _training(
    network: Network, cls: Sequence[Sequence[Box]], reg: Sequence[Sequence[Box]]
) -> dict[str, np.ndarray]:
    """Losses, the gradients of the last layers' biases, and what each stage hands on."""
    outputs: dict[str, Any] = {}
    rows = [(i, box) for i in range(2) for box in [*OBJECTS[i], *cls[i]]]
    gradient, loss = [0.0] * (CLASSES + 1), 0.0
    for image, box in rows:
        logits, match = network.classes(image, box), _match(image, box)
        label = LABELS[image][match] if match >= 0 else CLASSES
        total = sum(math.exp(x) for x in logits)
        loss += (math.log(total) - logits[label]) / len(rows)
        for index, x in enumerate(logits):
            gradient[index] += (math.exp(x) / total - (index == label)) / len(rows)
    outputs["stage0/loss_cls"] = loss
    outputs["stage0/n_cls"] = len(rows)
    outputs["grad/bbox_head.0.fc_cls.bias"] = gradient
    total = loss
    boxes = [list(x) for x in reg]
    for stage in range(3):
        count = sum(map(len, boxes))
        divisor = 2 * count if stage else len(rows) + count
        raw, positives, refined = 0.0, 0, []
        gradient = [0.0] * (4 if stage else 4 * CLASSES)
        for image in range(2):
            matches = [_match(image, box) for box in boxes[image]]
            order = sorted(range(len(matches)), key=lambda i: matches[i] < 0)
            outputs[f"stage{stage}/pos_gt/reg/{image}"] = [
                matches[i] for i in order if matches[i] >= 0
            ]
            moved = []
            for box, match in ((boxes[image][i], matches[i]) for i in order):
                if match < 0:
                    moved.append(box)
                    continue
                label = LABELS[image][match]
                got = network.changes(stage, image, box, label)
                want = encoded(box, OBJECTS[image][match], STDS[stage])
                positives += 1
                for side in range(4):
                    raw += abs(got[side] - want[side]) / divisor
                    sign = 1 if got[side] > want[side] else -1
                    place = side if stage else 4 * label + side
                    gradient[place] += STAGE_WEIGHTS[stage] * sign / divisor
                moved.append(decoded(got, box, STDS[stage], SIZES[image]))
            refined.append(moved)
            if stage < 2:
                outputs[f"stage{stage}/refined/{image}"] = moved
        boxes = refined
        total += STAGE_WEIGHTS[stage] * raw
        outputs |= {
            f"stage{stage}/loss_bbox_raw": raw,
            f"stage{stage}/loss_bbox": STAGE_WEIGHTS[stage] * raw,
            f"stage{stage}/normalizer": divisor,
            f"stage{stage}/num_pos_reg": positives,
            f"grad/bbox_head.{stage}.fc_reg.bias": gradient,
        }
    outputs["total"] = total
    return {name: np.array(value) for name, value in outputs.items()}


def _test(network: Network, image: int, proposals: Sequence[Box]) -> dict[str, np.ndarray]:
    """Boxes and scores of all proposals, and the detections among them."""
    boxes, scores = [], []
    for box in proposals:
        logits = network.classes(image, box)
        total = sum(math.exp(x) for x in logits)
        scores.append([math.exp(x) / total for x in logits])
        likeliest = max(range(CLASSES), key=lambda i: logits[i])
        for stage in range(3):
            change = network.changes(stage, image, box, likeliest)
            box = decoded(change, box, STDS[stage], SIZES[image])
        boxes.append([value / scale for value, scale in zip(box, (1.25, 1.5) * 2, strict=True)])
    found = []
    for label in range(CLASSES):
        above = [i for i in range(len(boxes)) if scores[i][label] > THRESHOLD]
        values = [scores[i][label] for i in above]
        for index in suppressed([boxes[i] for i in above], values, 0.5):
            found.append((values[index], label, boxes[above[index]]))
    found = sorted(found, key=lambda x: -x[0])[:KEPT]
    assert len(found) > 2
    return {
        f"test/boxes/{image}": np.array(boxes),
        f"test/scores/{image}": np.array(scores),
        f"test/det_boxes/{image}": np.array([[*box, score] for score, _, box in found]),
        f"test/det_labels/{image}": np.array([label for _, label, _ in found]),
    }
