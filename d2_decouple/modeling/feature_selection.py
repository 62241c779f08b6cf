# SPDX-License-Identifier: Apache-2.0
"""SAPD's feature-selection network, and the loss that trains it (section 3.3, Table 1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from ..layers.tower import init_conv
from ..structures import DensePredictions, DenseTargets, GroundTruth

__all__ = ["FeatureSelectionNet", "LevelSelectionTerm"]

_POOLED = 7  # cells of a region in x and in y; three convolutions of 3x3 leave one
_SAMPLES = 2  # of a pooled cell in x and in y


class FeatureSelectionNet(nn.Module):
    """How well each level suits each object, from what all levels show of it.

    Each object's box is pooled to 7x7 cells from every level; three 3x3 convolutions without
    padding, each with ReLU, and a linear layer make a logit of each level. It serves training only.
    The paper does not say how regions are aligned: by half a pixel, with 2x2 samples of a cell.
    """

    def __init__(self, *, channels: int, num_levels: int, hidden_channels: int = 256) -> None:
        """
        Args:
            channels: C of every level.
            num_levels: L.
            hidden_channels: of the convolutions.
        """
        super().__init__()
        self.channels, self.num_levels = channels, num_levels
        self.conv1 = nn.Conv2d(channels * num_levels, hidden_channels, 3)
        self.conv2 = nn.Conv2d(hidden_channels, hidden_channels, 3)
        self.conv3 = nn.Conv2d(hidden_channels, hidden_channels, 3)
        self.fc = nn.Linear(hidden_channels, num_levels)
        init_conv(self)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(
        self, features: Sequence[Tensor], strides: Sequence[Tensor], truth: GroundTruth
    ) -> Tensor:
        """(G, L) logits of the levels; G may be 0. Gradients flow into the features.

        Args:
            features: (N, C, H_l, W_l) maps, finest first.
            strides: pixels per cell of each, as scalar tensors.
            truth: boxes in pixels of the padded input.

        Raises:
            ValueError: there are other levels or channels than the network was built for.
        """
        channels = [x.shape[1] for x in features]
        if channels != [self.channels] * self.num_levels:
            raise ValueError(
                f"the feature-selection network is built for {self.num_levels} levels of "
                f"{self.channels} channels, and gets {channels}; set assigner.num_levels and "
                "assigner.channels"
            )
        dtype = self.fc.weight.dtype
        image_index, boxes = truth.image_index.to(dtype)[:, None], truth.boxes.to(dtype)
        # The levels' regions are channels of one map. Level by level, as the sum of what each adds,
        # a thousand objects take half the memory.
        weights = self.conv1.weight.split(self.channels, dim=1)
        biases = [self.conv1.bias, *[None] * (self.num_levels - 1)]
        parts = []
        for feature, stride, weight, bias in zip(features, strides, weights, biases, strict=True):
            # The scale is a number to the operator, and the stride is the device's to know.
            regions = torch.cat((image_index, boxes / stride.to(dtype)), dim=1)
            pooled = roi_align(feature.to(dtype), regions, _POOLED, 1.0, _SAMPLES, aligned=True)
            parts.append(F.conv2d(pooled, weight, bias))
        x = torch.stack(parts).sum(0)
        x = self.conv3(self.conv2(x.relu()).relu()).relu()
        return self.fc(x.flatten(1))


@dataclass(frozen=True, kw_only=True)
class LevelSelectionTerm:
    """Cross entropy of the levels' logits with each object's best level (Eq. 6, L_select).

    It is summed over all objects and divided by their number, at least one.

    Attributes:
        weight: factor on the whole term; the paper's lambda.
    """

    weight: float = 0.1

    def __call__(self, predictions: DensePredictions, targets: DenseTargets) -> Tensor:
        """The scalar that is added to the loss.

        Raises:
            ValueError: the assigner has no feature-selection network.
        """
        extras = targets.extras
        if "level_logits" not in extras:
            raise ValueError(
                "LevelSelectionTerm wants logits of levels, and the assigner gives only "
                f"{sorted(extras)}; set assigner.options.select_train_only=True, or remove this "
                "term from losses"
            )
        losses = F.cross_entropy(extras["level_logits"], extras["best_levels"], reduction="sum")
        return self.weight * losses / extras["select_normalizer"]
