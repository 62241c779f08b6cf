# SPDX-License-Identifier: Apache-2.0
"""What assigners share: the levels they look at, and turning matches into targets."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..structures import DensePredictions, GroundTruth

__all__ = ["Levels", "claimed_index", "index_in_image", "matched_truth", "read_levels"]


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
    first = [0, *accumulate(truth.counts)][:-1]
    local = matched - _sent(first, matched.device)[:, None]
    return torch.where(matched == len(truth.boxes), -1, local)
