# SPDX-License-Identifier: Apache-2.0
"""Scenes for PDNet's assignment and losses: predictions, ground truth, what was matched."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from pdnet_parts import STRIDES
from torch import Tensor

from d2_decouple.layers.points import make_grid, squares
from d2_decouple.modeling import PDNetAssigner
from d2_decouple.structures import DensePredictions, DenseTargets, foreground

K = 4  # classes, so 4 is background
FAR = [-5000.0, -5000.0, -4900.0, -4900.0]  # a coarse box that overlaps nothing

Size = tuple[int, int]


def level_sizes(padded: Size) -> list[Size]:
    """Of P3 to P7: the last two are halves, rounded up."""
    sizes = [(padded[0] // stride, padded[1] // stride) for stride in STRIDES[:3]]
    for _ in range(2):
        height, width = sizes[-1]
        sizes.append(((height + 1) // 2, (width + 1) // 2))
    return sizes


def predictions_of(
    padded: Size, coarse: Tensor | None = None, images: int = 1, dtype: torch.dtype = torch.float32
) -> DensePredictions:
    """Coarse boxes (N, R, 4) in pixels, by default the priors, which are the final ones, too."""
    grid = make_grid(level_sizes(padded), STRIDES, 0.0, device=torch.device("cpu"), dtype=dtype)
    priors = squares(grid.locations, 4 * grid.strides)
    boxes = priors.repeat(images, 1, 1) if coarse is None else coarse.to(dtype)
    return DensePredictions(
        logits=boxes.new_full((*boxes.shape[:2], K), -4.595),
        boxes=boxes,
        quality=None,
        locations=grid.locations,
        strides=grid.strides,
        priors=priors,
        level_sizes=grid.level_sizes,
        extras={"coarse_boxes": boxes},
    )


def instances(
    size: Size, boxes: Sequence[Sequence[float]], classes: Sequence[int] | None = None
) -> Instances:
    numbers = [0] * len(boxes) if classes is None else list(classes)
    return Instances(
        size,
        gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        gt_classes=torch.tensor(numbers, dtype=torch.int64),
    )


def assign(
    padded: Size,
    truth: Sequence[Instances],
    coarse: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> DenseTargets:
    predictions = predictions_of(padded, coarse, len(truth), dtype)
    features = [torch.zeros(len(truth), 0, *size) for size in level_sizes(padded)]
    return PDNetAssigner(num_classes=K, **settings)(features, predictions, truth)


def positives(targets: DenseTargets, image: int = 0) -> dict[int, int]:
    """Location -> index of its object, of one image."""
    index = targets.extras["gt_index"][image].tolist()
    where = foreground(targets.labels[image], K).nonzero()[:, 0].tolist()
    return {location: index[location] for location in where}


def start(padded: Size, level: int) -> int:
    """Index of a level's first location."""
    return sum(height * width for height, width in level_sizes(padded)[:level])


def coarse_of(padded: Size, boxes: dict[int, Sequence[float]]) -> Tensor:
    """Coarse boxes that overlap nothing, but for those named by location."""
    count = start(padded, len(STRIDES))
    rows = torch.tensor([FAR]).repeat(count, 1)
    for location, box in boxes.items():
        rows[location] = torch.tensor(box)
    return rows[None]
