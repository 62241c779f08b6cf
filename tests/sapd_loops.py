# SPDX-License-Identifier: Apache-2.0
"""SAPD's assignment and losses by plain loops over objects, levels and cells, in Python's floats.

From its fact sheet's sections 2 to 4. Nothing is in tensors; a location is (level, column, row).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Box = Sequence[float]
Cell = tuple[int, int, int]


def focal(logit: float, positive: bool, alpha: float = 0.25, gamma: float = 2.0) -> float:
    p = 1 / (1 + math.exp(-logit))
    if positive:
        return -alpha * (1 - p) ** gamma * math.log(p)
    return -(1 - alpha) * p**gamma * math.log(1 - p)


def iou(a: Box, b: Box) -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [max(x[2] - x[0], 0) * max(x[3] - x[1], 0) for x in (a, b)]
    return width * height / max(sum(areas) - width * height, 1e-6)


def iou_cost(a: Box, b: Box) -> float:
    return -math.log(max(iou(a, b), 1e-6))


def shrunk(box: Box, share: float) -> Box:
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    w, h = (box[2] - box[0]) * share / 2, (box[3] - box[1]) * share / 2
    return x - w, y - h, x + w, y + h


def closeness(point: tuple[float, float], box: Box, exponent: float) -> float:
    left, right = max(point[0] - box[0], 0), max(box[2] - point[0], 0)
    top, bottom = max(point[1] - box[1], 0), max(box[3] - point[1], 0)
    if not (max(left, right) > 0 and max(top, bottom) > 0):
        return 0.0
    x = min(left, right) / max(left, right)
    y = min(top, bottom) / max(top, bottom)
    return (x * y) ** exponent


@dataclass
class Pyramid:
    """Strides and (H, W) of the levels."""

    strides: Sequence[int]
    sizes: Sequence[tuple[int, int]]

    def cells(self, level: int) -> list[Cell]:
        height, width = self.sizes[level]
        return [(level, x, y) for y in range(height) for x in range(width)]

    def point(self, cell: Cell) -> tuple[float, float]:
        level, x, y = cell
        return (x + 0.5) * self.strides[level], (y + 0.5) * self.strides[level]

    def row(self, cell: Cell) -> int:
        level, x, y = cell
        before = sum(h * w for h, w in self.sizes[:level])
        return before + y * self.sizes[level][1] + x

    def inside(self, cell: Cell, region: Box, rule: str) -> bool:
        if rule == "center":
            x, y = self.point(cell)
            return region[0] <= x <= region[2] and region[1] <= y <= region[3]
        stride = self.strides[cell[0]]
        spans = zip(cell[1:], region[:2], region[2:], strict=True)
        return all(math.floor(a / stride) <= i < math.ceil(b / stride) for i, a, b in spans)

    def region(self, box: Box, level: int, share: float, rule: str) -> list[Cell]:
        region = shrunk(box, share)
        return [cell for cell in self.cells(level) if self.inside(cell, region, rule)]

    def valid(self, box: Box, level: int, share: float, rule: str) -> list[Cell]:
        """Never empty: else the cell that the middle lies in, or the nearest one on the map."""
        cells = self.region(box, level, share, rule)
        if cells:
            return cells
        stride, (height, width) = self.strides[level], self.sizes[level]
        x = math.floor((box[0] + box[2]) / 2 / stride)
        y = math.floor((box[1] + box[3]) / 2 / stride)
        return [(level, min(max(x, 0), width - 1), min(max(y, 0), height - 1))]


@dataclass
class Answer:
    """What one image's locations learn; ``weights`` (R, K) and ``box_weights`` (R,)."""

    labels: list[int]
    boxes: list[Box]
    index: list[int]
    weights: list[list[float]]
    box_weights: list[float]
    best: list[int] = field(default_factory=list)
    level_weights: list[list[float]] = field(default_factory=list)


def level_costs(
    pyramid: Pyramid, logits: Any, boxes: Any, box: Box, label: int, options: Any
) -> list[float]:
    """The mean loss of the object on each level."""
    costs = []
    for level in range(len(pyramid.strides)):
        total, cells = 0.0, pyramid.valid(box, level, options.shrink, options.positive_rule)
        for cell in cells:
            row = pyramid.row(cell)
            total += sum(focal(z, k == label) for k, z in enumerate(logits[row]))
            total += iou_cost(boxes[row], box)
        costs.append(total / len(cells))
    return costs


def assign_image(
    pyramid: Pyramid,
    logits: Any,
    boxes: Any,
    objects: Sequence[tuple[Box, int]],
    options: Any,
    probabilities: Any,
    soft: bool,
) -> Answer:
    """``probabilities``: of each object, of each level; looked at only if ``soft``."""
    rows, classes = len(logits), len(logits[0])
    answer = Answer(
        labels=[classes] * rows,
        boxes=[(0.0, 0.0, 0.0, 0.0)] * rows,
        index=[-1] * rows,
        weights=[[1.0] * classes for _ in range(rows)],
        box_weights=[0.0] * rows,
    )
    kept = []
    for number, (box, label) in enumerate(objects):
        costs = level_costs(pyramid, logits, boxes, box, label, options)
        order = sorted(range(len(costs)), key=lambda level, costs=costs: (costs[level], level))
        levels = order[: options.top_k] if soft else order[:1]
        weights = [probabilities[number][x] if soft else 1.0 for x in range(len(costs))]
        weights = [w if level in levels else 0.0 for level, w in enumerate(weights)]
        if soft and options.renormalize_levels:
            weights = [w / sum(weights) for w in weights]
        answer.best.append(order[0])
        answer.level_weights.append(weights)
        kept.append(levels)

    # The largest first: smaller ones overwrite, and of equal ones the first in the list stays.
    def area(number: int) -> float:
        box = objects[number][0]
        return (box[2] - box[0]) * (box[3] - box[1])

    for number in sorted(range(len(objects)), key=lambda n: (-area(n), -n)):
        box, label = objects[number]
        for level in kept[number]:
            for cell in pyramid.valid(box, level, options.shrink, options.positive_rule):
                row = pyramid.row(cell)
                weight = answer.level_weights[number][level]
                if options.use_soft_weights:
                    weight *= closeness(pyramid.point(cell), box, options.exponent)
                answer.labels[row], answer.boxes[row], answer.index[row] = label, box, number
                answer.weights[row] = [weight] * classes
                answer.box_weights[row] = weight

    for number, (box, label) in enumerate(objects):
        for level in range(len(pyramid.strides)):
            valid = pyramid.valid(box, level, options.shrink, options.positive_rule)
            for cell in valid if level not in kept[number] else []:
                row = pyramid.row(cell)
                if options.unselected == "ignore_class" and answer.labels[row] != label:
                    answer.weights[row][label] = 0.0
                if options.unselected == "ignore_all" and answer.index[row] < 0:
                    answer.labels[row] = -1
            if options.ignore_scale is None or not {level - 1, level, level + 1} & {*kept[number]}:
                continue
            for cell in pyramid.region(box, level, options.ignore_scale, options.positive_rule):
                row = pyramid.row(cell)
                if cell not in valid and answer.labels[row] != label:
                    answer.weights[row][label] = 0.0
    return answer


def losses(logits: Any, boxes: Any, answers: Sequence[Answer]) -> tuple[float, float]:
    """Class and box loss of a batch (Eq. 6)."""
    total = max(sum(sum(answer.box_weights) for answer in answers), 1.0)
    cls, box = 0.0, 0.0
    for image, answer in enumerate(answers):
        for row, label in enumerate(answer.labels):
            if label < 0:
                continue
            for k, z in enumerate(logits[image][row]):
                cls += answer.weights[row][k] * focal(z, k == label)
            box += answer.box_weights[row] * (
                iou_cost(boxes[image][row], answer.boxes[row]) if answer.box_weights[row] else 0
            )
    return cls / total, box / total
