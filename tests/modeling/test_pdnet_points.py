# SPDX-License-Identifier: Apache-2.0
"""The kinds of points: by hand, against plain loops, and what an offset's gradient is."""

from typing import Any

import pytest
import torch
from pdnet_loops import lattice, limited, points_of
from pdnet_parts import DOUBLE
from torch import Tensor

from d2_decouple.modeling import (
    BoundaryPoints,
    EdgeMidpoints,
    GridOffsetPoints,
    GridPoints,
    SemanticPoints,
)

KINDS: dict[str, tuple[Any, str, int, int]] = {  # object, name in the loops, points, channels
    "grid": (GridPoints(num_points=1), "grid", 1, 0),
    "grid of 4": (GridPoints(num_points=4), "grid", 4, 0),
    "grid and offsets": (GridOffsetPoints(num_points=4), "grid_offset", 4, 8),
    "midpoints": (EdgeMidpoints(), "midpoints", 4, 0),
    "boundary": (BoundaryPoints(), "boundary", 4, 4),
    **{
        f"semantic {count}": (SemanticPoints(num_points=count), "semantic", count, 2 * count)
        for count in (1, 5, 9, 13, 16)
    },
}


def scene(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cells, coarse boxes of which a part is inverted, offsets far beyond any limit."""
    cells = torch.cartesian_prod(torch.arange(4.0), torch.arange(5.0)).double()
    coarse = torch.cat((cells - 2, cells + 2), -1) + 3 * torch.randn(2, len(cells), 4).double()
    return cells, coarse, 4 * torch.randn(2, len(cells), channels, dtype=DOUBLE)


@pytest.mark.parametrize("name", KINDS)
def test_equals_plain_loops(name: str) -> None:
    kind, loop_name, count, channels = KINDS[name]
    assert (kind.num_points, kind.outputs) == (count, channels)
    cells, coarse, offsets = scene(channels)
    points = kind(cells, coarse, offsets)
    expected = [
        [
            points_of(loop_name, count, cell, box, raw)
            for cell, box, raw in zip(cells.tolist(), *image, strict=True)
        ]
        for image in zip(coarse.tolist(), offsets.tolist(), strict=True)
    ]
    torch.testing.assert_close(points, torch.tensor(expected, dtype=DOUBLE), rtol=0, atol=1e-12)
    assert kind(cells.float(), coarse.float(), offsets.float()).dtype == torch.float32


@pytest.mark.parametrize("name", KINDS)
def test_no_images_and_no_cells(name: str) -> None:
    kind, _, count, channels = KINDS[name]
    for images, rows in ((0, 3), (2, 0)):
        cells = torch.zeros(rows, 2)
        points = kind(cells, torch.zeros(images, rows, 4), torch.zeros(images, rows, channels))
        assert points.shape == (images, rows, count, 2)


def test_lattices_are_spread_over_the_box() -> None:
    """Corners and middle always; symmetric; of 9, the rows are slow and the columns fast."""
    nine = [(x / 2, y / 2) for y in range(3) for x in range(3)]
    assert lattice(9) == nine
    for count in (1, 5, 9, 13, 16):
        points = lattice(count)
        assert len(set(points)) == count
        mirrored = {(round(1 - x, 9), round(y, 9)) for x, y in points}
        turned = {(round(y, 9), round(x, 9)) for x, y in points}
        assert mirrored == turned == {(round(x, 9), round(y, 9)) for x, y in points}
        if count > 1:
            assert {(0, 0), (0, 1), (1, 0), (1, 1)} <= set(points)
        assert points == sorted(points, key=lambda point: (point[1], point[0]))


# A box 4 wide and 8 high has limits of 1.5 * 4 = 6 for points that move in y (left and right edge)
# and of 1.5 * 2 = 3 for those that move in x. Inverted, the limits are negative, and
# o - (max(o - T, 0) + min(o + T, 0)) turns the sign: T = -3 and o = 1 give 1 - (4 - 2) = -1.
UPRIGHT, INVERTED = [0.0, 0.0, 4.0, 8.0], [4.0, 8.0, 0.0, 0.0]
SLIDES = [
    (UPRIGHT, [5.0, 2.0, -5.0, -2.0], [5.0, 2.0, -5.0, -2.0]),
    (UPRIGHT, [6.0, 3.0, -6.0, -3.0], [6.0, 3.0, -6.0, -3.0]),
    (UPRIGHT, [7.0, 7.0, -7.0, -7.0], [6.0, 3.0, -6.0, -3.0]),
    (UPRIGHT, [0.0, 0.0, 1e6, -1e6], [0.0, 0.0, 6.0, -3.0]),
    (INVERTED, [1.0, 1.0, -2.0, -2.0], [-1.0, -1.0, 2.0, 2.0]),
    (INVERTED, [7.0, 7.0, -7.0, -7.0], [-6.0, -3.0, 6.0, 3.0]),
    ([4.0, 0.0, 0.0, 8.0], [1.0, 1.0, 7.0, -7.0], [1.0, -1.0, 6.0, 3.0]),  # in x alone
    ([2.0, 3.0, 2.0, 3.0], [1.0, -1.0, 0.0, 9.0], [0.0, 0.0, 0.0, 0.0]),  # a point
]


@pytest.mark.parametrize(("box", "raw", "wanted"), SLIDES)
def test_limit_of_a_slide(box: list[float], raw: list[float], wanted: list[float]) -> None:
    offsets = torch.tensor([[raw]], requires_grad=True)
    points = BoundaryPoints()(torch.zeros(1, 2), torch.tensor([[box]]), offsets)
    x1, y1, x2, y2 = box
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    left, top, right, bottom = wanted
    assert points[0, 0].tolist() == [
        [x1, y + left],
        [x + top, y1],
        [x2, y + right],
        [x + bottom, y2],
    ]
    # Straight through: beyond the limit, too, and where the sign was turned.
    upstream = torch.randn(4, 2)
    gradient = torch.autograd.grad((points[0, 0] * upstream).sum(), offsets)[0]
    assert torch.equal(gradient[0, 0], upstream[[0, 1, 2, 3], [1, 0, 1, 0]])
    sides = [y2 - y1, x2 - x1] * 2
    by_formula = [limited(o, side, 1.5) for o, side in zip(raw, sides, strict=True)]
    assert by_formula == wanted


def test_limit_is_a_choice() -> None:
    box, offsets = torch.tensor([[UPRIGHT]]), torch.full((1, 1, 4), 100.0)
    points = BoundaryPoints(limit=1.0)(torch.zeros(1, 2), box, offsets)
    assert points[0, 0].tolist() == [[0, 8], [4, 0], [4, 8], [4, 8]]  # the ends of the edges


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind[3]])
def test_offsets_learn_and_boxes_do_not(name: str) -> None:
    """Each offset moves one coordinate of one point; what is not moved hands on no gradient."""
    kind, _, count, channels = KINDS[name]
    cells, coarse, offsets = scene(channels)
    offsets.requires_grad_()
    points = kind(cells, coarse, offsets)
    upstream = torch.randn_like(points)
    gradient = torch.autograd.grad((points * upstream).sum(), offsets)[0]
    if channels == 2 * count:
        assert torch.equal(gradient, upstream.flatten(2))
    else:
        assert torch.equal(gradient, upstream[..., [0, 1, 2, 3], [1, 0, 1, 0]])


@pytest.mark.parametrize("count", [0, 2, 4, 8, 25])
def test_unknown_number_of_semantic_points(count: int) -> None:
    with pytest.raises(ValueError, match=rf"num_points is {count}.*\[1, 5, 9, 13, 16\]"):
        SemanticPoints(num_points=count)


@pytest.mark.parametrize("kind", [GridPoints, GridOffsetPoints])
@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_a_number_of_points_is_whole_and_positive(kind: Any, count: Any) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}.num_points is {count}; wanted is"):
        kind(num_points=count)


@pytest.mark.parametrize("limit", [-1.0, float("nan"), float("inf")])
def test_limit_is_a_length(limit: float) -> None:
    with pytest.raises(ValueError, match=f"BoundaryPoints.limit is {limit}; wanted are half edges"):
        BoundaryPoints(limit=limit)
