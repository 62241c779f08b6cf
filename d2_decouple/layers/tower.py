# SPDX-License-Identifier: Apache-2.0
"""The stack of convolutions that a head puts in front of its predictors."""

from collections.abc import Sequence

from torch import nn

from .norms import Norm, norm_layer

__all__ = ["bias_free_tower", "conv_tower", "init_conv"]


def init_conv(module: nn.Module, *, std: float = 0.01, bias: float = 0.0) -> None:
    """Draw the weights of every convolution in ``module`` from N(0, std), set biases."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.constant_(part.bias, bias)


def conv_tower(
    *,
    in_channels: int,
    conv_dims: Sequence[int],
    norm: Norm = "GN",
    bias: bool = True,
) -> nn.Sequential:
    """3x3 convolutions, each followed by a normalisation (if any) and ReLU; the size is kept.

    The parts lie flat in one ``Sequential``, as in Detectron2's RetinaNet and FCOS heads, so
    that the names in a checkpoint agree.

    Args:
        in_channels: channels of the input map (N, C, H, W).
        conv_dims: output channels of each convolution; empty gives the identity.
        norm: a name Detectron2's ``get_norm`` knows, a callable from channels to module, or "".
        bias: whether the convolutions have a bias.
    """
    parts: list[nn.Module] = []
    for channels in conv_dims:
        parts.append(nn.Conv2d(in_channels, channels, 3, padding=1, bias=bias))
        made = norm_layer(norm, channels)
        if made is not None:
            parts.append(made)
        parts.append(nn.ReLU(inplace=True))
        in_channels = channels
    tower = nn.Sequential(*parts)
    init_conv(tower)
    return tower


def bias_free_tower(
    *,
    in_channels: int,
    conv_dims: Sequence[int],
    norm: Norm = "GN",
) -> nn.Sequential:
    """:func:`conv_tower` whose convolutions have no bias: the norm behind each brings one."""
    return conv_tower(in_channels=in_channels, conv_dims=conv_dims, norm=norm, bias=False)
