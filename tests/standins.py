# SPDX-License-Identifier: Apache-2.0
"""The least that the papers that are not built need of a head: their tensors, not their methods."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2_decouple.layers.points import Grid, distances_to_boxes
from d2_decouple.modeling import FCOSPredictor
from d2_decouple.modeling.head import flatten_maps
from d2_decouple.structures import DensePredictions


def conv3x3(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride=stride, padding=1)


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """(N, C, H, W) read at (N, P, 2, h, w) points (x, y) in cells -> (N, C, P, h, w)."""
    images, count, _, height, width = points.shape
    size = points.new_tensor([maps.shape[-1], maps.shape[-2]])
    grid = (2 * points.permute(0, 1, 3, 4, 2) + 1) / size - 1
    grid = grid.reshape(images, count * height, width, 2)
    found = F.grid_sample(maps, grid.to(maps.dtype), align_corners=False)
    return found.view(images, maps.shape[1], count, height, width)


def cells_of(feature: Tensor) -> Tensor:
    """(2, H, W) cell indices (x, y)."""
    y, x = (torch.arange(n, dtype=torch.float32) for n in feature.shape[-2:])
    return torch.stack(torch.meshgrid(x, y, indexing="xy"))


def _float(x: Tensor) -> Tensor:
    """Coordinates do not survive autocast's half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class PointAligner(nn.Module):
    """SALT: a coarse box, points on it, both features read there; a scale per level; a skip."""

    num_points = 9

    def __init__(self, *, channels: int, num_levels: int) -> None:
        super().__init__()
        self.coarse = conv3x3(channels, 4)
        self.fractions = conv3x3(channels, 2 * self.num_points)
        self.factors = conv3x3(channels, 2 * self.num_points)
        self.box_mix = nn.Conv2d(channels * self.num_points, channels, 1)
        self.cls_mix = nn.Conv2d(channels * self.num_points, channels, 1)
        self.scales = nn.Parameter(torch.ones(num_levels))

    def forward(
        self, feature: Tensor, cls_feature: Tensor, box_feature: Tensor, level: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        distances = _float(self.coarse(box_feature)).relu() * self.scales[level]
        low, high = -distances[:, None, :2], distances[:, None, 2:]
        shape = (len(feature), self.num_points, 2, *feature.shape[-2:])
        points = low + (high - low) * _float(self.fractions(box_feature)).sigmoid().view(shape)
        cls_feature = cls_feature + feature
        factors = _float(self.factors(cls_feature)).clamp(max=3).exp().view(shape)
        cls_points = points.detach() * factors
        cells = cells_of(feature).to(points)
        box = self.box_mix(sample(box_feature, cells + points).flatten(1, 2))
        cls = self.cls_mix(sample(cls_feature, cells + cls_points).flatten(1, 2))
        return cls, box, {"distances": distances, "points": points, "cls_points": cls_points}

    def decode(self, extras: list[dict[str, Tensor]], grid: Grid) -> dict[str, Tensor]:
        distances = flatten_maps([extra["distances"] for extra in extras], 4)
        decoded = {
            "coarse_boxes": distances_to_boxes(grid.locations, distances * grid.strides[:, None])
        }
        for name in ("points", "cls_points"):
            flat = flatten_maps([extra[name].flatten(1, 2) for extra in extras], 18)
            relative = flat.unflatten(-1, (self.num_points, 2)) * grid.strides[:, None, None]
            decoded[name] = grid.locations[:, None] + relative
        return decoded


class IdentityAligner(nn.Module):
    """Reads where the host reads."""

    def forward(
        self, feature: Tensor, cls_feature: Tensor, box_feature: Tensor, level: int
    ) -> tuple[Tensor, Tensor, int]:
        return cls_feature, box_feature, level

    def decode(self, extras: list[int], grid: Grid) -> dict[str, list[int]]:
        return {"levels": extras}


class AnchorPredictor(nn.Module):
    """RetinaNet: nine anchors per cell, so R = 9 times the cells."""

    class_kernel_size = 3
    class_bias = True

    def __init__(self, *, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.num_classes, self.in_channels = num_classes, in_channels
        self.class_outputs = 9 * num_classes
        self.bbox_pred = conv3x3(in_channels, 9 * 4)

    def forward(
        self, class_maps: list[Tensor], box_features: list[Tensor], grid: Grid
    ) -> DensePredictions:
        shapes = torch.cartesian_prod(
            2 ** torch.arange(2, 5 / 2 + 0.4, 1 / 3), torch.tensor([0.7, 1.0, 1.4])
        )
        half = torch.stack((shapes[:, 0] * shapes[:, 1], shapes[:, 0] / shapes[:, 1]), dim=-1) / 2
        locations = grid.locations.repeat_interleave(9, dim=0)
        strides = grid.strides.repeat_interleave(9)
        reach = half.to(locations).repeat(len(grid.cells), 1) * strides[:, None]
        priors = torch.cat((locations - reach, locations + reach), dim=-1)
        deltas = flatten_maps([self.bbox_pred(x) for x in box_features], 4)
        return DensePredictions(
            logits=flatten_maps(class_maps, self.num_classes),
            boxes=priors + deltas * strides[:, None],
            quality=None,
            locations=locations,
            strides=strides,
            priors=priors,
            level_sizes=tuple(9 * cells for cells in grid.level_sizes),
            extras={},
        )


class OddPredictor(FCOSPredictor):
    """FCOS's names with tensors of other shapes, as a distribution over distances has."""

    def __init__(self, *, num_classes: int, in_channels: int) -> None:
        super().__init__(num_classes=num_classes, in_channels=in_channels)
        self.bbox_pred = conv3x3(in_channels, 8)
