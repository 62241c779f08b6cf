# SPDX-License-Identifier: Apache-2.0
"""Normalisation layers as callables of the number of channels, as Detectron2 takes them."""

from math import gcd

from torch import nn

__all__ = ["group_norm"]


def group_norm(channels: int) -> nn.GroupNorm:
    """Detectron2's "GN": 32 groups, and fewer only where 32 do not divide the channels.

    Detectron2's dense heads of 2022 try their norm on a single channel. Their own "GN" fails at
    that with today's torch; this one does not.
    """
    return nn.GroupNorm(gcd(32, channels), channels)
