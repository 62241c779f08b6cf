# SPDX-License-Identifier: Apache-2.0
"""The cells of every level that lie in a region of each box, as far as the regions reach.

What is around a box's middle by a number of strides, :func:`.matching.central_cells` finds; here
regions grow with their boxes, so their cells are counted first and then numbered in a row.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .matching import Levels

__all__ = [
    "CellPairs",
    "RegionCells",
    "RegionPairs",
    "Regions",
    "cells_by_point",
    "cells_touched",
    "marked",
    "smallest_claim",
    "with_one",
]

_PAIRS = 2**19  # that are looked at together


class RegionCells(NamedTuple):
    """A rectangle of cells on each level for each of a batch's G boxes.

    Attributes:
        first: (G, L, 2) whole numbers (x, y) of the rectangle's first cell.
        size: (G, L, 2) its cells in x and in y; 0 where it is empty.
    """

    first: Tensor
    size: Tensor

    def numbers(self) -> Tensor:
        """(G, L) cells of each."""
        return self.size.prod(-1)


def cells_by_point(boxes: Tensor, levels: Levels) -> RegionCells:
    """Cells whose reference point lies in (G, 4) xyxy pixel boxes, or on their border."""
    low, high = ((x - levels.origin) / levels.stride for x in _corners(boxes))
    return _between(low.ceil(), high.floor(), levels)


def cells_touched(boxes: Tensor, levels: Levels) -> RegionCells:
    """Cells whose square of stride x stride pixels shares an area with (G, 4) pixel boxes (FSAF).

    The first square begins at pixel 0, wherever in it the reference point lies.
    """
    low, high = (x / levels.stride for x in _corners(boxes))
    return _between(low.floor(), high.ceil() - 1, levels)


def with_one(cells: RegionCells, boxes: Tensor, levels: Levels) -> RegionCells:
    """Where a region has no cell, the one that holds the middle of the (G, 4) box, or is nearest.

    The nearest counts for boxes whose middle is beyond the map.
    """
    middle = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
    last = levels.extent - 1
    middle = torch.minimum((middle / levels.stride).floor().long().clamp(min=0), last)
    empty = (cells.numbers() == 0)[..., None]
    return RegionCells(torch.where(empty, middle, cells.first), torch.where(empty, 1, cells.size))


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return boxes[:, None, :2], boxes[:, None, 2:]


def _between(low: Tensor, high: Tensor, levels: Levels) -> RegionCells:
    """The cells from ``low`` to ``high`` (G, L, 2), both included, that the levels have."""
    last = (levels.extent - 1).to(low.dtype)
    first = low.clamp(min=0)
    size = (torch.minimum(high, last) - first + 1).clamp(min=0)
    # Of a region beyond the map the beginning is not looked at; it shall only be a whole number.
    return RegionCells(torch.minimum(first, last).long(), size.long())


class CellPairs(NamedTuple):
    """Some of the pairs of a region and a cell in it.

    Attributes:
        group: (P,) which region: box * L + level.
        box: (P,) of the batch's G boxes.
        cell: (P, 2) whole numbers (x, y).
        location: (P,) index of the cell among all N * R predictions.
    """

    group: Tensor
    box: Tensor
    cell: Tensor
    location: Tensor


class RegionPairs:
    """All pairs, to be gone through in pieces that bound the memory; work is linear in them.

    Their number is the only thing that is asked from the device, once.
    """

    def __init__(
        self, cells: RegionCells, levels: Levels, image_index: Tensor, num_locations: int
    ) -> None:
        """
        Args:
            cells: of G boxes on L levels.
            levels: of the predictions.
            image_index: (G,) image of each box.
            num_locations: R of one image.
        """
        self._cells, self._levels = cells, levels
        self._image_index, self._num_locations = image_index, num_locations
        self._counts = cells.numbers().flatten()
        self._ends = self._counts.cumsum(0)
        self._total = int(self._ends[-1]) if len(self._ends) else 0

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[CellPairs]:
        for start in range(0, self._total, _PAIRS):
            yield self._piece(start, min(start + _PAIRS, self._total))

    def _piece(self, start: int, end: int) -> CellPairs:
        levels, ends = self._levels, self._ends
        number = torch.arange(start, end, device=ends.device)
        group = torch.searchsorted(ends, number, right=True)
        within = number - (ends - self._counts)[group]
        first, width = self._cells.first.flatten(0, 1)[group], self._cells.size[..., 0].flatten()
        x, y = first[:, 0] + within % width[group], first[:, 1] + within // width[group]
        box, level = group // len(levels.stride), group % len(levels.stride)
        location = levels.start[level, 0] + y * levels.extent[level, 0] + x
        location += self._image_index[box] * self._num_locations
        return CellPairs(group, box, torch.stack((x, y), dim=-1), location)


class Regions(NamedTuple):
    """Where each of a batch's G objects can be learned, on every level.

    Attributes:
        cells: of the region of positives.
        pairs: the same, one by one.
        ring: of the larger region in which nothing else is learned, if there is one.
    """

    cells: RegionCells
    pairs: RegionPairs
    ring: RegionPairs | None


def smallest_claim(pairs: RegionPairs, chosen: Tensor, boxes: Tensor, total: int) -> Tensor:
    """(total,) the smallest of the G boxes that claim each location, G where none does.

    A box claims its cells on the levels that are ``chosen`` (G, L) for it. Of boxes of one area the
    first wins.
    """
    by_area = (boxes[:, 2:] - boxes[:, :2]).prod(-1).argsort(stable=True)
    rank = by_area.argsort()
    best = rank.new_full((total + 1,), len(boxes))
    for piece in pairs:
        location = torch.where(chosen.flatten()[piece.group], piece.location, total)
        best.scatter_reduce_(0, location, rank[piece.box], "amin")
    return F.pad(by_area, (0, 1), value=len(boxes))[best[:total]]


def marked(
    pairs: RegionPairs,
    wanted: Tensor,
    entry: Tensor | int,
    entries: int,
    total: int,
    without: RegionCells | None = None,
) -> Tensor:
    """(total,) the entries of locations that pairs of a box and a level name.

    Args:
        pairs: of G boxes.
        wanted: (G, L) which of their regions count.
        entry: (G,) which entry of a location a box names.
        entries: of each location.
        total: of all entries.
        without: regions of the same boxes whose cells do not count.
    """
    marked = torch.zeros(total + 1, dtype=torch.bool, device=wanted.device)
    for piece in pairs:
        counts = wanted.flatten()[piece.group]
        if without is not None:
            counts = counts & ~_inside(without, piece)
        own = entry[piece.box] if isinstance(entry, Tensor) else entry
        marked.scatter_(0, torch.where(counts, piece.location * entries + own, total), True)
    return marked[:total]


def _inside(cells: RegionCells, pairs: CellPairs) -> Tensor:
    """(P,) whether each pair's cell lies in the same box's and level's rectangle of ``cells``."""
    first, size = (x.flatten(0, 1)[pairs.group] for x in cells)
    return ((pairs.cell >= first) & (pairs.cell < first + size)).all(-1)
