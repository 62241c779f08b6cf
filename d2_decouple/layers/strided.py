# SPDX-License-Identifier: Apache-2.0
"""Convolutions of stride 2 that TSCODE reads finer maps with."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .norms import norm_layer
from .tower import init_conv

__all__ = ["HalvingConv2d", "StridedConv"]


class HalvingConv2d(nn.Conv2d):
    """A convolution of stride 2 whose weight has a finite gradient on a map of one column, too.

    On a CPU, the backward pass of bfloat16 leaves the gradients of taps that touch nothing but
    padding there as the memory was. A second column of zeros makes them ordinary, and the result
    is the same.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', ceil(H / 2), ceil(W / 2))."""
        return super().forward(F.pad(input, (0, 1)) if input.shape[-1] == 1 else input)


class StridedConv(nn.Sequential):
    """A convolution of stride 2, a norm and a ReLU: TSCODE's DConv. Sizes are rounded up."""

    def __init__(
        self, channels: int, *, kernel_size: int = 3, norm: str = "GN", activation: bool = True
    ) -> None:
        """
        Args:
            channels: C of input and output.
            kernel_size: 3, 5 or 7.
            norm: a name Detectron2's ``get_norm`` knows, or "" for none, and then a bias.
            activation: whether there is a ReLU at the end.
        """
        conv = HalvingConv2d(
            channels, channels, kernel_size, stride=2, padding=kernel_size // 2, bias=not norm
        )
        parts = [conv, norm_layer(norm, channels), nn.ReLU(inplace=True) if activation else None]
        super().__init__(*(part for part in parts if part is not None))
        init_conv(self)

    def over_enlarged(self, level: Tensor, finer: Tensor) -> Tensor:
        """The same of ``finer`` plus ``level``, each of whose cells is copied to 2 x 2.

        Of a sum whose finer half needs no gradient (C2 of a frozen stage), a cell of ``level`` can
        have its own without that of its four copies: a convolution of four taps instead of nine,
        and none of the strided convolution's backward, the slowest of all on a CPU.

        Args:
            level: (N, C, H, W).
            finer: (N, C, 2 H, 2 W), or one row or column less.
        """
        conv, *rest = self
        size = (finer.shape[-2], finer.shape[-1])
        double = size == (2 * level.shape[-2], 2 * level.shape[-1])
        if double and not (torch.is_grad_enabled() and level.requires_grad):
            return self(_with_copies(finer, level))
        if not double or finer.requires_grad or conv.kernel_size != (3, 3):
            return self(F.interpolate(level, size, mode="nearest").add_(finer))
        total = conv(_with_copies(finer, level.detach()))
        output = _GradientOfLevel.apply(total, level, conv.weight)
        for part in rest:
            output = part(output)
        return output


def _with_copies(finer: Tensor, level: Tensor) -> Tensor:
    """(N, C, 2 H, 2 W) of ``finer`` plus 2 x 2 copies of each cell of ``level`` (N, C, H, W).

    The copies are never written; the backward of this would be slower than that of copies.
    """
    cells = finer.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (N, C, H, 2, W, 2)
    return (cells + level[:, :, :, None, :, None]).flatten(4, 5).flatten(2, 3)


class _GradientOfLevel(torch.autograd.Function):
    """The output of a strided 3x3 convolution, from which a map also gets its gradient that was
    enlarged and detached in front of it.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, level: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = level.dtype
        ctx.mark_dirty(output)  # it is handed on as it is, and may be changed in place
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (weight,) = ctx.saved_tensors
        # In each direction output o reads the copies 2o - 1, 2o and 2o + 1, which are the cells
        # o - 1, o and o: the second and the third tap see the same.
        for axis in (2, 3):
            first, second, third = weight.unbind(axis)
            weight = torch.stack((second + third, first), dim=axis)
        taps = weight.transpose(0, 1).to(gradient.dtype)
        of_level = F.conv2d(F.pad(gradient, (0, 1, 0, 1)), taps)
        return gradient, of_level.to(ctx.dtype), None
