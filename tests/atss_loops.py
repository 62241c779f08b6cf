# SPDX-License-Identifier: Apache-2.0
"""ATSS's assignment by plain loops, ties included, and the scenes it is compared on."""

import math
import random
from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

import torch
from detectron2.structures import Instances
from util import make_instances

from d2_decouple.layers.points import make_grid, squares
from d2_decouple.modeling import ATSSAssigner
from d2_decouple.structures import DensePredictions, DenseTargets

K = 4  # classes, so 4 is background
STRIDES = [8, 16, 32, 64, 128]
NONE, IGNORED = -1, -2

Box = Sequence[float]
Size = tuple[int, int]


class Cell(NamedTuple):
    """Where a prediction is made: pixels, and the cell's indices on its level."""

    level: int
    stride: int
    column: int
    row: int
    x: float
    y: float

    @property
    def anchor(self) -> Box:
        half = 4 * self.stride
        return [self.x - half, self.y - half, self.x + half, self.y + half]


def cells_of(sizes: Sequence[Size], strides: Sequence[int], offset: float) -> list[Cell]:
    return [
        Cell(level, stride, j, i, (j + offset) * stride, (i + offset) * stride)
        for level, ((height, width), stride) in enumerate(zip(sizes, strides, strict=True))
        for i in range(height)
        for j in range(width)
    ]


def overlap(a: Box, b: Box) -> float:
    common = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - common
    return common / union if common else 0.0


def nearest(cells: Sequence[Cell], own: Sequence[int], box: Box, topk: int) -> list[int]:
    """The candidates of a box among the cells ``own``, the ``topk`` nearest of each level.

    Of equally near ones the first.
    """
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    chosen: list[int] = []
    for level in sorted({cell.level for cell in cells}):
        # Squares: roots would make equal what is not.
        distances = [
            ((cells[k].x - x) ** 2 + (cells[k].y - y) ** 2, k)
            for k in own
            if cells[k].level == level
        ]
        chosen += [k for _, k in sorted(distances)[:topk]]
    return chosen


class Matches(NamedTuple):
    """Of one image: the object of each cell, NONE or IGNORED; each object's threshold; cells where
    rounding decides."""

    objects: list[int]
    thresholds: list[float]
    doubtful: set[int]


def match(
    cells: Sequence[Cell], boxes: Sequence[Box], size: Size, topk: int = 9, divisor: int = 32
) -> Matches:
    """An image of ``size`` (H, W), padded to a multiple of ``divisor``."""
    height, width = (math.ceil(side / divisor) * divisor for side in size)
    own = [
        k
        for k, cell in enumerate(cells)
        if cell.column * cell.stride < width and cell.row * cell.stride < height
    ]
    objects = [IGNORED] * len(cells)
    for k in own:
        objects[k] = NONE
    best = [-1.0] * len(cells)
    thresholds, doubtful = [], set()
    for number, box in enumerate(boxes):
        candidates = nearest(cells, own, box, topk)
        overlaps = [overlap(cells[k].anchor, box) for k in candidates]
        spread = stdev(overlaps) if len(overlaps) > 1 else 0.0
        thresholds.append(mean(overlaps) + spread)
        for k, value in zip(candidates, overlaps, strict=True):
            x, y = cells[k].x, cells[k].y
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if inside and len(candidates) > 1 and abs(value - thresholds[-1]) < 1e-6:
                doubtful.add(k)
            if inside and value >= thresholds[-1] and value > best[k]:
                best[k], objects[k] = value, number
    return Matches(objects, thresholds, doubtful)


# Scenes.


def pyramid_sizes(height: int, width: int, strides: Sequence[int] = STRIDES) -> list[Size]:
    return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in strides]


def predictions_of(
    sizes: Sequence[Size],
    strides: Sequence[int],
    images: int,
    *,
    offset: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> DensePredictions:
    """Anchors and nothing else."""
    grid = make_grid(sizes, strides, offset, device=torch.device("cpu"), dtype=dtype)
    count = len(grid.locations)
    return DensePredictions(
        logits=torch.zeros(images, count, K, dtype=dtype),
        boxes=torch.zeros(images, count, 4, dtype=dtype),
        quality=None,
        locations=grid.locations,
        strides=grid.strides,
        priors=squares(grid.locations, 8 * grid.strides),
        level_sizes=grid.level_sizes,
        extras={},
    )


def assign(
    assigner: ATSSAssigner,
    sizes: Sequence[Size],
    strides: Sequence[int],
    truth: list[Instances],
    **geometry: object,
) -> DenseTargets:
    predictions = predictions_of(sizes, strides, len(truth), **geometry)  # type: ignore[arg-type]
    return assigner([torch.zeros(len(truth), 0, *size) for size in sizes], predictions, truth)


def random_boxes(draw: random.Random, height: int, width: int, most: int = 14) -> list[Box]:
    """Boxes of all sorts with coordinates in quarters: equal distances and overlaps do happen."""
    boxes: list[Box] = []
    for _ in range(draw.randrange(most)):
        kind = draw.choice(["ordinary", "tiny", "centred", "beyond", "outside", "huge", "twin"])
        x, y = draw.uniform(0, width), draw.uniform(0, height)
        half = [draw.uniform(4, 60) for _ in range(2)]
        if kind == "tiny":  # between the cells, or without an area
            half = [draw.choice([0, 0.25, 1, 3]) for _ in range(2)]
        elif kind == "centred":  # as far from several cells
            x, y = 4 * draw.randrange(width // 4), 4 * draw.randrange(height // 4)
            half = [draw.choice([8, 16, 24, 32, 64])] * 2
        elif kind == "beyond":
            half = [draw.uniform(60, 400) for _ in range(2)]
        elif kind == "outside":
            x, y = draw.choice([-1, 1]) * width * 1.5, draw.choice([-0.5, 1.5]) * height
        elif kind == "huge":
            half = [draw.uniform(500, 3000) for _ in range(2)]
        if kind == "twin" and boxes:
            boxes.append(draw.choice(boxes))
            continue
        box = [x - half[0], y - half[1], x + half[0], y + half[1]]
        boxes.append([round(4 * value) / 4 for value in box])
    return boxes


class Scene(NamedTuple):
    """A batch: the padded size and what is in each image."""

    padded: Size
    images: list[tuple[Size, list[Box]]]

    def truth(self) -> list[Instances]:
        return [
            make_instances(size, boxes, [k % K for k in range(len(boxes))])
            for size, boxes in self.images
        ]


def random_scene(seed: int) -> Scene:
    """Images of several sizes in one batch, as large as the largest of each side."""
    draw = random.Random(seed)
    sizes = [(draw.randint(1, 150), draw.randint(1, 200)) for _ in range(draw.choice([1, 2, 3]))]
    padded = tuple(math.ceil(max(sides) / 32) * 32 for sides in zip(*sizes, strict=True))
    images = [(size, random_boxes(draw, max(size[0], 4), max(size[1], 4))) for size in sizes]
    return Scene((padded[0], padded[1]), images)
