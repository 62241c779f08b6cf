# SPDX-License-Identifier: Apache-2.0
"""ATSS's assignment and GFL's losses by plain loops: no torch, nothing of the package.

Boxes are (x1, y1, x2, y2) in pixels; a cell stands for its corner, and its anchor has sides of 8
strides. Sides are left, top, right, bottom.
"""

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

Box = Sequence[float]
Size = tuple[int, int]

NONE, UNUSED = -1, -2
MARGIN = 1e-4  # nothing is nearer to a tie or a threshold, so rounding cannot decide


class Cell(NamedTuple):
    """Where a prediction is made."""

    x: float
    y: float
    stride: int
    level: int

    @property
    def anchor(self) -> Box:
        half = 4 * self.stride
        return [self.x - half, self.y - half, self.x + half, self.y + half]

    def sides(self, box: Box) -> list[float]:
        return [self.x - box[0], self.y - box[1], box[2] - self.x, box[3] - self.y]

    def box(self, sides: Sequence[float]) -> Box:
        left, top, right, bottom = (side * self.stride for side in sides)
        return [self.x - left, self.y - top, self.x + right, self.y + bottom]


def cells_of(sizes: Sequence[Size], strides: Sequence[int]) -> list[Cell]:
    """Levels one after the other, rows from top to bottom; ``sizes`` are (rows, columns)."""
    return [
        Cell(column * stride, row * stride, stride, level)
        for level, ((rows, columns), stride) in enumerate(zip(sizes, strides, strict=True))
        for row in range(rows)
        for column in range(columns)
    ]


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _common(a: Box, b: Box) -> float:
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    return max(width, 0.0) * max(height, 0.0)


def iou(a: Box, b: Box) -> float:
    return _common(a, b) / (_area(a) + _area(b) - _common(a, b))


def giou_cost(a: Box, b: Box) -> float:
    union = _area(a) + _area(b) - _common(a, b)
    hull = _area([min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])])
    return 1 - (iou(a, b) - (hull - union) / hull)


class Assignment(NamedTuple):
    """Whose each cell is, and the threshold of each object."""

    objects: list[int]
    thresholds: list[float]


def assign(cells: Sequence[Cell], boxes: Sequence[Box], padded: Size, topk: int = 9) -> Assignment:
    """ATSS on an image that is ``padded`` to (height, width) alone."""
    owners = [NONE if cell.y < padded[0] and cell.x < padded[1] else UNUSED for cell in cells]
    best = [-1.0] * len(cells)
    thresholds = []
    for number, box in enumerate(boxes):
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        candidates: list[int] = []
        for level in range(max(cell.level for cell in cells) + 1):
            own = [
                (math.dist((cell.x, cell.y), middle), index)
                for index, cell in enumerate(cells)
                if cell.level == level and owners[index] != UNUSED
            ]
            own.sort()
            assert all(
                b[0] - a[0] > MARGIN
                for a, b in zip(own[topk - 1 :], own[topk : topk + 1], strict=False)
            )
            candidates += [index for _, index in own[:topk]]
        overlaps = [iou(cells[index].anchor, box) for index in candidates]
        thresholds.append(mean(overlaps) + stdev(overlaps))
        for index, overlap in zip(candidates, overlaps, strict=True):
            assert abs(overlap - thresholds[-1]) > MARGIN
            inside = min(cells[index].sides(box)) > 0.01
            if overlap >= thresholds[-1] and inside and overlap > best[index]:
                best[index], owners[index] = overlap, number
    return Assignment(owners, thresholds)


# Losses, a number at a time.


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def softmax(logits: Sequence[float]) -> list[float]:
    weights = [math.exp(x) for x in logits]
    return [x / sum(weights) for x in weights]


def distance(logits: Sequence[float]) -> float:
    """The mean of a distribution, in strides."""
    return sum(index * share for index, share in enumerate(softmax(logits)))


def quality_cost(score: float, target: float, beta: float = 2.0) -> float:
    cross = -target * math.log(score) - (1 - target) * math.log(1 - score)
    return abs(target - score) ** beta * cross


def quality_slope(score: float, target: float) -> float:
    """Derivative of :func:`quality_cost`, beta 2, by the logit of the score."""
    cross = quality_cost(score, target, 0.0)
    wrong = score - target
    return 2 * wrong * score * (1 - score) * cross + wrong**3


def distribution_cost(logits: Sequence[float], side: float) -> float:
    """Of one side, whose distance is counted in strides."""
    side = min(max(side, 0.0), len(logits) - 1.1)
    lower = math.floor(side)
    shares = softmax(logits)
    below, above = math.log(shares[lower]), math.log(shares[lower + 1])
    return -(lower + 1 - side) * below - (side - lower) * above
