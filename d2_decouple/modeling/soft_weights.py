# SPDX-License-Identifier: Apache-2.0
"""SAPD's soft anchor weights (Zhu et al., ECCV 2020, section 3.2) on any assigner.

A location near the middle of its object sees the object best, so it should count most. SAPD says
so of its own locations; here the same holds for those that another host has chosen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from ..layers.losses import loss_normalizer
from ..layers.points import boxes_to_distances, soft_centerness
from ..structures import DensePredictions, DenseTargets, foreground
from .terms import quality_losses

__all__ = ["SoftWeights", "WeightedQualityTerm", "positive_weights"]


def positive_weights(targets: DenseTargets, num_classes: int) -> Tensor:
    """(N, R) how much each positive's own class counts; 0 where there is no positive."""
    positive = foreground(targets.labels, num_classes)
    label = torch.where(positive, targets.labels, 0)[..., None]
    weights = targets.cls_weights.expand(*targets.labels.shape, num_classes)
    return weights.gather(-1, label).squeeze(-1) * positive


class SoftWeights(nn.Module):
    """The host's targets, whose positives count as much as they are central (Eqs. 2 to 4).

    Class and box weights of a positive are multiplied by f, the generalised centerness of its
    location in its matched box, for all classes of the row; both sums are divided by the weights
    of the positives, as in SAPD. Negatives, labels, boxes and qualities are the host's. Of an
    anchor the location is that of its cell. One that lies outside its box (an anchor's can) or on
    the border has f = 0, and then learns neither class nor box.

    Terms without weights would be divided by the new, smaller ``cls_normalizer`` all the same and
    so count two or three times as much: in the place of :class:`.terms.QualityTerm` belongs
    :class:`WeightedQualityTerm`. AutoAssign's terms do not read the weights, so nothing changes.
    """

    def __init__(
        self,
        *,
        host: nn.Module,
        exponent: float = 1.0,
        box_minimum: float = 1.0,
        label_sets: Sequence[str] = (),
    ) -> None:
        """
        Args:
            host: the assigner that finds the positives, such as :class:`.fcos.FCOSAssigner`.
            exponent: eta, of the ratios; 0.5 makes f FCOS's centerness, 0 makes it 1.
            box_minimum: least sum of box weights that is divided by, over all processes. With a
                host that weighs boxes by scores (:class:`.gfl.GFLAssigner`) it is 1e-12 there.
            label_sets: which further label sets in the host's extras are weighed in the same way:
                ``["box"]`` with DDOD, whose boxes learn from it. PDNet's ``"coarse"`` is better
                left out: it has the one cell nearest to each object's middle, and how near that
                is depends on the grid, not on the object.
        """
        super().__init__()
        if not isinstance(host, nn.Module):
            raise TypeError(
                f"assigner.host must be an assigner, such as FCOSAssigner(...), got {host!r}"
            )
        if not 0 <= exponent < math.inf:
            raise ValueError(
                f"assigner.exponent is {exponent}; wanted is a finite number from 0, such as 1"
            )
        if not 0 < box_minimum < math.inf:
            raise ValueError(
                f"assigner.box_minimum is {box_minimum}; wanted is a positive sum of weights, such "
                "as 1"
            )
        self.host, self.exponent, self.box_minimum = host, float(exponent), float(box_minimum)
        self.label_sets = tuple(label_sets)

    def forward(
        self,
        features: Sequence[Tensor],
        predictions: DensePredictions,
        gt_instances: Sequence[Instances],
    ) -> DenseTargets:
        """As the host's, with other weights and normalisers.

        Raises:
            ValueError: the host has no label set of a name in ``label_sets``.
        """
        targets = self.host(features, predictions, gt_instances)
        found = {k: x for k, x in targets.extras.items() if isinstance(x, DenseTargets)}
        if missing := [name for name in self.label_sets if name not in found]:
            raise ValueError(
                f"assigner.label_sets names {missing}, {type(self.host).__name__} gives "
                f"{sorted(found)} beside its own; name some of these, or none"
            )
        others = {name: self._softened(found[name], predictions) for name in self.label_sets}
        softened = self._softened(targets, predictions)
        return softened._replace(extras={**targets.extras, **others})

    @torch.no_grad()
    def _softened(self, targets: DenseTargets, predictions: DensePredictions) -> DenseTargets:
        positive = foreground(targets.labels, predictions.logits.shape[-1])
        distances = boxes_to_distances(predictions.locations, targets.boxes)
        factor = torch.where(positive, soft_centerness(distances, self.exponent), 1)
        cls_weights = targets.cls_weights * factor[..., None]
        box_weights = targets.box_weights * factor
        softened = targets._replace(cls_weights=cls_weights, box_weights=box_weights)
        own = positive_weights(softened, predictions.logits.shape[-1])
        return softened._replace(
            cls_normalizer=loss_normalizer(own.sum()),
            box_normalizer=loss_normalizer(box_weights.sum(), self.box_minimum),
        )


@dataclass(frozen=True, kw_only=True)
class WeightedQualityTerm:
    """Binary cross entropy of the quality logits on positives, weighted, over ``cls_normalizer``.

    A positive's is weighted as its class is: the weight is on all that a location learns (Eq. 6).

    Attributes:
        weight: factor on the whole term.
    """

    weight: float = 1.0

    def __call__(self, predictions: DensePredictions, targets: DenseTargets) -> Tensor:
        """The scalar that is added to the loss."""
        losses = quality_losses(self, predictions, targets)
        weights = positive_weights(targets, predictions.logits.shape[-1])
        return self.weight * (losses * weights).sum() / targets.cls_normalizer
