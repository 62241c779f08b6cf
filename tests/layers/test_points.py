# SPDX-License-Identifier: Apache-2.0
"""Grids in pixels and cells, and boxes as distances, against numbers worked by hand."""

import inspect

import pytest
import torch
from torch import Tensor

from d2_decouple.layers.points import (
    boxes_to_distances,
    centerness,
    distances_to_boxes,
    grid_cells,
    grid_locations,
    make_grid,
    squares,
    valid_locations,
)

CPU = torch.device("cpu")


def test_offset_must_be_given() -> None:
    """The methods disagree on it, so no value is the natural one."""
    for function in (grid_locations, make_grid):
        assert inspect.signature(function).parameters["offset"].default is inspect.Parameter.empty
    with pytest.raises(TypeError, match="offset"):
        grid_locations((2, 3), 8)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("offset", "x", "y"),
    [
        (0.5, [4, 12, 20], [4, 12]),  # the middle of each cell of 8 pixels
        (0.0, [0, 8, 16], [0, 8]),  # its upper left corner
    ],
)
def test_locations_by_hand(offset: float, x: list[float], y: list[float]) -> None:
    want = [[a, b] for b in y for a in x]  # row-major: x runs fastest; (x, y) order
    assert grid_locations((2, 3), 8, offset).tolist() == want


def test_cells_are_x_y_and_row_major() -> None:
    cells = grid_cells((2, 3), device=CPU, dtype=torch.float32)
    assert cells.tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]


def test_single_row_and_single_column() -> None:
    assert grid_locations((1, 1), 32, 0.5).tolist() == [[16, 16]]
    assert grid_locations((3, 1), 4, 0).tolist() == [[0, 0], [0, 4], [0, 8]]
    assert grid_locations((1, 3), 4, 0).tolist() == [[0, 0], [4, 0], [8, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_grid_joins_levels(offset: float, dtype: torch.dtype) -> None:
    sizes, strides = [(5, 7), (3, 4), (2, 2)], [8, 16, 32]
    grid = make_grid(sizes, strides, offset, device=CPU, dtype=dtype)
    assert grid.level_sizes == (35, 12, 4)
    assert grid.locations.dtype == grid.cells.dtype == grid.strides.dtype == dtype
    levels = grid.locations.split(grid.level_sizes)
    for level, size, stride in zip(levels, sizes, strides, strict=True):
        assert torch.equal(level, grid_locations(size, stride, offset, dtype=dtype))
    assert grid.strides.tolist() == [8] * 35 + [16] * 12 + [32] * 4
    assert torch.equal(grid.cells, (grid.locations / grid.strides[:, None]) - offset)


def test_grid_wants_a_stride_for_each_level() -> None:
    with pytest.raises(ValueError, match="zip"):
        make_grid([(2, 2), (1, 1)], [8], 0.5, device=CPU, dtype=torch.float32)


def test_squares_by_hand() -> None:
    got = squares(torch.tensor([[4.0, 12.0], [32.0, 0.0]]), torch.tensor([8.0, 64.0]))
    assert got.tolist() == [[0, 8, 8, 16], [0, -32, 64, 32]]


def test_distances_by_hand() -> None:
    """From (10, 20): 3 left, 5 up, 7 right, 9 down; the second location lies right of the box."""
    locations = torch.tensor([[10.0, 20.0], [30.0, 20.0]])
    boxes = torch.tensor([[7.0, 15.0, 17.0, 29.0], [7.0, 15.0, 17.0, 29.0]])
    distances = boxes_to_distances(locations, boxes)
    assert distances.tolist() == [[3, 5, 7, 9], [23, 5, -13, 9]]
    assert torch.equal(distances_to_boxes(locations, distances), boxes)


def test_round_trips_and_broadcasting() -> None:
    generator = torch.Generator().manual_seed(0)
    locations = torch.randn(11, 2, generator=generator, dtype=torch.float64) * 100
    distances = torch.randn(3, 11, 4, generator=generator, dtype=torch.float64) * 50
    boxes = distances_to_boxes(locations, distances)
    assert boxes.shape == (3, 11, 4)
    torch.testing.assert_close(boxes_to_distances(locations, boxes), distances)
    again = distances_to_boxes(locations, boxes_to_distances(locations, boxes))
    torch.testing.assert_close(again, boxes)
    pairs = boxes_to_distances(locations[:, None], boxes[0])  # every location to every box
    assert pairs.shape == (11, 11, 4)
    torch.testing.assert_close(pairs.diagonal().T, distances[0])


def distances_of(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_centerness_by_hand(dtype: torch.dtype) -> None:
    distances = distances_of(
        [5, 3, 5, 3],  # the middle: 1
        [1, 4, 4, 4],  # sqrt(1/4 * 1)
        [4, 4, 1, 4],  # the same, mirrored
        [1, 1, 4, 9],  # sqrt(1/4 * 1/9) = 1/6
    ).to(dtype)
    want = torch.tensor([1, 0.5, 0.5, 1 / 6], dtype=dtype)
    torch.testing.assert_close(centerness(distances), want)


def test_centerness_is_zero_outside_and_on_the_border() -> None:
    distances = distances_of(
        [-1, 2, 5, 2],  # left of the box
        [-1, -1, -2, -3],  # outside on all sides: two negative ratios must not make a positive
        [-1, 2, -1, 2],  # an inverted box
        [0, 2, 5, 2],  # on the border
        [0, 2, 0, 2],  # a box without width: 0 / 0
        [0, 0, 0, 0],  # a point
    )
    assert centerness(distances).tolist() == [0] * 6
    assert centerness(distances.float()).tolist() == [0] * 6


def test_centerness_is_a_share() -> None:
    distances = torch.rand(1000, 4, generator=torch.Generator().manual_seed(0)) * 1e4
    distances[::3] *= 1e-20
    values = centerness(distances)
    assert ((values >= 0) & (values <= 1)).all()
    left, top, right, bottom = distances.double().unbind(-1)
    x = torch.minimum(left, right) / torch.maximum(left, right)
    y = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    torch.testing.assert_close(values.double(), (x * y).sqrt(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_valid_locations_by_hand(offset: float) -> None:
    """Images of 40 x 65 and 96 x 96 pixels in a batch of 96 x 96, cells of 16 and of 64 pixels.

    The first counts as 64 x 96 pixels: 4 x 6 cells of 16, and of 64 those at x = 0 and 64, y = 0.
    """
    sizes = [(6, 6), (2, 2)]
    grid = make_grid(sizes, [16, 64], offset, device=torch.device("cpu"), dtype=torch.float32)
    valid = valid_locations(grid.locations, grid.strides, [(40, 65), (96, 96)], 32)
    fine = torch.zeros(6, 6, dtype=torch.bool)
    fine[:4] = True
    coarse = torch.tensor([[True, True], [False, False]])
    assert torch.equal(valid[0], torch.cat((fine.flatten(), coarse.flatten())))
    assert valid[1].all()
    exact = valid_locations(grid.locations, grid.strides, [(40, 65), (96, 96)], 1)
    fine[3:], fine[:, 5:] = False, False
    assert torch.equal(exact[0, :36].view(6, 6), fine)
