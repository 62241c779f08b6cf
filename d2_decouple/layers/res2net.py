# SPDX-License-Identifier: Apache-2.0
"""Res2Net (Gao et al., TPAMI 2021) in its version v1d, as parts of Detectron2's ``ResNet``.

Version v1b and v1d name one network: Res2Net's blocks, a stem of three 3x3 convolutions, and
shortcuts that average before they project.
"""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling.backbone.resnet import CNNBlockBase
from fvcore.nn import weight_init
from torch import Tensor, nn

from .deform import RES2_CHANNELS, OffsetDeformConv
from .norms import Norm, norm_layer

__all__ = [
    "DeepStem",
    "DeformRes2NetBlock",
    "Res2NetBlock",
    "res2net_deform_from_res3",
    "res2net_deform_from_res4",
]

_PLAIN_WIDTH = 64  # channels of a ResNet's 3x3 convolutions in res2, which base_width replaces


class DeepStem(CNNBlockBase):
    """Three 3x3 convolutions in the place of ResNet's 7x7, then the same maximum; stride 4."""

    def __init__(self, in_channels: int = 3, out_channels: int = 64, *, norm: Norm = "BN") -> None:
        """
        Args:
            in_channels: of the image.
            out_channels: of the last convolution; the first two have half of them.
            norm: behind each convolution.
        """
        super().__init__(in_channels, out_channels, 4)
        half = out_channels // 2
        self.conv1 = _conv(in_channels, half, 3, norm, stride=2)
        self.conv2 = _conv(half, half, 3, norm)
        self.conv3 = _conv(half, out_channels, 3, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, ceil(H / 4), ceil(W / 4))."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu_(conv(x))
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class Res2NetBlock(CNNBlockBase):
    """Bottleneck block whose 3x3 convolution is a row of smaller ones (Sec. 3.1).

    The channels are split into ``scales`` groups. Each but the last has a convolution, which
    reads its group plus what the convolution before made; the last group passes. The first block
    of a stage, that with a shortcut of its own, adds nothing, and where its stride is 2 the last
    group is averaged over 3x3 cells. Convolutions are named ``conv1``, ``convs.N``, ``conv3`` and
    ``shortcut``, each with its ``norm``.

    Departure: mmdetection's Res2Net, with which SALT-Net was trained, averages at stride 2 alone,
    and so does this one; Res2Net's own code and timm average in the first block of res2, too.
    ``averages_at_stride_1`` does it as they do.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        norm: Norm = "BN",
        base_width: int = 26,
        scales: int = 4,
        averages_at_stride_1: bool = False,
    ) -> None:
        """
        Args:
            in_channels: of the input.
            out_channels: of the output.
            bottleneck_channels: of the 3x3 convolution of a ResNet's block in this place.
            stride: of the 3x3 convolutions.
            norm: behind each convolution.
            base_width: channels of a group in res2, such as the 26 of "26w4s".
            scales: number of groups, such as the 4 of "26w4s"; at least 2.
            averages_at_stride_1: whether a first block without a stride averages, too.

        Raises:
            ValueError: fewer than two groups.
        """
        super().__init__(in_channels, out_channels, stride)
        if scales < 2:
            raise ValueError(
                f"scales is {scales}, but a Res2Net has at least 2 groups: set "
                "model.backbone.bottom_up.stages.scales=4, or take Detectron2's BottleneckBlock"
            )
        width = bottleneck_channels * base_width // _PLAIN_WIDTH
        self.conv1 = _conv(in_channels, width * scales, 1, norm)
        self.convs = nn.ModuleList(self._inner_conv(width, stride, norm) for _ in range(scales - 1))
        self.conv3 = _conv(width * scales, out_channels, 1, norm)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = _conv(in_channels, out_channels, 1, norm)
        self._averages = stride != 1 or (averages_at_stride_1 and self.shortcut is not None)

    def _inner_conv(self, width: int, stride: int, norm: Norm) -> nn.Module:
        return _conv(width, width, 3, norm, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        *groups, last = F.relu_(self.conv1(x)).chunk(len(self.convs) + 1, 1)
        read: list[Tensor] = []
        for group, conv in zip(groups, self.convs, strict=True):
            alone = self.shortcut is not None or not read
            read.append(F.relu_(conv(group if alone else group + read[-1])))
        if self._averages:
            last = F.avg_pool2d(last, 3, self.stride, padding=1)
        out = self.conv3(torch.cat((*read, last), 1))
        return F.relu_(out + self._passed_by(x))

    def _passed_by(self, x: Tensor) -> Tensor:
        """What is added at the end: the input, averaged over a cell of the output's size."""
        if self.shortcut is None:
            return x
        if self.stride != 1:
            # An incomplete window at the end counts the cells that it has.
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        return self.shortcut(x)


class DeformRes2NetBlock(Res2NetBlock):
    """The same with deformable 3x3 convolutions (Dai et al., 2017), each with its own offsets.

    A new block equals the plain one with the same weights. Beside its names there are
    ``convs.N.conv_offset``.
    """

    def _inner_conv(self, width: int, stride: int, norm: Norm) -> nn.Module:
        conv = OffsetDeformConv(width, width, modulated=False, stride=stride, norm=norm)
        weight_init.c2_msra_fill(conv)
        return conv


def res2net_deform_from_res3(**options: Any) -> CNNBlockBase:
    """A deformable block in res3, res4 and res5, a plain one in res2.

    To be the ``block_class`` of ``ResNet.make_default_stages``, which calls it with the channels of
    the stage and by them says which it is.
    """
    return _deform_above(RES2_CHANNELS, **options)


def res2net_deform_from_res4(**options: Any) -> CNNBlockBase:
    """A deformable block in res4 and res5, a plain one in res2 and res3; see above."""
    return _deform_above(2 * RES2_CHANNELS, **options)


def _deform_above(plain_channels: int, *, out_channels: int, **options: Any) -> CNNBlockBase:
    block = Res2NetBlock if out_channels <= plain_channels else DeformRes2NetBlock
    return block(out_channels=out_channels, **options)


def _conv(
    in_channels: int, out_channels: int, kernel_size: int, norm: Norm, *, stride: int = 1
) -> Conv2d:
    """Detectron2's convolution with a norm and without a bias, drawn as in its ResNet."""
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        bias=False,
        norm=norm_layer(norm, out_channels),
    )
    weight_init.c2_msra_fill(conv)
    return conv
