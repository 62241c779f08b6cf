# SPDX-License-Identifier: Apache-2.0
"""Grids of reference points, and boxes written as distances from them.

Two frames meet here. *Cells*: integer (x, y) indices of one level's map, an integer being the
centre of a cell. *Pixels*: coordinates of the padded input image. They differ by the stride and
by the half-cell offset, which is an argument without a default, since the methods disagree on it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Grid",
    "boxes_to_distances",
    "centerness",
    "distances_to_boxes",
    "grid_cells",
    "grid_locations",
    "make_grid",
    "soft_centerness",
    "squares",
    "valid_locations",
]


class Grid(NamedTuple):
    """The cells of all levels, finest level first, row-major inside a level.

    Attributes:
        cells: (R, 2) integer-valued (x, y) of each cell in its own level's map.
        locations: (R, 2) reference points (x, y) in pixels of the padded input.
        strides: (R,) pixels per cell.
        level_sizes: cells of each level.
    """

    cells: Tensor
    locations: Tensor
    strides: Tensor
    level_sizes: tuple[int, ...]


def grid_cells(size: tuple[int, int], *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(H * W, 2) cell indices (x, y) of a map of ``size`` (H, W), row-major."""
    height, width = size
    y, x = torch.meshgrid(
        torch.arange(height, device=device, dtype=dtype),
        torch.arange(width, device=device, dtype=dtype),
        indexing="ij",
    )
    return torch.stack((x, y), dim=-1).reshape(-1, 2)


def grid_locations(
    size: tuple[int, int],
    stride: int,
    offset: float,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(H * W, 2) pixels (x, y) of the cells of a map: ``(index + offset) * stride``.

    ``offset`` is 0.5 where a cell stands for its middle (FCOS), 0 where cell (0, 0) stands at
    pixel 0 (PDNet, SALT).
    """
    cells = grid_cells(size, device=device or torch.device("cpu"), dtype=dtype)
    return (cells + offset) * stride


def make_grid(
    sizes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    offset: float,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> Grid:
    """One :class:`Grid` over maps of the given (H, W) ``sizes`` and ``strides``."""
    cells = [grid_cells(size, device=device, dtype=dtype) for size in sizes]
    level_sizes = tuple(level.shape[0] for level in cells)
    per_cell = torch.cat(
        [
            torch.full((count,), float(stride), device=device, dtype=dtype)
            for count, stride in zip(level_sizes, strides, strict=True)
        ]
    )
    all_cells = torch.cat(cells)
    return Grid(all_cells, (all_cells + offset) * per_cell[:, None], per_cell, level_sizes)


def squares(locations: Tensor, sides: Tensor) -> Tensor:
    """(R, 4) xyxy squares with the given (R,) ``sides``, centred on (R, 2) ``locations``."""
    half = (sides / 2)[:, None]
    return torch.cat((locations - half, locations + half), dim=-1)


def distances_to_boxes(locations: Tensor, distances: Tensor) -> Tensor:
    """Boxes (..., 4) xyxy from (left, top, right, bottom) distances, in the locations' unit."""
    return torch.cat((locations - distances[..., :2], locations + distances[..., 2:]), dim=-1)


def boxes_to_distances(locations: Tensor, boxes: Tensor) -> Tensor:
    """(..., 4) distances (left, top, right, bottom) of ``locations`` (..., 2) to xyxy ``boxes``.

    A negative distance means that the location lies outside that side.
    """
    return torch.cat((locations - boxes[..., :2], boxes[..., 2:] - locations), dim=-1)


def centerness(distances: Tensor) -> Tensor:
    """FCOS's centerness, (...) in [0, 1], of (..., 4) distances (Tian et al., Eq. 3).

    The square root of the ratios of the smaller to the larger distance in x and in y. Zero for
    locations outside their box or on its border.
    """
    return _side_ratios(distances).sqrt()


def soft_centerness(distances: Tensor, exponent: float = 1.0) -> Tensor:
    """Generalised centerness, (...) in [0, 1], of (..., 4) distances (SAPD, section 3.2).

    The ratios of the smaller to the larger distance in x and in y, multiplied, to the power of
    ``exponent``; with 0.5 it is :func:`centerness`. The paper prints min(top, left), which must
    be min(top, bottom). Zero for locations outside their box or on its border.
    """
    return _side_ratios(distances) ** exponent


def _side_ratios(distances: Tensor) -> Tensor:
    """(...) ratio of left to right times that of top to bottom, the smaller over the larger."""
    x = distances[..., 0::2].clamp(min=0)
    y = distances[..., 1::2].clamp(min=0)
    tiny = torch.finfo(distances.dtype).tiny
    ratio_x = x.amin(-1) / x.amax(-1).clamp(min=tiny)
    ratio_y = y.amin(-1) / y.amax(-1).clamp(min=tiny)
    return ratio_x * ratio_y


def valid_locations(
    locations: Tensor,
    strides: Tensor,
    image_sizes: Sequence[tuple[int, int]],
    size_divisor: int,
) -> Tensor:
    """(N, R) mask of the locations whose cell begins inside their own image.

    An image's own size is rounded up to a multiple of ``size_divisor``; what lies beyond is there
    only because another image of the batch is larger.

    Args:
        locations: (R, 2) pixels (x, y) of the padded input; any offset inside a cell.
        strides: (R,) pixels per cell.
        image_sizes: (H, W) of each image before padding.
        size_divisor: pixels.
    """
    sizes = torch.tensor([(width, height) for height, width in image_sizes])
    padded = (sizes + size_divisor - 1) // size_divisor * size_divisor
    padded = padded.to(locations.device, non_blocking=True)
    strides = strides[:, None]
    corners = (locations / strides).floor() * strides
    return (corners < padded[:, None].to(corners.dtype)).all(-1)
