# SPDX-License-Identifier: Apache-2.0
"""RepPoints' way to read features (Yang et al., ICCV 2019), as an aligner: what SALT competes with.

Points are free to go anywhere, a box is what they span, and both tasks read at the same ones.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers.points import Grid
from ..layers.tower import conv_tower, init_conv
from .point_alignment import (
    Norm,
    PointAlignment,
    check_channels,
    float32_rows,
    points_in_pixels,
)

__all__ = ["FreePoints"]


class FreePoints(nn.Module):
    """The aligner that reads both tasks' features at free points of the box branch.

    The coarse box is the least that holds all points (RepPoints, Sec. 3.3, the min-max function).
    What is read at the points teaches them a tenth as much as the coarse box's own loss (the
    authors' code). Coordinates are float32, whatever autocast says.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_points: int = 9,
        norm: Norm = "GN",
        gradient_factor: float = 0.1,
    ) -> None:
        """
        Args:
            channels: C of the ends of both towers.
            num_points: P.
            norm: normalisation behind each convolution.
            gradient_factor: of what the points learn through the features read at them.
        """
        super().__init__()
        if type(num_points) is not int or num_points < 2:
            raise ValueError(
                f"aligner.num_points is {num_points}; wanted are 2 or more, which span a box, such "
                "as 9"
            )
        if not 0 <= gradient_factor < math.inf:
            raise ValueError(
                f"aligner.gradient_factor is {gradient_factor}; wanted is a number from 0, such "
                "as 0.1"
            )
        self.channels, self.num_points = channels, num_points
        self.gradient_factor = float(gradient_factor)
        self.point_subnet = conv_tower(in_channels=channels, conv_dims=[channels], norm=norm)
        self.point_pred = nn.Conv2d(channels, 2 * num_points, 3, padding=1)
        init_conv(self.point_pred)
        self.box_align = PointAlignment(channels=channels, num_points=num_points, norm=norm)
        self.cls_align = PointAlignment(channels=channels, num_points=num_points, norm=norm)

    def forward(
        self, feature: Tensor, cls_feature: Tensor, box_feature: Tensor, level: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A level's tower outputs (N, C, H, W) -> class feature, box feature, and the points
        (N, H, W, P, 2), (x, y) in cells relative to each cell. P_l and the level are not read.
        """
        check_channels(self, self.channels, class_tower=cls_feature, box_tower=box_feature)
        points = float32_rows(self.point_pred, self.point_subnet(box_feature))
        points = points.unflatten(-1, (self.num_points, 2))
        slowed = points.detach() + self.gradient_factor * (points - points.detach())
        return self.cls_align(cls_feature, slowed), self.box_align(box_feature, slowed), points

    def decode(self, extras: Sequence[Tensor], grid: Grid) -> dict[str, Tensor]:
        """Levels' points -> ``coarse_boxes`` (N, R, 4) and ``free_points`` (N, R, P, 2), in pixels
        of the padded input.
        """
        points = torch.cat([level.flatten(1, 2) for level in extras], dim=1)
        reach = torch.cat((points.amin(-2), points.amax(-2)), dim=-1) * grid.strides[:, None]
        return {
            "coarse_boxes": grid.locations.repeat(1, 2) + reach,
            "free_points": points_in_pixels(extras, grid),
        }
