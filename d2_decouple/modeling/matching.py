# SPDX-License-Identifier: Apache-2.0
"""What assigners share: the levels they look at, and turning matches into targets."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.points import grid_cells
from ..structures import DensePredictions, GroundTruth

__all__ = [
    "BestOverlaps",
    "CentralCells",
    "Levels",
    "best_overlaps",
    "central_cells",
    "claimed_index",
    "index_in_batch",
    "index_in_image",
    "matched_truth",
    "objects_at_once",
    "read_levels",
]

_PAIRS = 2**21  # of an object and a box that are compared at once
_MIN_AREA = 1e-6  # floor of unions, in square pixels


class Levels(NamedTuple):
    """The levels of a pyramid as tensors, so that all ground truth is matched at once.

    Attributes:
        origin: (L, 2) pixels (x, y) of the first cell's reference point.
        stride: (L, 1) pixels per cell.
        extent: (L, 2) cells in x and in y.
        start: (L, 1) index of the level's first prediction.
    """

    origin: Tensor
    stride: Tensor
    extent: Tensor
    start: Tensor


def read_levels(predictions: DensePredictions, sizes: Sequence[tuple[int, int]]) -> Levels:
    """The levels of ``predictions``, whose maps have the given (H, W) ``sizes``.

    Raises:
        ValueError: there is not exactly one prediction per cell.
    """
    starts = [0, *accumulate(predictions.level_sizes)]
    if [height * width for height, width in sizes] != list(predictions.level_sizes):
        raise ValueError(
            f"features of {sizes} cells do not fit predictions of {predictions.level_sizes} per "
            "level; this assigner wants exactly one prediction per cell"
        )
    device = predictions.locations.device
    return Levels(
        origin=torch.stack([predictions.locations[start] for start in starts[:-1]]),
        stride=torch.stack([predictions.strides[start] for start in starts[:-1]])[:, None],
        extent=_sent([(width, height) for height, width in sizes], device),
        start=_sent(starts[:-1], device)[:, None],
    )


def _sent(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """Integers as a tensor on the device, without waiting for it."""
    return torch.tensor(numbers, dtype=torch.long).to(device, non_blocking=True)


class CentralCells(NamedTuple):
    """The cells that can lie in the central region of each of a batch's G boxes.

    Attributes:
        cells: (G, L, S, 2) whole numbers (x, y), also beyond a level's ends.
        locations: (G, L, S, 2) their reference points (x, y) in pixels.
        near: (G, L, S) whether they lie less than the radius from the middle, in x and in y.
    """

    cells: Tensor
    locations: Tensor
    near: Tensor


def central_cells(boxes: Tensor, levels: Levels, radius: float) -> CentralCells:
    """All cells within ``radius`` strides of the middles of (G, 4) xyxy boxes, and a few more."""
    middle = ((boxes[:, :2] + boxes[:, 2:]) / 2)[:, None, None]  # (G, 1, 1, 2)
    at = (middle[:, :, 0] - levels.origin) / levels.stride  # (G, L, 2) cells
    count = math.ceil(2 * radius) + 2  # one to spare at either end, against rounding
    steps = grid_cells((count, count), device=at.device, dtype=at.dtype)
    cells = (at - radius).floor()[:, :, None] + steps
    locations = levels.origin[:, None] + cells * levels.stride[:, None]
    near = ((locations - middle).abs() < radius * levels.stride[:, None]).all(-1)
    return CentralCells(cells, locations, near)


def claimed_index(
    cells: Tensor, claim: Tensor, levels: Levels, image_index: Tensor, shape: tuple[int, int]
) -> Tensor:
    """(G, ...) indices among the N * R predictions, N * R where a cell is not claimed.

    Args:
        cells: (G, ..., 2) whole numbers (x, y); those that their level does not have are nobody's.
        claim: (G, ...) whether the box of the batch wants that cell.
        levels: all of them, for cells (G, L, S, 2), or one for each box, for cells (G, S, 2).
        image_index: (G,) image of each box.
        shape: N images and R predictions of one.
    """
    extent = levels.extent[:, None]
    claim = claim & (cells >= 0).all(-1) & (cells < extent).all(-1)
    index = (cells[..., 1] * extent[..., 0] + cells[..., 0]).long() + levels.start
    index += image_index.view(-1, *[1] * (index.dim() - 1)) * shape[1]
    return torch.where(claim, index, shape[0] * shape[1])


def matched_truth(
    matched: Tensor, truth: GroundTruth, background: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(N, R) labels and (N, R, 4) boxes of what was matched.

    Args:
        matched: (N, R) indices among all G boxes of the batch, G where there is none.
        truth: of the batch.
        background: the label where there is none; the box is zero there.
        dtype: of the boxes.
    """
    labels = F.pad(truth.classes, (0, 1), value=background)[matched]
    return labels, F.pad(truth.boxes, (0, 0, 0, 1))[matched].to(dtype)


def index_in_image(matched: Tensor, truth: GroundTruth) -> Tensor:
    """(N, R) index of the matched box in its own image, -1 where there is none."""
    local = matched - _first_boxes(truth, matched.device)
    return torch.where(matched == len(truth.boxes), -1, local)


def index_in_batch(local: Tensor, truth: GroundTruth) -> Tensor:
    """(N, R) index among all G boxes of the batch, G where there is none (``local`` < 0).

    The way back from :func:`index_in_image`.
    """
    matched = local + _first_boxes(truth, local.device)
    return torch.where(local < 0, len(truth.boxes), matched)


def _first_boxes(truth: GroundTruth, device: torch.device) -> Tensor:
    """(N, 1) index of each image's first box among all of the batch."""
    return _sent([0, *accumulate(truth.counts)][:-1], device)[:, None]


class BestOverlaps(NamedTuple):
    """Which of an image's objects each of R boxes overlaps most; all -1 without an object.

    Attributes:
        overlap: (R,) IoU with the object that the box overlaps most; -1 where it is inverted.
        matched: (R,) that object.
        top_overlap: (R,) the same among those objects that no box overlaps more than this one
            does; -1 where it is no object's best.
        top_matched: (R,) that object.
    """

    overlap: Tensor
    matched: Tensor
    top_overlap: Tensor
    top_matched: Tensor


def best_overlaps(boxes: Tensor, gt_boxes: Tensor, side_offset: float = 0.0) -> BestOverlaps:
    """(R, 4) boxes compared with the (M, 4) objects of one image, all xyxy pixels.

    Of equal overlaps the first object's is taken. A few objects are compared at once, as many as
    there is memory for: boxes times objects are never held.

    Args:
        boxes: predicted boxes or anchors.
        gt_boxes: the objects.
        side_offset: what a side of a box has beside x2 - x1, in pixels.
    """
    found = [boxes.new_full((len(boxes),), -1.0) for _ in range(2)]
    matched = [torch.full_like(x, -1, dtype=torch.long) for x in found]
    chunk = objects_at_once(len(boxes))
    for start in range(0, len(gt_boxes), chunk):
        overlaps = _overlaps(gt_boxes[start : start + chunk], boxes, side_offset)
        top = torch.where(overlaps == overlaps.amax(1, keepdim=True), overlaps, -1)
        for values, kept, kept_index in zip((overlaps, top), found, matched, strict=True):
            value, which = values.max(0)
            better = value > kept
            kept.copy_(torch.where(better, value, kept))
            kept_index.copy_(torch.where(better, which + start, kept_index))
    return BestOverlaps(found[0], matched[0], found[1], matched[1])


def objects_at_once(count: int) -> int:
    """How many objects may be compared with ``count`` predictions without much memory."""
    return max(_PAIRS // max(count, 1), 1)


def _overlaps(gt_boxes: Tensor, boxes: Tensor, side_offset: float) -> Tensor:
    """(M, R) IoU; -1 with an inverted box."""
    sides = boxes.t().contiguous()  # read row by row, and results in place: memory is what it costs

    def overlap(axis: int) -> Tensor:
        end = torch.minimum(gt_boxes[:, axis + 2, None], sides[axis + 2])
        length = end.sub_(torch.maximum(gt_boxes[:, axis, None], sides[axis]))
        return (length.add_(side_offset) if side_offset else length).clamp_(min=0)

    common = overlap(0).mul_(overlap(1))
    areas = [(x[..., 2:] - x[..., :2] + side_offset).prod(-1) for x in (gt_boxes, boxes)]
    union = (areas[0][:, None] + areas[1]).sub_(common).clamp_(min=_MIN_AREA)
    inverted = (boxes[:, 2:] < boxes[:, :2]).any(-1)
    return common.div_(union).masked_fill_(inverted, -1)
