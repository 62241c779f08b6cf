# SPDX-License-Identifier: Apache-2.0
"""What aligners are made of: features that are read at points, and the points in pixels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers.norms import Norm, norm_layer
from ..layers.point_conv import deformable_point_conv
from ..layers.points import Grid, grid_cells
from ..layers.precision import at_least_float32
from ..layers.tower import init_conv
from .head import map_size

__all__ = ["Norm", "PointAlignment", "check_channels", "float32_rows", "points_in_pixels"]


class PointAlignment(nn.Module):
    """What is read at a cell's points becomes its feature (SALT-Net, Sec. 3.3, Eqs. 7 and 8).

    A deformable convolution whose taps read at ``cell + point``, a norm and a ReLU. (Eq. 7 adds the
    window of an ordinary convolution; the authors' code takes it off again.)
    """

    def __init__(self, *, channels: int, num_points: int, norm: Norm) -> None:
        """
        Args:
            channels: C of the features.
            num_points: P; each has a tap, in the order of the kernel's rows.
            norm: a name Detectron2's ``get_norm`` knows, a callable from channels to module, or "".
        """
        super().__init__()
        side = math.isqrt(num_points)
        kernel = (side, side) if side * side == num_points else (1, num_points)
        # It only holds the weight, under the name and in the shape that checkpoints have.
        self.conv = nn.Conv2d(channels, channels, kernel, bias=False)
        init_conv(self.conv)
        made = norm_layer(norm, channels)
        self.norm = nn.Identity() if made is None else made

    def forward(self, feature: Tensor, points: Tensor) -> Tensor:
        """
        Args:
            feature: (N, C, H, W).
            points: (N, H, W, P, 2), (x, y) in cells, relative to each cell.

        Returns:
            (N, C, H, W).
        """
        size = map_size(feature)
        cells = grid_cells(size, device=points.device, dtype=points.dtype).view(*size, 1, 2)
        where = (cells + points).permute(0, 3, 4, 1, 2)  # (N, P, 2, H, W)
        return self.norm(deformable_point_conv(feature, where, self.conv.weight)).relu()


def float32_rows(conv: nn.Module, feature: Tensor) -> Tensor:
    """(N, H, W, outputs) of a convolution, in float32 whatever autocast says."""
    with torch.autocast(feature.device.type, enabled=False):
        return conv(at_least_float32(feature)).permute(0, 2, 3, 1)


def points_in_pixels(points: Sequence[Tensor], grid: Grid) -> Tensor:
    """(N, R, P, 2) pixels, without gradient, of each level's (N, H, W, P, 2) relative cells."""
    flat = torch.cat([level.detach().flatten(1, 2) for level in points], dim=1)
    return grid.locations[:, None] + flat * grid.strides[:, None, None]


def check_channels(aligner: nn.Module, channels: int, **maps: Tensor) -> None:
    """Raise ValueError unless the named maps (N, C, H, W) have that many channels."""
    for name, feature in maps.items():
        if feature.shape[1] != channels:
            raise ValueError(
                f"the {name.replace('_', ' ')} has {feature.shape[1]} channels, "
                f"{type(aligner).__name__} expects {channels}; make model.head.aligner.channels, "
                "and the last of model.head.cls_conv_dims and of model.head.box_conv_dims, what "
                "the pyramid has"
            )
