# SPDX-License-Identifier: Apache-2.0
"""Normalisation layers by name, or as callables of the number of channels."""

from collections.abc import Callable
from math import gcd
from typing import TypeAlias

from detectron2.layers import get_norm
from torch import nn

__all__ = ["Norm", "group_norm", "norm_layer"]

Norm: TypeAlias = str | Callable[[int], nn.Module]


def norm_layer(norm: Norm, channels: int) -> nn.Module | None:
    """The layer that Detectron2's ``get_norm`` makes of a name.

    Args:
        norm: a name such as "GN", a callable from channels to module, or "" (or what else is
            false) for none.
        channels: of the maps that are normalised.

    Raises:
        ValueError: a name that Detectron2 does not know, in the place of its bare ``KeyError``.
    """
    if not norm:
        return None
    try:
        made: nn.Module | None = get_norm(norm, channels)
    except KeyError:
        if not isinstance(norm, str):
            raise
        raise ValueError(
            f"norm is {norm!r}; wanted is a name that Detectron2 knows, such as GN, BN or SyncBN, "
            "or an empty one for no normalisation (as in model.head.norm=)"
        ) from None
    return made


def group_norm(channels: int) -> nn.GroupNorm:
    """Detectron2's "GN": 32 groups, and fewer only where 32 do not divide the channels.

    Detectron2's dense heads of 2022 try their norm on a single channel. Their own "GN" fails at
    that with today's torch; this one does not.
    """
    return nn.GroupNorm(gcd(32, channels), channels)
