# SPDX-License-Identifier: Apache-2.0
"""Convolution whose taps read a map at points of their own: deformable convolution."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from .point_gather import autocast_enabled, deformable_point_gather

__all__ = ["deformable_point_conv"]

# The points are worked off in so many parts, one after the other, and what is gathered at one part
# is all that is ever held of it: less than torchvision's deform_conv2d holds, which has a column
# for every point. More parts cost time, for each adds up results and gradients of its own.
_PARTS = 2


def deformable_point_conv(
    features: Tensor, points: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Read all channels at each point, and sum over points and channels with weights.

    This is ``torchvision.ops.deform_conv2d`` with the offsets ``points - location - kernel grid``
    (SALT-Net, section III-B: its points already stand where they shall be read), and the same as
    :func:`~d2_decouple.layers.point_gather.deformable_point_gather` with a 1x1 convolution over
    all points' channels behind it. What was gathered is not kept for the backward but gathered
    again. Under autocast everything but the points is in autocast's dtype, as in a convolution.

    Args:
        features: (N, C, H, W); channels-last ones are read without a copy.
        points: (N, P, 2, Ho, Wo), (x, y) in cells of ``features``, an integer being the centre of
            a cell; float32 (float64 with float64 features).
        weight: (out, C, kh, kw) with kh * kw = P; point p meets row p // kw, column p % kw.
        bias: (out,).

    Returns:
        (N, out, Ho, Wo), channels-last.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit each other.
    """
    _check_shapes(features, points, weight, bias)
    device = features.device.type
    if autocast_enabled(device) and features.dtype != torch.float64:
        # Here and not inside: the backward shall have the same dtypes.
        dtype = torch.get_autocast_dtype(device)
        features, points, weight = features.to(dtype), points.float(), weight.to(dtype)
    features = features.contiguous(memory_format=torch.channels_last)
    taps = weight.flatten(2).transpose(1, 2)  # (out, P, C)
    size = -(-taps.shape[1] // _PARTS)
    parts = [
        _part(features, some_points, some_taps)
        for some_points, some_taps in zip(points.split(size, 1), taps.split(size, 1), strict=True)
    ]
    output = sum(parts[1:], start=parts[0])
    if bias is not None:
        output = output + bias.to(output.dtype)[:, None, None]
    return output.contiguous(memory_format=torch.channels_last)


def _part(features: Tensor, points: Tensor, taps: Tensor) -> Tensor:
    """What some points contribute, (N, out, Ho, Wo); their ``taps`` are (out, P, C)."""
    gathered = deformable_point_gather(features, points)
    if 0 in gathered.shape[-2:]:  # which conv2d refuses
        return torch.einsum("nkhw,ok->nohw", gathered, taps.flatten(1))
    return _PointwiseConv.apply(gathered, features, points, taps.flatten(1)[:, :, None, None])


class _PointwiseConv(torch.autograd.Function):
    """A 1x1 convolution of what was gathered, which forgets it and gathers it again."""

    @staticmethod
    def forward(
        ctx: Any, gathered: Tensor, features: Tensor, points: Tensor, taps: Tensor
    ) -> Tensor:
        ctx.save_for_backward(features, points, taps)
        return F.conv2d(gathered, taps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        """Features and points have their gradients through ``gathered``."""
        features, points, taps = ctx.saved_tensors
        grad_gathered = grad_taps = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[3]:  # first: what is gathered has gone when its gradient comes
                gathered = deformable_point_gather(features, points)
                grad_taps = conv2d_weight(gathered, taps.shape, grad)
                del gathered
            if ctx.needs_input_grad[0]:
                grad_gathered = F.conv2d(grad, taps.transpose(0, 1))
        return grad_gathered, None, None, grad_taps


def _check_shapes(features: Tensor, points: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 4 or not weight.numel():
        raise RuntimeError(
            f"weight has shape {tuple(weight.shape)}; wanted is (out, C, kh, kw), none of them 0"
        )
    _, channels, height, width = weight.shape
    if features.dim() != 4 or features.shape[1] != channels:
        raise RuntimeError(
            f"features have shape {tuple(features.shape)}; wanted is (N, {channels}, H, W) with a "
            f"weight of shape {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise RuntimeError(
            f"bias has shape {tuple(bias.shape)}; wanted is ({weight.shape[0]},) with a weight of "
            f"shape {tuple(weight.shape)}"
        )
    taps = height * width
    if points.dim() != 5 or tuple(points.shape[1:3]) != (taps, 2):
        raise RuntimeError(
            f"points have shape {tuple(points.shape)}; wanted is (N, {taps}, 2, Ho, Wo), one for "
            f"each tap of a {height}x{width} weight"
        )
