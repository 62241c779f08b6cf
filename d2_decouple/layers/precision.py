# SPDX-License-Identifier: Apache-2.0
"""Coordinates and what is computed from them need float32, whatever autocast says."""

import torch
from torch import Tensor

__all__ = ["at_least_float32"]


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor itself in float64, else in float32."""
    return x if x.dtype == torch.float64 else x.float()
