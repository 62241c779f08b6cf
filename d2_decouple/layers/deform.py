# SPDX-License-Identifier: Apache-2.0
"""Bottleneck blocks with a deformable 3x3 convolution, for Detectron2's ``ResNet`` stages.

Detectron2's own deformable block needs its compiled part, which is often missing; this one runs on
torchvision's operator, on any device. Names in a checkpoint are Detectron2's.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.resnet import BottleneckBlock, CNNBlockBase
from fvcore.nn import weight_init
from torch import Tensor, nn
from torchvision.ops import DeformConv2d, deform_conv2d

from .norms import norm_layer
from .precision import at_least_float32

__all__ = [
    "RES2_CHANNELS",
    "DeformBottleneckBlock",
    "DeformConv",
    "OffsetDeformConv",
    "deform_from_res3",
    "deform_from_res4",
    "resnext_block",
]

_TAPS = 9  # of a 3x3 convolution
RES2_CHANNELS = 256  # of the output of every bottleneck ResNet's first stage; res3 has twice that
_RES2_BOTTLENECK = 64


class DeformConv(DeformConv2d):
    """3x3 deformable convolution with a norm behind it, without a bias.

    Everything that an offset touches is computed in float32, whatever autocast says: bfloat16
    knows coordinates beyond 128 only to a whole cell. The result has the input's dtype.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        norm: str | Callable[[int], nn.Module] = "",
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            3,
            stride=stride,
            padding=dilation,
            dilation=dilation,
            groups=groups,
            bias=False,
        )
        self.norm = norm_layer(norm, out_channels)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            input: (N, C, H, W).
            offset: (N, 2 * 9 * G, H', W') in cells of the input, (y, x) of each tap, rows of the
                kernel first; G groups of channels have offsets of their own.
            mask: (N, 9 * G, H', W') factors of the values read, or None for 1.

        Returns:
            (N, C', H', W').
        """
        with torch.autocast(input.device.type, enabled=False):
            output = deform_conv2d(
                at_least_float32(input),
                at_least_float32(offset),
                at_least_float32(self.weight),
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                mask=None if mask is None else at_least_float32(mask),
            )
        output = output.to(input.dtype)
        return output if self.norm is None else self.norm(output)


class _OffsetConv(DeformConv2d):
    """Plain 3x3 convolution that makes offsets: in float32, and 0 until it has learned something.

    It is no ``nn.Conv2d``, so that nothing that stores convolutions in half precision takes it for
    one. ``DeformConv2d`` brings the parameters and their names.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, dilation: int) -> None:
        super().__init__(
            in_channels, out_channels, 3, stride=stride, padding=dilation, dilation=dilation
        )
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out_channels, H', W')."""
        with torch.autocast(input.device.type, enabled=False):
            return F.conv2d(
                at_least_float32(input),
                self.weight,
                self.bias,
                self.stride,
                self.padding,
                self.dilation,
            )


class OffsetDeformConv(DeformConv):
    """3x3 deformable convolution that makes its offsets, and factors, itself; without a bias.

    The second version (Zhu et al., 2019) with one group of offsets; without ``modulated`` the
    first one (Dai et al., 2017). Its weight has the name of a plain convolution's, so that such a
    one's checkpoint loads; ``conv_offset`` begins with zeros.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        modulated: bool = True,
        stride: int = 1,
        norm: str | Callable[[int], nn.Module] = "",
    ) -> None:
        super().__init__(in_channels, out_channels, stride=stride, norm=norm)
        self.modulated = modulated
        numbers_per_tap = 3 if modulated else 2
        self.conv_offset = _OffsetConv(
            in_channels, numbers_per_tap * _TAPS, stride=stride, dilation=1
        )

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """(N, C, H, W) -> (N, C', H', W')."""
        offset, mask = _split_offsets(self.conv_offset(input), self.modulated)
        return super().forward(input, offset, mask)


def _split_offsets(outputs: Tensor, modulated: bool) -> tuple[Tensor, Tensor | None]:
    """Offsets, and factors from 0 to 1 or None, of what an offset convolution answers."""
    if not modulated:
        return outputs, None
    # Detectron2's order: both coordinates of all taps, then all factors.
    size = outputs.shape[1] // 3
    return outputs[:, : 2 * size], outputs[:, 2 * size :].sigmoid()


class DeformBottleneckBlock(BottleneckBlock):
    """Detectron2's bottleneck block whose 3x3 convolution reads at learned places.

    Deformable convolution (Dai et al., 2017), or with ``deform_modulated`` its second version
    (Zhu et al., 2019), which also weighs each value by a learned factor from 0 to 1. A new block
    has no offsets and so equals the plain block with the same weights; the factors of the second
    version all begin at a half, as everywhere.

    It takes the arguments of Detectron2's ``DeformBottleneckBlock`` and has the same parameters
    (``conv1``, ``conv2_offset``, ``conv2``, ``conv3``, ``shortcut``) with the same meaning, so
    weights move between the two and from a plain ResNet. Inputs and outputs are (N, C, H, W).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        num_groups: int = 1,
        norm: str | Callable[[int], nn.Module] = "BN",
        stride_in_1x1: bool = False,
        dilation: int = 1,
        deform_modulated: bool = False,
        deform_num_groups: int = 1,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            bottleneck_channels=bottleneck_channels,
            stride=stride,
            num_groups=num_groups,
            norm=norm,
            stride_in_1x1=stride_in_1x1,
            dilation=dilation,
        )
        self.deform_modulated = deform_modulated
        numbers_per_tap = 3 if deform_modulated else 2
        own_stride = 1 if stride_in_1x1 else stride
        self.conv2_offset = _OffsetConv(
            bottleneck_channels,
            numbers_per_tap * _TAPS * deform_num_groups,
            stride=own_stride,
            dilation=dilation,
        )
        self.conv2 = DeformConv(
            bottleneck_channels,
            bottleneck_channels,
            stride=own_stride,
            dilation=dilation,
            groups=num_groups,
            norm=norm,
        )
        weight_init.c2_msra_fill(self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H', W')."""
        inner = F.relu_(self.conv1(x))
        offset, mask = _split_offsets(self.conv2_offset(inner), self.deform_modulated)
        inner = F.relu_(self.conv2(inner, offset, mask))
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return F.relu_(self.conv3(inner) + shortcut)


def deform_from_res3(**options: Any) -> CNNBlockBase:
    """A deformable block in res3, res4 and res5, a plain one in res2.

    To be the ``block_class`` of ``ResNet.make_default_stages``, which calls it with the channels of
    the stage and by them says which it is. Other stages are chosen with ``ResNet.make_stage``.
    """
    return _deform_above(RES2_CHANNELS, **options)


def deform_from_res4(**options: Any) -> CNNBlockBase:
    """A deformable block in res4 and res5, a plain one in res2 and res3; see above."""
    return _deform_above(2 * RES2_CHANNELS, **options)


def _deform_above(
    plain_channels: int,
    *,
    out_channels: int,
    deform_modulated: bool = False,
    deform_num_groups: int = 1,
    **options: Any,
) -> CNNBlockBase:
    if out_channels <= plain_channels:
        return BottleneckBlock(out_channels=out_channels, **options)
    return DeformBottleneckBlock(
        out_channels=out_channels,
        deform_modulated=deform_modulated,
        deform_num_groups=deform_num_groups,
        **options,
    )


def resnext_block(
    *,
    bottleneck_channels: int,
    num_groups: int,
    width_per_group: int,
    block: Callable[..., CNNBlockBase] = BottleneckBlock,
    **options: Any,
) -> CNNBlockBase:
    """A block of a ResNeXt, to be the ``block_class`` of ``ResNet.make_default_stages``.

    That function knows the widths of a ResNet alone.

    Args:
        bottleneck_channels: of the ResNet's block in its place.
        num_groups: of the 3x3 convolution, such as the 64 of "64x4d".
        width_per_group: channels of a group in res2, such as the 4 of "64x4d".
        block: what is made, with the ResNeXt's number of channels.
        options: other arguments of ``block``.
    """
    channels = bottleneck_channels * num_groups * width_per_group // _RES2_BOTTLENECK
    return block(bottleneck_channels=channels, num_groups=num_groups, **options)
