# SPDX-License-Identifier: Apache-2.0
"""Towers with one deformable convolution; see :mod:`.tower`."""

from collections.abc import Callable, Sequence

from torch import nn

from .deform import OffsetDeformConv
from .tower import bias_free_tower

__all__ = ["deform_first_tower", "deform_last_tower"]


def deform_last_tower(
    *,
    in_channels: int,
    conv_dims: Sequence[int],
    norm: str | Callable[[int], nn.Module] = "GN",
) -> nn.Sequential:
    """A tower whose last convolution deforms, with learned factors (VarifocalNet's)."""
    return _deformed(-1, in_channels, conv_dims, norm, modulated=True)


def deform_first_tower(
    *,
    in_channels: int,
    conv_dims: Sequence[int],
    norm: str | Callable[[int], nn.Module] = "GN",
) -> nn.Sequential:
    """A tower whose first convolution deforms, by offsets alone (DDOD's)."""
    return _deformed(0, in_channels, conv_dims, norm, modulated=False)


def _deformed(
    which: int,
    in_channels: int,
    conv_dims: Sequence[int],
    norm: str | Callable[[int], nn.Module],
    *,
    modulated: bool,
) -> nn.Sequential:
    tower = bias_free_tower(in_channels=in_channels, conv_dims=conv_dims, norm=norm)
    plain = [(index, part) for index, part in enumerate(tower) if isinstance(part, nn.Conv2d)]
    if plain:
        place, conv = plain[which]
        deformed = OffsetDeformConv(conv.in_channels, conv.out_channels, modulated=modulated)
        nn.init.normal_(deformed.weight, std=0.01)
        tower[place] = deformed
    return tower
