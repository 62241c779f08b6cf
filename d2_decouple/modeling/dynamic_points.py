# SPDX-License-Identifier: Apache-2.0
"""Where a target is read: the kinds of points that PDNet compares (its sections III-C, IV-B)."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "SIDES",
    "BoundaryPoints",
    "EdgeMidpoints",
    "GridOffsetPoints",
    "GridPoints",
    "Points",
    "SemanticPoints",
]

SIDES = 4  # left, top, right, bottom, in this order everywhere

# Rows and columns of a lattice, and whether every second point is left out, as on a chessboard.
# Table III has 5, 9, 13 and 16 points.
_LATTICES = {1: (1, False), 5: (3, True), 9: (3, False), 13: (5, True), 16: (4, False)}


class Points(Protocol):
    """A kind of points: from a cell, its coarse box and what the network adds, to coordinates.

    Attributes:
        num_points: P.
        outputs: channels of the network that move the points.
    """

    @property
    def num_points(self) -> int:
        """P."""

    @property
    def outputs(self) -> int:
        """Channels that it wants."""

    def __call__(self, cells: Tensor, coarse: Tensor, offsets: Tensor) -> Tensor:
        """Points (N, R, P, 2), (x, y) in cells of their own level.

        Args:
            cells: (R, 2) the predicting cells.
            coarse: (N, R, 4) their coarse boxes in cells, xyxy, without gradient.
            offsets: (N, R, outputs) in cells.
        """


@dataclass(frozen=True, kw_only=True)
class GridPoints:
    """The predicting cell itself: a target that is not decoupled (Tables II and III, a)."""

    num_points: int
    outputs = 0

    def __post_init__(self) -> None:
        _check_count(self)

    def __call__(self, cells: Tensor, coarse: Tensor, offsets: Tensor) -> Tensor:
        """As :class:`Points` says."""
        return cells[:, None].expand(coarse.shape[0], cells.shape[0], self.num_points, 2)


@dataclass(frozen=True, kw_only=True)
class GridOffsetPoints:
    """Points that are free to go anywhere from their cell (Tables II and III, b)."""

    num_points: int

    def __post_init__(self) -> None:
        _check_count(self)

    @property
    def outputs(self) -> int:
        """Two for each point."""
        return 2 * self.num_points

    def __call__(self, cells: Tensor, coarse: Tensor, offsets: Tensor) -> Tensor:
        """As :class:`Points` says; offsets are (x, y) of each point."""
        return cells[:, None] + offsets.unflatten(-1, (self.num_points, 2))


@dataclass(frozen=True, kw_only=True)
class EdgeMidpoints:
    """The middles of the coarse box's left, top, right and bottom edge (Table II, c)."""

    num_points = SIDES
    outputs = 0

    def __call__(self, cells: Tensor, coarse: Tensor, offsets: Tensor) -> Tensor:
        """As :class:`Points` says."""
        middle, _ = _middle_and_half(coarse)
        return _on_edges(coarse, _across(middle))


@dataclass(frozen=True, kw_only=True)
class BoundaryPoints:
    """Dynamic boundary points: each slides along its edge of the coarse box (section III-C1).

    Attributes:
        limit: how far a point may go from the middle of its edge, in half edges. Gradients pass
            as if there were no limit, which is the authors' and not in the paper.
    """

    limit: float = 1.5
    num_points = SIDES
    outputs = SIDES

    def __post_init__(self) -> None:
        if not 0 <= self.limit < math.inf:
            raise ValueError(
                f"BoundaryPoints.limit is {self.limit}; wanted are half edges, from 0, such as 1.5"
            )

    def __call__(self, cells: Tensor, coarse: Tensor, offsets: Tensor) -> Tensor:
        """As :class:`Points` says; offsets are left's y, top's x, right's y, bottom's x."""
        middle, half = _middle_and_half(coarse)
        slides = _limited(offsets, self.limit * _across(half))
        return _on_edges(coarse, _across(middle) + slides)


@dataclass(frozen=True, kw_only=True)
class SemanticPoints:
    """Dynamic semantic points: spread over the coarse box, then moved freely (section III-C2).

    The lattice reaches from edge to edge: for 9 points the corners, the middles of the edges and
    the middle of the box, row by row.

    Attributes:
        num_points: 1, 5, 9, 13 or 16.
    """

    num_points: int = 9

    def __post_init__(self) -> None:
        if self.num_points not in _LATTICES:
            raise ValueError(
                f"SemanticPoints.num_points is {self.num_points}; wanted is one of "
                f"{sorted(_LATTICES)}"
            )

    @property
    def outputs(self) -> int:
        """Two for each point."""
        return 2 * self.num_points

    def __call__(self, cells: Tensor, coarse: Tensor, offsets: Tensor) -> Tensor:
        """As :class:`Points` says; offsets are (x, y) of each point."""
        middle, half = _middle_and_half(coarse)
        lattice = _lattice(self.num_points, coarse)
        priors = middle[..., None, :] + half[..., None, :] * lattice
        return priors + offsets.unflatten(-1, (self.num_points, 2))


def _check_count(points: Points) -> None:
    if type(points.num_points) is not int or points.num_points < 1:
        raise ValueError(
            f"{type(points).__name__}.num_points is {points.num_points}; wanted is a whole number "
            "from 1, such as 4 for the sides of a box"
        )


def _lattice(num_points: int, like: Tensor) -> Tensor:
    """(P, 2) points (x, y) over a box from -1 to 1, row by row."""
    count, alternate = _LATTICES[num_points]
    # Made on the device: nothing is sent there in a forward.
    steps = torch.linspace(-1, 1, count, dtype=like.dtype, device=like.device)
    if count == 1:
        steps = torch.zeros_like(steps)
    rows = torch.cartesian_prod(steps, steps).flip(-1)
    return rows[::2] if alternate else rows  # of an odd number of columns every second is a board


def _middle_and_half(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 2) middle (x, y) and half of the (width, height) of (..., 4) boxes."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) / 2, (high - low) / 2


def _across(pair: Tensor) -> Tensor:
    """(..., 2) values in x and y -> (..., 4): each side's along its edge, y for left, x for top."""
    crossed = pair.flip(-1)
    return torch.cat((crossed, crossed), dim=-1)


def _on_edges(boxes: Tensor, along: Tensor) -> Tensor:
    """(..., 4, 2) points (x, y) on the lines of the four edges, at ``along`` (..., 4) on them."""
    left, top, right, bottom = boxes.unbind(-1)
    y_left, x_top, y_right, x_bottom = along.unbind(-1)
    x = torch.stack((left, x_top, right, x_bottom), dim=-1)
    y = torch.stack((y_left, top, y_right, bottom), dim=-1)
    return torch.stack((x, y), dim=-1)


def _limited(offsets: Tensor, limit: Tensor) -> Tensor:
    """``offsets`` cut to +-``limit``, with the gradient of not cut ones.

    A negative limit, of an inverted box, turns the sign: the authors' formula, which a plain clamp
    would not give.
    """
    excess = (offsets - limit).clamp(min=0) + (offsets + limit).clamp(max=0)
    return offsets - excess.detach()
