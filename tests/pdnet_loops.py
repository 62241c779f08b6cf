# SPDX-License-Identifier: Apache-2.0
"""PDNet by plain loops over cells, points and boxes: what the package's PDNet is judged by.

Nothing of the package is imported. Boxes are (x1, y1, x2, y2), points (x, y), sides left, top,
right, bottom; *cells* are those of the own level, an integer being the centre of a cell.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Box = Sequence[float]
Point = tuple[float, float]
Map = np.ndarray  # (channels, H, W)

NONE, IGNORED = -1, -2


# The head.


def read(plane: np.ndarray, x: float, y: float) -> float:
    """Bilinear value of a (H, W) plane at a point, zero outside."""
    height, width = plane.shape
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                total += plane[row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def lattice(count: int) -> list[Point]:
    """Where the priors of the semantic points lie, in shares of the coarse box.

    Rows from top to bottom. Square numbers fill the box evenly; 5 and 13 are the dots of a
    quincunx, which has a short row between every two long ones.
    """
    half, third = 1 / 2, 1 / 3
    columns = {
        1: {half: [half]},
        5: {0: [0, 1], half: [half], 1: [0, 1]},
        9: {0: [0, half, 1], half: [0, half, 1], 1: [0, half, 1]},
        13: {
            0: [0, half, 1],
            1 / 4: [1 / 4, 3 / 4],
            half: [0, half, 1],
            3 / 4: [1 / 4, 3 / 4],
            1: [0, half, 1],
        },
        16: {y: [0, third, 2 * third, 1] for y in (0, third, 2 * third, 1)},
    }[count]
    return [(x, y) for y, row in columns.items() for x in row]


def limited(slide: float, side: float, limit: float) -> float:
    """A slide along a side of this length; a negative length turns its sign."""
    most = limit * side / 2
    return slide - (max(slide - most, 0.0) + min(slide + most, 0.0))


def points_of(kind: str, count: int, cell: Point, box: Box, raw: Sequence[float]) -> list[Point]:
    """The points of a cell whose (detached) coarse box is ``box``; ``raw`` are its offsets."""
    x1, y1, x2, y2 = box
    middle = ((x1 + x2) / 2, (y1 + y2) / 2)
    if kind == "grid":
        return [cell] * count
    if kind == "grid_offset":
        return [(cell[0] + raw[2 * i], cell[1] + raw[2 * i + 1]) for i in range(count)]
    if kind == "semantic":
        return [
            (x1 + across * (x2 - x1) + raw[2 * i], y1 + down * (y2 - y1) + raw[2 * i + 1])
            for i, (across, down) in enumerate(lattice(count))
        ]
    slides = [0.0] * 4
    if kind == "boundary":
        sides = [y2 - y1, x2 - x1] * 2
        slides = [limited(slide, side, 1.5) for slide, side in zip(raw, sides, strict=True)]
    return [
        (x1, middle[1] + slides[0]),
        (middle[0] + slides[1], y1),
        (x2, middle[1] + slides[2]),
        (middle[0] + slides[3], y2),
    ]


class Level(NamedTuple):
    """The raw maps of one level and image."""

    points: Map  # what the 3x3 convolution gives
    values: Map  # (4, H, W)
    classes: Map  # (P * K, H, W)


class Kinds(NamedTuple):
    """The switches."""

    box: str = "boundary"
    cls: str = "semantic"
    num_points: int = 9
    box_levels: tuple[int, ...] = (-1, 0)

    @property
    def box_outputs(self) -> int:
        return {"grid": 0, "midpoints": 0, "boundary": 4, "grid_offset": 8}[self.box]

    @property
    def class_outputs(self) -> int:
        return 0 if self.cls == "grid" else 2 * self.num_points


def predict(levels: Sequence[Level], kinds: Kinds, num_classes: int) -> list[dict[str, Any]]:
    """What each cell predicts, levels one after the other, in cells of its own level."""
    found = []
    for index, level in enumerate(levels):
        height, width = level.values.shape[1:]
        for row in range(height):
            for column in range(width):
                raw = level.points[:, row, column].tolist()
                found.append(_predict_cell(levels, index, (column, row), raw, kinds, num_classes))
    return found


def _predict_cell(
    levels: Sequence[Level],
    index: int,
    cell: Point,
    raw: Sequence[float],
    kinds: Kinds,
    num_classes: int,
) -> dict[str, Any]:
    prior = (cell[0] - 2, cell[1] - 2, cell[0] + 2, cell[1] + 2)
    coarse = [a + b for a, b in zip(prior, raw[:4], strict=True)]
    first = 4 + kinds.box_outputs
    second = first + kinds.class_outputs
    sides = points_of(kinds.box, 4, cell, coarse, raw[4:first])
    semantic = points_of(kinds.cls, kinds.num_points, cell, coarse, raw[first:second])
    logits_of_levels = raw[second:] or [0.0] * 4
    count = len(kinds.box_levels)
    box, weights = [], []
    for side, (x, y) in enumerate(sides):
        own = logits_of_levels[side * count : (side + 1) * count]
        shares = level_shares(own, index, kinds.box_levels, len(levels))
        weights.append(shares)
        box.append(
            coarse[side]
            + sum(
                # A cell of another level is 2^step of the own ones.
                share * 2.0**step * read(levels[at].values[side], x / 2**step, y / 2**step)
                for at, share in enumerate(shares)
                for step in [at - index]
                if share
            )
        )
    classes = levels[index].classes
    assert len(classes) == kinds.num_points * num_classes
    logits = [
        sum(
            read(classes[point * num_classes + label], x, y)
            for point, (x, y) in enumerate(semantic)
        )
        for label in range(num_classes)
    ]
    return {
        "coarse": coarse,
        "box": box,
        "logits": logits,
        "sides": sides,
        "semantic": semantic,
        "weights": weights,
    }


def level_shares(
    logits: Sequence[float], own: int, steps: Sequence[int], count: int
) -> list[float]:
    """Share of each level in a side's value: a softmax over those that exist, else the own."""
    powers = {
        own + step: math.exp(logit)
        for logit, step in zip(logits, steps, strict=True)
        if 0 <= own + step < count
    } or {own: 1.0}
    return [powers.get(level, 0.0) / sum(powers.values()) for level in range(count)]


# The assignment.


class Cell(NamedTuple):
    """One location: its level's stride and its indices."""

    stride: int
    x: int
    y: int


def cells_of(sizes: Sequence[tuple[int, int]], strides: Sequence[int]) -> list[Cell]:
    """All cells of maps with the given (H, W) sizes."""
    return [
        Cell(stride, x, y)
        for (height, width), stride in zip(sizes, strides, strict=True)
        for y in range(height)
        for x in range(width)
    ]


def inside(cell: Cell, size: tuple[int, int], divisor: int = 32) -> bool:
    """Whether a cell lies in an image of this (H, W), rounded up to ``divisor`` pixels."""
    height, width = (math.ceil(side / divisor) * divisor for side in size)
    return cell.x * cell.stride < width and cell.y * cell.stride < height


def own_level(box: Box, side: float) -> int:
    """3 for objects below 64 pixels, 4 below 128, 5 below 256, 6 below 512, else 7."""
    area = (box[2] - box[0] + side) * (box[3] - box[1] + side)
    return min(max(int(math.log2(math.sqrt(area)) - 2), 3), 7) if area > 0 else 3


def overlap(a: Box, b: Box, side: float) -> float:
    """IoU of boxes whose sides are ``side`` longer than their coordinates say."""
    shared = max(min(a[2], b[2]) - max(a[0], b[0]) + side, 0)
    shared *= max(min(a[3], b[3]) - max(a[1], b[1]) + side, 0)
    areas = [(x[2] - x[0] + side) * (x[3] - x[1] + side) for x in (a, b)]
    return shared / (areas[0] + areas[1] - shared) if shared else 0.0


def coarse_matches(
    cells: Sequence[Cell], objects: Sequence[Box], size: tuple[int, int], side: float
) -> list[int]:
    """Index of the object that each cell's coarse box learns, NONE or IGNORED."""
    matched = []
    for cell in cells:
        best, least = NONE, math.inf
        for index, box in enumerate(objects):
            dx = cell.x - (box[0] + box[2]) / 2 / cell.stride
            dy = cell.y - (box[1] + box[3]) / 2 / cell.stride
            if 2 ** own_level(box, side) != cell.stride or max(abs(dx), abs(dy)) > 0.5:
                continue
            width, height = (max(box[i + 2] - box[i] + side, 1e-6) for i in (0, 1))
            distance = math.hypot(dx * cell.stride / width, dy * cell.stride / height)
            if distance < least:
                best, least = index, distance
        matched.append(best if inside(cell, size) else IGNORED)
    return matched


def final_matches(
    cells: Sequence[Cell],
    boxes: Sequence[Box],
    objects: Sequence[Box],
    size: tuple[int, int],
    *,
    side: float,
    threshold: float = 0.6,
) -> list[int]:
    """Index of the object that each cell's final box and class learn, NONE or IGNORED.

    ``boxes`` are the coarse boxes in pixels, one of each cell.
    """
    table = [
        [-1.0 if box[2] < box[0] or box[3] < box[1] else overlap(box, x, side) for x in objects]
        for box in boxes
    ]
    greatest = [max(row[index] for row in table) for index in range(len(objects))]
    matched = []
    for cell, row in zip(cells, table, strict=True):
        if not inside(cell, size):
            matched.append(IGNORED)
            continue
        whose_best = [i for i, value in enumerate(row) if value == greatest[i] > 0]
        candidates = whose_best or [i for i, value in enumerate(row) if value >= threshold]
        matched.append(max(candidates, key=lambda i: row[i], default=NONE))
    return matched


def giou_cost(box: Box, target: Box, smoothing: float = 1.0) -> float:
    """1 - GIoU with the overlap smoothed; an inverted box costs 1."""
    if box[2] < box[0] or box[3] < box[1]:
        return 1.0
    shared = overlap_area(box, target)
    union = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (box, target)) - shared
    hull = (max(box[2], target[2]) - min(box[0], target[0])) * (
        max(box[3], target[3]) - min(box[1], target[1])
    ) + 1e-7 * smoothing
    return 1 - ((shared + smoothing) / (union + smoothing) - (hull - union) / hull)


def overlap_area(a: Box, b: Box) -> float:
    """What two boxes share."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    return max(width, 0) * max(height, 0)


def focal_cost(logits: Sequence[float], label: int) -> float:
    """Focal loss (alpha 0.25, gamma 2) of one location's logits; ``label`` may be none of them."""
    total = 0.0
    for index, logit in enumerate(logits):
        probability = 1 / (1 + math.exp(-logit))
        if index == label:
            total -= 0.25 * (1 - probability) ** 2 * math.log(probability)
        else:
            total -= 0.75 * probability**2 * math.log(1 - probability)
    return total
