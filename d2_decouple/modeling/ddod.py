# SPDX-License-Identifier: Apache-2.0
"""The host DDOD (Chen et al., "Disentangle Your Dense Object Detector", ACM MM 2021) on ATSS.

Three things are told apart: which cells learn the class and which the box; where each task reads
its features, by a deformable convolution first in each tower
(:func:`~d2_decouple.layers.deform_tower.deform_first_tower`); and how much a level counts.

The predictor is ATSS's: its ``quality`` learns the IoU here. Details that the paper leaves open are
those of the authors' code, so a cell stands for its corner: the recipe's ``offset`` is 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from torch import Tensor, nn

from ..layers.boxes import paired_overlaps
from ..layers.losses import loss_normalizer
from ..structures import DensePredictions, DenseTargets, GroundTruth, foreground
from .atss import ATSSAssigner
from .terms import quality_losses

__all__ = ["BoxQualityTerm", "DDODAssigner", "PredictionATSSAssigner", "box_targets"]


class PredictionATSSAssigner(ATSSAssigner):
    """ATSS that measures candidates by what is predicted at them, not by their anchors.

    In the place of the overlap of the anchor is ``score ** (1 - alpha) * IoU ** alpha``, of the
    score of the object's class and the predicted box's IoU with the object. Which cells are
    candidates is still a matter of distance.
    """

    def __init__(
        self, *, num_classes: int, alpha: float, topk: int = 9, size_divisor: int = 32
    ) -> None:
        """
        Args:
            num_classes: K, the label of background.
            alpha: how much the box counts, and the class does not, from 0 to 1.
            topk: candidates of each level.
            size_divisor: images are padded to multiples of it, in pixels.
        """
        super().__init__(num_classes=num_classes, topk=topk, size_divisor=size_divisor)
        if not 0 <= alpha <= 1:
            raise ValueError(f"assigner's alpha is {alpha}; wanted is a share from 0 to 1, as 0.8")
        self.alpha = alpha

    def _overlaps(self, predictions: DensePredictions, truth: GroundTruth, index: Tensor) -> Tensor:
        """(G, S) how well the candidates (G, S) fit each box."""
        boxes = F.pad(predictions.boxes.flatten(0, 1), (0, 0, 0, 1))[index]
        logits = F.pad(predictions.logits.flatten(0, 1), (0, 0, 0, 1))
        scores = logits[index, truth.classes[:, None]].sigmoid()
        overlaps = paired_overlaps(boxes, truth.boxes[:, None])
        return scores.pow(1 - self.alpha) * overlaps.pow(self.alpha)

    def _weights(
        self, predictions: DensePredictions, boxes: Tensor, positive: Tensor
    ) -> tuple[Tensor, Tensor, float]:
        """Every positive's box counts the same; the quality is the predicted box's IoU."""
        weights = positive.to(boxes.dtype)
        return weights, weights * paired_overlaps(predictions.boxes, boxes), 1.0


class DDODAssigner(nn.Module):
    """One set of positives learns the class, another one the box and its quality.

    Each is found by :class:`PredictionATSSAssigner` with an ``alpha`` of its own. All losses of a
    level are multiplied by a factor that falls from 2, for the level with the fewest positives of
    the whole training so far, to 1 for the one with the most, linearly in their number (pyramid
    supervision; each of the two sets has its own). The numbers are a buffer, summed over
    processes, so a resumed training goes on as it would have.
    """

    positives: Tensor  # (2, L) of class and box, so far, over the number of processes

    def __init__(
        self,
        *,
        num_classes: int,
        num_levels: int,
        cls_alpha: float = 0.8,
        box_alpha: float = 0.5,
        topk: int = 9,
        size_divisor: int = 32,
    ) -> None:
        """
        Args:
            num_classes: K, the label of background.
            num_levels: L.
            cls_alpha: share of the box in what finds the positives of the class.
            box_alpha: the same for the positives of the box.
            topk: candidates of each level.
            size_divisor: images are padded to multiples of it, in pixels.
        """
        super().__init__()
        for_class, for_box = (
            PredictionATSSAssigner(
                num_classes=num_classes, alpha=alpha, topk=topk, size_divisor=size_divisor
            )
            for alpha in (cls_alpha, box_alpha)
        )
        self.for_class, self.for_box = for_class, for_box
        self.num_classes = num_classes
        self.register_buffer("positives", torch.zeros(2, num_levels))

    @torch.no_grad()
    def forward(
        self,
        features: Sequence[Tensor],
        predictions: DensePredictions,
        gt_instances: Sequence[Instances],
    ) -> DenseTargets:
        """Targets of the class; ``extras["box"]`` are those of box and quality.

        Both normalisers of each are the sum over images of their positives, each image counting
        one at least. The levels' factors are in ``cls_weights`` and ``box_weights``, and beside
        them in ``extras["level_factors"]`` (2, L) of class and box.
        """
        sizes = predictions.level_sizes
        if len(sizes) != self.positives.shape[1]:
            raise ValueError(
                f"the head predicts {len(sizes)} levels, the assigner counts the positives of "
                f"{self.positives.shape[1]}; set model.assigner.num_levels={len(sizes)}"
            )
        both = [
            assigner(features, predictions, gt_instances)
            for assigner in (self.for_class, self.for_box)
        ]
        for number, targets in zip(self.positives, both, strict=True):
            of_row = foreground(targets.labels, self.num_classes).sum(0).to(number.dtype)
            of_level = torch.stack([x.sum() for x in of_row.split(sizes)])
            number += loss_normalizer(of_level, minimum=0)
        factors = _level_factors(self.positives).to(predictions.boxes.dtype)
        weighted = [
            _weighted(targets, factor, sizes) for targets, factor in zip(both, factors, strict=True)
        ]
        cls, box = weighted
        return cls._replace(extras={**cls.extras, "box": box, "level_factors": factors})


def _level_factors(positives: Tensor) -> Tensor:
    """(2, L) factors from 2 to 1 of the levels with the fewest and the most positives (2, L)."""
    low, high = positives.amin(1, keepdim=True), positives.amax(1, keepdim=True)
    return 2 - torch.where(high > low, (positives - low) / (high - low), 0)


def _weighted(targets: DenseTargets, factors: Tensor, level_sizes: Sequence[int]) -> DenseTargets:
    """Targets whose weights are multiplied by their level's factor (L,)."""
    of_row = torch.cat([x.expand(n) for x, n in zip(factors, level_sizes, strict=True)])
    return targets._replace(
        cls_weights=targets.cls_weights * of_row[:, None],
        box_weights=targets.box_weights * of_row,
        box_normalizer=targets.cls_normalizer,
    )


def box_targets(targets: DenseTargets) -> DenseTargets:
    """The second label set, which boxes and their quality learn (DDOD)."""
    if "box" not in targets.extras:
        raise ValueError(
            "targets of the box alone are wanted, and the assigner gives none, only "
            f"{sorted(targets.extras)}; use one that does, such as DDODAssigner"
        )
    return targets.extras["box"]


@dataclass(frozen=True, kw_only=True)
class BoxQualityTerm:
    """Weighted binary cross entropy of the quality where the box learns, over ``box_normalizer``.

    Attributes:
        weight: factor on the whole term.
    """

    weight: float = 1.0

    def __call__(self, predictions: DensePredictions, targets: DenseTargets) -> Tensor:
        """The scalar that is added to the loss."""
        chosen = box_targets(targets)
        losses = quality_losses(self, predictions, chosen)
        return self.weight * (losses * chosen.box_weights).sum() / chosen.box_normalizer
