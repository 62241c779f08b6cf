# SPDX-License-Identifier: Apache-2.0
"""Collection of dynamic points with what PyTorch has, as well as one can write it.

Each takes maps (N, P * C, H, W) and points (N, P, 2, Ho, Wo), (x, y) in cells, and returns the sum
over points (N, C, Ho, Wo), as ``dynamic_point_gather(maps, points, "sum")`` does.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["by_embedding_bag", "by_grid_sample", "by_sparse_matrix"]


def by_grid_sample(maps: Tensor, points: Tensor) -> Tensor:
    """One call for all points, each as an image of its own; maps are contiguous."""
    images, channels, height, width = maps.shape
    num_points = points.shape[1]
    x, y = points.unbind(2)
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)
    maps = maps.view(images * num_points, channels // num_points, height, width)
    # It wants one dtype, and half precision is too coarse for the grid.
    values = F.grid_sample(maps.to(grid.dtype), grid.flatten(0, 1), align_corners=False)
    return values.unflatten(0, (images, num_points)).sum(1).to(maps.dtype)


def by_sparse_matrix(maps: Tensor, points: Tensor) -> Tensor:
    """A matrix with a row for each cell times the map as one; one channels-last image."""
    rows, weights = _corners(points, maps.shape[-2:])
    table = _table(maps, points.shape[1])
    cells, entries = rows.shape
    starts = torch.arange(0, cells * entries + 1, entries, dtype=rows.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        matrix = torch.sparse_csr_tensor(
            *(starts, rows.flatten(), weights.flatten(), (cells, len(table))),
            check_invariants=False,
        )
    return _as_map(matrix @ table, points)


def by_embedding_bag(maps: Tensor, points: Tensor) -> Tensor:
    """Weighted sums of the rows of a table, a bag for each cell; one channels-last image."""
    rows, weights = _corners(points, maps.shape[-2:])
    table = _table(maps, points.shape[1])
    return _as_map(F.embedding_bag(rows, table, mode="sum", per_sample_weights=weights), points)


def _table(maps: Tensor, num_points: int) -> Tensor:
    """Channels-last (1, P * C, H, W) -> (H * W * P, C), not copied."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1] // num_points)


def _as_map(values: Tensor, points: Tensor) -> Tensor:
    return values.view(1, *points.shape[-2:], -1).permute(0, 3, 1, 2)


def _corners(points: Tensor, size: torch.Size) -> tuple[Tensor, Tensor]:
    """Rows of the table (Ho * Wo, 4 * P) that each cell reads, and their weights."""
    height, width = size
    num_points = points.shape[1]
    x, y = points[0].flatten(2).permute(1, 2, 0).contiguous()  # each (Ho * Wo, P)
    left, top = x.floor(), y.floor()
    columns, across = _two_cells(left, x - left, width)
    lines, down = _two_cells(top, y - top, height)
    own = torch.arange(num_points, dtype=torch.int32, device=points.device)
    in_line = [column * num_points + own for column in columns]
    starts = [line * (width * num_points) for line in lines]
    rows = torch.cat([start + column for start in starts for column in in_line], dim=1)
    weights = torch.cat([a * b for a in down for b in across], dim=1)
    return rows, weights


def _two_cells(
    first: Tensor, beyond: Tensor, size: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The cells around coordinates of one axis and their weights, 0 for cells outside."""
    second = first + 1
    weights = (
        torch.where((first >= 0) & (first < size), 1 - beyond, 0.0),
        torch.where((second >= 0) & (second < size), beyond, 0.0),
    )
    return (_inside(first, size), _inside(second, size)), weights


def _inside(cells: Tensor, size: int) -> Tensor:
    return cells.clamp(0, size - 1).int()
