# SPDX-License-Identifier: Apache-2.0
"""The hosts GFL (Li et al., "Generalized Focal Loss", NeurIPS 2020) and GFLv2 (CVPR 2021).

Each side of a box is a distribution over whole distances, and the class score is at the same time
the box's quality. In GFLv2 the shape of the distributions tells the quality.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers.boxes import paired_overlaps
from ..layers.losses import distribution_focal_loss, integral, quality_focal_loss
from ..layers.points import Grid, boxes_to_distances, distances_to_boxes, squares
from ..layers.precision import at_least_float32
from ..layers.tower import init_conv
from ..structures import DensePredictions, DenseTargets
from .atss import ANCHOR_STRIDES, ATSSAssigner, scaled_maps
from .head import flatten_maps

__all__ = [
    "DistributionFocalTerm",
    "DistributionQuality",
    "GFLAssigner",
    "GFLPredictor",
    "GFLv2Predictor",
    "QualityFocalTerm",
    "box_distribution",
]

_SIDES = 4
_MIN_TOTAL_SCORE = 1e-12  # floor of the positives' scores: there may be none


class GFLPredictor(nn.Module):
    """Four distributions of a side's distance and K class logits at each cell (section 3).

    Facts for the head: K class channels from a 3x3 convolution with bias.
    """

    class_kernel_size = 3
    class_bias = True

    def __init__(
        self, *, num_classes: int, in_channels: int, num_levels: int, reg_max: int = 16
    ) -> None:
        """
        Args:
            num_classes: K.
            in_channels: channels of the box tower.
            num_levels: L; each level has a learned factor on its distributions' logits.
            reg_max: the longest distance, in strides; there is a bin for each of 0..reg_max.
        """
        super().__init__()
        if reg_max < 1:
            raise ValueError(
                f"predictor.reg_max is {reg_max}; wanted is a longest distance in strides, from 1, "
                "such as 16"
            )
        self.num_classes = self.class_outputs = num_classes
        self.in_channels = in_channels
        self.num_bins = reg_max + 1
        self.bbox_pred = nn.Conv2d(in_channels, _SIDES * self.num_bins, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(num_levels))
        init_conv(self)

    def forward(
        self, class_maps: list[Tensor], box_features: list[Tensor], grid: Grid
    ) -> DensePredictions:
        """(N, K, H, W) and (N, C, H, W) maps of each level -> predictions.

        ``priors`` are ATSS's anchors. ``extras["box_distribution"]`` (N, R, 4, reg_max + 1) are
        the logits for the distances of left, top, right and bottom in strides. There is no
        quality: it is in the class score.
        """
        maps = scaled_maps([self.bbox_pred(x) for x in box_features], self.scales)
        logits = flatten_maps(maps, _SIDES * self.num_bins).unflatten(-1, (_SIDES, -1))
        distances = integral(logits) * grid.strides[:, None]
        return DensePredictions(
            logits=flatten_maps(class_maps, self.num_classes),
            boxes=distances_to_boxes(grid.locations, distances),
            quality=None,
            locations=grid.locations,
            strides=grid.strides,
            priors=squares(grid.locations, ANCHOR_STRIDES * grid.strides),
            level_sizes=grid.level_sizes,
            extras={"box_distribution": logits},
        )


class DistributionQuality(nn.Sequential):
    """How sharp a box's distributions are tells its quality (GFLv2, section 3).

    Two linear layers read the greatest probabilities of each side and their mean. Gradients go
    through them to the distributions (the authors' code). A name in a checkpoint, such as
    ``0.weight``, is the layer's place; the authors' layers are 1x1 convolutions.
    """

    def __init__(self, *, topk: int = 4, hidden_channels: int = 64) -> None:
        """
        Args:
            topk: probabilities of each side that are looked at.
            hidden_channels: of the layer between.
        """
        if topk < 1:
            raise ValueError(
                f"DistributionQuality.topk is {topk}; wanted are probabilities of each side, from "
                "1, such as 4"
            )
        super().__init__(
            nn.Linear(_SIDES * (topk + 1), hidden_channels),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_channels, 1),
        )
        self.topk = topk
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)

    def forward(self, logits: Tensor) -> Tensor:
        """(..., 4, bins) logits of distributions -> (...) logits of the quality."""
        if logits.shape[-1] < self.topk:
            raise ValueError(
                f"the {self.topk} greatest of {logits.shape[-1]} probabilities are wanted; set "
                f"reg_max to {self.topk - 1} or more"
            )
        best = at_least_float32(logits).softmax(-1).topk(self.topk, dim=-1).values
        statistics = torch.cat((best, best.mean(-1, keepdim=True)), dim=-1)
        return super().forward(statistics.flatten(-2)).squeeze(-1)


class GFLv2Predictor(GFLPredictor):
    """GFL's, with a quality that the distributions tell; the score is class times quality."""

    def __init__(
        self, *, num_classes: int, in_channels: int, num_levels: int, reg_max: int = 16
    ) -> None:
        """
        Args:
            num_classes: K.
            in_channels: channels of the box tower.
            num_levels: L; each level has a learned factor on its distributions' logits.
            reg_max: the longest distance, in strides; there is a bin for each of 0..reg_max.
        """
        super().__init__(
            num_classes=num_classes,
            in_channels=in_channels,
            num_levels=num_levels,
            reg_max=reg_max,
        )
        self.reg_conf = DistributionQuality()

    def forward(
        self, class_maps: list[Tensor], box_features: list[Tensor], grid: Grid
    ) -> DensePredictions:
        """As GFL's, with ``quality``."""
        predictions = super().forward(class_maps, box_features, grid)
        return predictions._replace(quality=self.reg_conf(box_distribution(predictions)))


class GFLAssigner(ATSSAssigner):
    """ATSS's positives; how strongly and towards which score each learns, its prediction says.

    A positive's box counts as much as its best class score, and the quality that its class shall
    reach is the overlap of its predicted box with its object; both without gradient.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        score: Callable[[DensePredictions], Tensor],
        topk: int = 9,
        size_divisor: int = 32,
    ) -> None:
        """
        Args:
            num_classes: K, the label of background.
            score: (N, R, K) scores of the predictions, those of the selection.
            topk: candidates of each level.
            size_divisor: images are padded to multiples of it, in pixels.
        """
        super().__init__(num_classes=num_classes, topk=topk, size_divisor=size_divisor)
        if not callable(score):
            raise TypeError(
                f"assigner.score must be callable, such as class_score, got {score!r}; a callable "
                "cannot be set on the command line: set it in a config file"
            )
        self.score = score

    def _weights(
        self, predictions: DensePredictions, boxes: Tensor, positive: Tensor
    ) -> tuple[Tensor, Tensor, float]:
        """(N, R) box weights, (N, R) quality targets, least value of the box normaliser.

        The authors divide by the sum of the weights whatever it is. So the least value only
        keeps a batch without positives from being divided by zero.
        """
        overlaps = paired_overlaps(predictions.boxes, boxes)
        best = self.score(predictions).amax(-1)
        return torch.where(positive, best, 0), torch.where(positive, overlaps, 0), _MIN_TOTAL_SCORE


def box_distribution(predictions: DensePredictions) -> Tensor:
    """(N, R, 4, bins) logits of the distributions of a box's sides.

    Raises:
        ValueError: the predictor gives none.
    """
    if "box_distribution" not in predictions.extras:
        raise ValueError(
            "distributions of the boxes' sides are wanted, and the predictor gives none, only "
            f"{sorted(predictions.extras)}; use one that does, such as GFLPredictor, or remove "
            "DistributionFocalTerm from losses"
        )
    return predictions.extras["box_distribution"]


@dataclass(frozen=True, kw_only=True)
class QualityFocalTerm:
    """Quality focal loss of all locations that are not ignored, over ``cls_normalizer``.

    The target of a positive's class is its quality. If the predictor has a quality, the score is
    the class probability times it, as in :func:`product_score`.

    Attributes:
        beta: exponent of the modulating factor.
        weight: factor on the whole term.
    """

    beta: float = 2.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (self.beta == 0 or 1 <= self.beta < float("inf")):
            raise ValueError(
                f"QualityFocalTerm.beta is {self.beta}; wanted is 0 or a number from 1, such as 2: "
                "between them gradients are infinite"
            )

    def __call__(self, predictions: DensePredictions, targets: DenseTargets) -> Tensor:
        """The scalar that is added to the loss."""
        if targets.quality is None:
            raise ValueError(
                "QualityFocalTerm wants a quality from the assigner, and it gives none; use "
                "GFLAssigner, or FocalTerm in losses"
            )
        losses = quality_focal_loss(
            predictions.logits, targets.labels, targets.quality, self.beta, predictions.quality
        )
        weights = targets.cls_weights * (targets.labels >= 0)[..., None]
        return self.weight * (losses * weights).sum() / targets.cls_normalizer


@dataclass(frozen=True, kw_only=True)
class DistributionFocalTerm:
    """Weighted distribution focal loss over ``box_normalizer``.

    Attributes:
        weight: factor on the whole term.
    """

    weight: float = 0.25

    def __call__(self, predictions: DensePredictions, targets: DenseTargets) -> Tensor:
        """The scalar that is added to the loss."""
        distances = boxes_to_distances(predictions.locations, targets.boxes)
        losses = distribution_focal_loss(
            box_distribution(predictions), distances / predictions.strides[:, None]
        )
        return self.weight * (losses * targets.box_weights).sum() / targets.box_normalizer
