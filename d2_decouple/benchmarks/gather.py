# SPDX-License-Identifier: Apache-2.0
"""The gather operator against the ways PyTorch and torchvision have to do the same.

Both sides get the same numbers, each in the layout that is its best: ours maps and points as a
channels-last convolution writes them, the references contiguous ones unless a row says otherwise.
A reference makes everything it needs of the points, a grid or a matrix, inside the timed run.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import deform_conv2d

from ..layers.point_conv import deformable_point_conv
from ..layers.point_gather import dynamic_point_gather
from ..layers.points import grid_cells
from .gather_references import by_embedding_bag, by_grid_sample, by_sparse_matrix
from .row import Row, Step

__all__ = ["ROWS"]

Gather = Callable[[Tensor, Tensor], Tensor]
Level = tuple[Tensor, Tensor]

# P3 to P7 of an 800x1333 image, which is padded to 800x1344.
_SIZES = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
_KERNEL = (3, 3)
_POINTS = _KERNEL[0] * _KERNEL[1]
_CLASSES = 80
_CHANNELS = 256  # of a pyramid's maps, for deformable points
_REACH = 2  # cells between a point and its own cell, in x and in y, unless points are scattered


def _fill(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers that do not depend on the layout, a few channels of (N, C, H, W) at a time."""
    for channels in tensor.split(_CLASSES, dim=1):
        channels.copy_(torch.randn(channels.shape, generator=generator))
    return tensor


def _random_points(size: tuple[int, int], scattered: bool, generator: torch.Generator) -> Tensor:
    """(1, P, 2, H, W), (x, y) in cells."""
    height, width = size
    share = torch.rand(1, _POINTS, 2, height, width, generator=generator)
    if scattered:
        return share * torch.tensor([width, height])[:, None, None] - 0.5
    cells = grid_cells(size, device=share.device, dtype=share.dtype).T.reshape(2, height, width)
    return cells + _REACH * (2 * share - 1)


def _levels(
    channels: int, *, scattered: bool, planes: bool, device: str, dtype: torch.dtype
) -> list[Level]:
    """Maps (1, channels, H, W) and points (1, P, 2, H, W) of all levels."""
    generator = torch.Generator().manual_seed(0)
    layout = torch.contiguous_format if planes else torch.channels_last
    levels = []
    for size in _SIZES:
        empty = torch.empty(1, channels, *size, device=device, dtype=dtype, memory_format=layout)
        points = _random_points(size, scattered, generator).contiguous().to(device)
        if not planes:  # what a convolution of 2 * P channels writes: (x, y) innermost
            points = points.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
        levels.append((_fill(empty, generator), points))
    return levels


def _forward(gather: Gather, make_levels: Callable[[], list[Level]]) -> Step:
    levels = make_levels()

    def step() -> list[Tensor]:
        with torch.no_grad():
            return [gather(*level) for level in levels]

    return step


def _forward_backward(
    gather: Gather, make_levels: Callable[[], list[Level]], weights: Sequence[Tensor] = ()
) -> Step:
    """The step returns the gradients of maps and points level by level, then of the weights."""
    levels = make_levels()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        upstream = [_fill(torch.empty_like(gather(*level)), generator) for level in levels]
    leaves = [tensor.requires_grad_() for level in levels for tensor in level] + list(weights)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad([gather(*level) for level in levels], leaves, upstream)

    return step


def _least_bytes(backward: bool, dtype: torch.dtype) -> int:
    """Maps, points (always float32), results and gradients of a collection, each moved once."""
    maps, result = _POINTS * _CLASSES * dtype.itemsize, _CLASSES * dtype.itemsize
    points = _POINTS * 2 * torch.float32.itemsize
    forward = maps + points + result
    # The backward reads gradients of results, maps and points, and writes gradients of both.
    moved = 2 * forward + maps + points if backward else forward
    return moved * sum(height * width for height, width in _SIZES)


def _collection(
    reference: Gather,
    reference_name: str,
    target: float,
    *,
    backward: bool = False,
    scattered: bool = False,
    planes: bool = False,
    reference_planes: bool = True,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    floor_target: float | None = None,
) -> Row:
    """PDNet's class maps: each point reads the classes' scores in its own group of channels."""
    run: Any = _forward_backward if backward else _forward
    channels = _POINTS * _CLASSES
    given = partial(_levels, channels, scattered=scattered, device=device, dtype=dtype)
    ours = partial(dynamic_point_gather, reduction="sum")
    where = "anywhere on the map" if scattered else f"within {_REACH} cells of their own"
    layouts = ["contiguous" if side else "channels-last" for side in (planes, reference_planes)]
    return Row(
        ours=lambda: run(ours, partial(given, planes=planes)),
        reference=lambda: run(reference, partial(given, planes=reference_planes)),
        reference_name=reference_name,
        target=target,
        setting=(
            f"P3..P7 of one 800x1333 image, {_CLASSES} classes, {_POINTS} points {where}, "
            f"{str(dtype).removeprefix('torch.')} maps, ours {layouts[0]}, theirs {layouts[1]}"
        ),
        device=device,
        least_bytes=_least_bytes(backward, dtype),
        floor_target=floor_target,
    )


def _clone(maps: Tensor, points: Tensor) -> Tensor:
    return maps.clone()


def _offsets(points: Tensor) -> Tensor:
    """Points -> what ``deform_conv2d`` wants: (y, x) from where the tap of a kernel would read."""
    height, width = points.shape[-2:]
    cells = grid_cells((height, width), device=points.device, dtype=points.dtype)
    taps = grid_cells(_KERNEL, device=points.device, dtype=points.dtype) - 1
    offsets = points - cells.T.reshape(2, height, width) - taps[:, :, None, None]
    return offsets.flip(2).flatten(1, 2).contiguous()


def _salt(ours: bool, device: str) -> Step:
    """A 3x3 convolution of the pyramid's maps at points of its own, with all gradients."""
    weight = torch.empty(_CHANNELS, _CHANNELS, *_KERNEL, device=device)
    _fill(weight, torch.Generator().manual_seed(2)).mul_(0.02).requires_grad_()
    given = partial(_levels, _CHANNELS, scattered=False, device=device, dtype=torch.float32)
    if ours:
        convolve: Gather = partial(deformable_point_conv, weight=weight)
        return _forward_backward(convolve, partial(given, planes=False), [weight])

    def levels() -> list[Level]:
        return [(maps, _offsets(points)) for maps, points in given(planes=True)]

    return _forward_backward(partial(deform_conv2d, weight=weight, padding=1), levels, [weight])


def _salt_row(target: float, device: str) -> Row:
    return Row(
        ours=lambda: _salt(True, device),
        reference=lambda: _salt(False, device),
        reference_name="torchvision deform_conv2d",
        target=target,
        setting=(
            f"P3..P7 of one 800x1333 image, {_CHANNELS} channels, {_POINTS} points within {_REACH} "
            f"cells of their own into a 3x3 weight for {_CHANNELS} channels, float32, ours "
            "channels-last, theirs contiguous; offsets made beforehand"
        ),
        device=device,
        peak_target=1.0,
    )


_by_grid_sample = partial(_collection, by_grid_sample, "batched grid_sample")
_by_embedding_bag = partial(_collection, by_embedding_bag, "embedding_bag", reference_planes=False)
_forward_on_gpu = partial(_by_grid_sample, 1 / 3, device="cuda")
_both_on_gpu = partial(_by_grid_sample, 1.0, device="cuda", backward=True)
_FORWARD_FLOOR = 1.5
_BOTH_FLOOR = 2.15  # 1.5 of the forward's bytes, 2.5 of the backward's

ROWS: dict[str, Row] = {
    "pdnet_gather_forward": _by_grid_sample(1 / 6),
    "pdnet_gather_forward_backward": _by_grid_sample(1 / 7, backward=True),
    "pdnet_gather_forward_scattered": _by_grid_sample(1 / 4, scattered=True),
    "pdnet_gather_forward_backward_scattered": _by_grid_sample(
        1 / 5, backward=True, scattered=True
    ),
    "pdnet_gather_forward_backward_planes": _by_grid_sample(1.0, backward=True, planes=True),
    "pdnet_gather_forward_vs_sparse": _collection(
        by_sparse_matrix, "sparse CSR matrix", 1 / 2, reference_planes=False
    ),
    "pdnet_gather_forward_vs_clone": _collection(
        _clone, "clone of the maps", 0.5, reference_planes=False
    ),
    "pdnet_gather_forward_vs_embedding_bag": _by_embedding_bag(1.0),
    "pdnet_gather_forward_backward_vs_embedding_bag": _by_embedding_bag(1.0, backward=True),
    "salt_gather_forward_backward": _salt_row(1 / 1.5, "cpu"),
    "pdnet_gather_forward_cuda": _forward_on_gpu(floor_target=_FORWARD_FLOOR),
    "pdnet_gather_forward_backward_cuda": _both_on_gpu(floor_target=_BOTH_FLOOR),
    "pdnet_gather_forward_scattered_cuda": _forward_on_gpu(scattered=True),
    "pdnet_gather_forward_backward_scattered_cuda": _both_on_gpu(scattered=True),
    "pdnet_gather_forward_bfloat16_cuda": _forward_on_gpu(
        dtype=torch.bfloat16, floor_target=_FORWARD_FLOOR
    ),
    "pdnet_gather_forward_backward_bfloat16_cuda": _both_on_gpu(
        dtype=torch.bfloat16, floor_target=_BOTH_FLOOR
    ),
    "salt_gather_forward_backward_cuda": _salt_row(1.0, "cuda"),
}
