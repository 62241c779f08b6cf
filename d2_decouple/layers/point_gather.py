# SPDX-License-Identifier: Apache-2.0
"""Values of maps at fractional points: one operator for dynamic and for deformable points.

*Dynamic points* (PDNet, section III): each point of a location reads channels of its own.
*Deformable points* (SALT-Net; deformable convolution): each point reads all channels.

Points are (x, y) in cells of the map that is read, an integer being the centre of a cell, and are
always float32 (float64 for float64 maps): half precision is too coarse for coordinates. Values
between cells are bilinear, cells outside the map are zero, so a value fades to zero over one cell
and a point is ignored unless ``-1 < x < W`` and ``-1 < y < H``; one that is not a number is, too.
On a whole number the derivative is the right-hand one. The kernels have no second derivative, nor
do they work in ``torch.func``'s transforms.

The compiled kernels of ``csrc/`` are used where they are loaded (:mod:`d2_decouple.extension`),
``grid_sample`` elsewhere and where a program is exported, so that it runs anywhere.
"""

import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import extension

__all__ = ["deformable_point_gather", "dynamic_point_gather", "reference_point_gather"]

REDUCTIONS = {"none": False, "sum": True}
HALF_DTYPES = (torch.bfloat16, torch.float16)
MAP_DTYPES = (torch.float32, torch.float64, *HALF_DTYPES)

_EXTENSION = extension.status()  # read once: torch.compile would trace the reading

# torch 2.4 to 2.6 cannot tell that they export: there the program keeps the operator.
is_exporting = getattr(torch.compiler, "is_exporting", bool)


def dynamic_point_gather(maps: Tensor, points: Tensor, reduction: str = "none") -> Tensor:
    """Read each point in its own group of channels (PDNet, section III-B and III-C).

    Args:
        maps: (N, P * C, H, W); point p reads channels p * C to (p + 1) * C - 1.
        points: (N, P, 2, Ho, Wo), (x, y) in cells of ``maps``.
        reduction: "sum" adds the values of all points, "none" keeps them apart.

    Returns:
        (N, C, Ho, Wo) summed, or (N, P * C, Ho, Wo) with point p's values at p * C; in the dtype
        of ``maps``. The kernels write it channels-last unless ``maps`` are contiguous.

    Raises:
        ValueError: an unknown reduction.
        RuntimeError: shapes, dtypes or devices that do not fit each other.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; wanted is one of {sorted(REDUCTIONS)}")
    groups = points.shape[1] if points.dim() == 5 else 1
    return _gather(maps, points, groups, REDUCTIONS[reduction])


def deformable_point_gather(features: Tensor, points: Tensor) -> Tensor:
    """Read all channels at each point (SALT-Net, section III-B).

    Args:
        features: (N, C, H, W).
        points: (N, P, 2, Ho, Wo), (x, y) in cells of ``features``.

    Returns:
        (N, P * C, Ho, Wo) with point p's values at p * C; dtype and layout as those of
        :func:`dynamic_point_gather`. A 1x1 convolution of it is a deformable convolution.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit each other.
    """
    return _gather(features, points, 1, False)


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for a type of device; of "meta" torch does not know it."""
    return device != "meta" and torch.is_autocast_enabled(device)


def _gather(maps: Tensor, points: Tensor, groups: int, sum_points: bool) -> Tensor:
    if points.dtype in HALF_DTYPES and autocast_enabled(maps.device.type):
        points = points.float()
    device = maps.device.type
    has_kernel = {"cpu": _EXTENSION.cpu, "cuda": _EXTENSION.cuda}.get(device, False)
    if has_kernel and not is_exporting():
        return torch.ops.d2_decouple.point_gather(maps, points, groups, sum_points)
    if device == "cuda" and not has_kernel:
        _warn_once(_EXTENSION.reason)
    return reference_point_gather(maps, points, groups, sum_points)


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        "points are gathered by grid_sample on this GPU: the same results, but slower and with "
        f"more memory ({reason})",
        stacklevel=4,
    )


def reference_point_gather(
    maps: Tensor, points: Tensor, groups: int, sum_points: bool = False
) -> Tensor:
    """The same by ``grid_sample``, on any device: what the kernels are tested against.

    Args:
        maps: (N, groups * C, H, W).
        points: (N, P, 2, Ho, Wo), (x, y) in cells.
        groups: P, where each point reads its own channels, or 1, where each reads all.
        sum_points: add the values of all points.

    Returns:
        (N, C, Ho, Wo) summed, else (N, P * C, Ho, Wo).

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit each other.
    """
    _check(maps, points, groups)
    images, channels, height, width = maps.shape
    num_points, rows, columns = points.shape[1], points.shape[3], points.shape[4]
    share = channels // max(groups, 1)
    if 0 in (height, width):  # grid_sample wants a cell, and all outside is zero
        maps = F.pad(maps, (0, 1, 0, 1))
    if torch.is_grad_enabled() and points.requires_grad and maps.device.type != "mps":
        points = points.double()  # MPS has none; without a derivative float32 is exact enough
    x, y = points.unbind(2)  # (N, P, Ho, Wo) each
    inside = (x > -1) & (x < maps.shape[-1]) & (y > -1) & (y < maps.shape[-2])
    grid = torch.stack(
        (_to_frame(x, inside, maps.shape[-1]), _to_frame(y, inside, maps.shape[-2])), dim=-1
    )
    if groups == num_points:
        maps = maps.reshape(images * groups, share, *maps.shape[-2:])
        grid = grid.flatten(0, 1)  # one image for each point
    else:
        grid = grid.flatten(1, 2)  # the points of an image below each other
    values = F.grid_sample(maps.to(grid.dtype), grid, padding_mode="zeros", align_corners=False)
    if groups == num_points:
        values = values.reshape(images, num_points, share, rows, columns)
    else:
        values = values.reshape(images, share, num_points, rows, columns).transpose(1, 2)
    values = values.sum(1) if sum_points else values.flatten(1, 2)
    return values.to(maps.dtype)


def _to_frame(points: Tensor, inside: Tensor, size: int) -> Tensor:
    """One coordinate in cells of a map of ``size`` cells -> ``grid_sample``'s frame, -1 to 1.

    Changing the frame rounds, and a point on a whole number could end in the cell before it,
    where the derivative is another. So its place between two cells is kept off both by what
    rounding can do; the derivative passes as if it had not been moved. Points that are not
    ``inside``, NaN among them, go far away and have no derivative.
    """
    points = torch.where(inside, points, -9.0)
    with torch.no_grad():
        cells = points.floor()
        margin = 1.5 * torch.finfo(points.dtype).eps * (size + 1)
        shift = cells + (points - cells).clamp(margin, 1 - margin) - points
    return (2 * (points + shift) + 1 - size) / size


def _check(maps: Tensor, points: Tensor, groups: int) -> None:
    """Refuse what does not fit, as the compiled operator does."""
    if maps.dim() != 4:
        raise RuntimeError(f"maps have shape {_s(maps)}; wanted is (N, groups * C, H, W)")
    if points.dim() != 5 or points.shape[2] != 2:
        raise RuntimeError(f"points have shape {_s(points)}; wanted is (N, P, 2, Ho, Wo)")
    if points.shape[0] != maps.shape[0]:
        raise RuntimeError(
            f"points are of {points.shape[0]} images, maps of {maps.shape[0]}; wanted are as many"
        )
    num_points, channels = points.shape[1], maps.shape[1]
    if groups not in (1, num_points):
        raise RuntimeError(
            f"groups are {groups}; wanted is 1 or the number of points, {num_points}"
        )
    if channels % groups if groups else channels:
        raise RuntimeError(
            f"maps have {channels} channels; wanted is a multiple of {groups} groups"
        )
    if maps.dtype not in MAP_DTYPES:
        raise RuntimeError(
            f"maps are {maps.dtype}; wanted is float32, float64, bfloat16 or float16"
        )
    wanted = torch.float64 if maps.dtype == torch.float64 else torch.float32
    if points.dtype != wanted:
        raise RuntimeError(
            f"points are {points.dtype}; wanted is {wanted} with {maps.dtype} maps"
            + " (half precision is too coarse for coordinates)" * (points.dtype in HALF_DTYPES)
        )
    if points.device != maps.device:
        raise RuntimeError(f"points are on {points.device}, maps on {maps.device}; wanted is one")


def _s(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _output_shape(
    maps: Tensor, points: Tensor, groups: int, sum_points: bool
) -> tuple[int, int, int, int]:
    share = maps.shape[1] // max(groups, 1)
    channels = share if sum_points else points.shape[1] * share
    return maps.shape[0], channels, points.shape[3], points.shape[4]


def _layout(maps: Tensor) -> torch.memory_format:
    return torch.contiguous_format if maps.is_contiguous() else torch.channels_last


def _fake(maps: Tensor, points: Tensor, groups: int, sum_points: bool) -> Tensor:
    _check(maps, points, groups)
    shape = _output_shape(maps, points, groups, sum_points)
    return maps.new_empty(shape).contiguous(memory_format=_layout(maps))


def _fake_backward(
    grad: Tensor,
    maps: Tensor,
    points: Tensor,
    groups: int,
    sum_points: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    grad_maps = torch.empty_like(maps, memory_format=_layout(maps)) if output_mask[0] else None
    grad_points = torch.empty_like(points, memory_format=torch.contiguous_format)
    return (
        maps.new_empty(0) if grad_maps is None else grad_maps,
        grad_points if output_mask[1] else points.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, points, ctx.groups, ctx.sum_points = inputs
    ctx.save_for_backward(maps, points)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    mask = list(ctx.needs_input_grad[:2])
    grad_maps, grad_points = torch.ops.d2_decouple._point_gather_backward(
        grad, *ctx.saved_tensors, ctx.groups, ctx.sum_points, mask
    )
    return grad_maps if mask[0] else None, grad_points if mask[1] else None, None, None


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "point_gather has no second derivative, and was asked for one: by create_graph=True, or by "
        "a gradient of a gradient. grid_sample may have one: set D2D_USE_EXT=0"
    )


def _register() -> None:
    """What PyTorch must know of the compiled operators beside their kernels."""
    name = "d2_decouple::point_gather"
    torch.library.register_fake(name, _fake)
    torch.library.register_fake("d2_decouple::_point_gather_backward", _fake_backward)
    torch.library.register_autograd(name, _backward, setup_context=_setup_context)
    torch.library.register_autograd("d2_decouple::_point_gather_backward", _no_double_backward)


if _EXTENSION.loaded:
    _register()
