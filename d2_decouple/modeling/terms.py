# SPDX-License-Identifier: Apache-2.0
"""Loss terms that several hosts share: ``(predictions, targets) -> scalar``, no parameters.

A term weighs, sums and divides; the arithmetic is in :mod:`d2_decouple.layers.losses`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from torch import Tensor

from ..layers.losses import generalized_iou_loss, iou_loss, sigmoid_focal_loss
from ..layers.precision import at_least_float32
from ..structures import DensePredictions, DenseTargets, foreground
from .selection import predicted_boxes

__all__ = [
    "FocalTerm",
    "GIoUTerm",
    "IoUTerm",
    "QualityTerm",
    "assigned_losses",
    "coarse_targets",
    "loss_terms",
    "main_targets",
    "quality_losses",
]


def loss_terms(**terms: Callable[[DensePredictions, DenseTargets], Tensor]) -> dict[str, Any]:
    """Its own arguments as a dict: logged name -> term. (A config cannot call ``dict``.)"""
    return terms


def main_targets(targets: DenseTargets) -> DenseTargets:
    """The label set an assigner answers with, as opposed to a second one in its extras."""
    return targets


def coarse_targets(targets: DenseTargets) -> DenseTargets:
    """The second label set, which coarse boxes learn (PDNet)."""
    if "coarse" not in targets.extras:
        raise ValueError(
            "targets of coarse boxes are wanted, and the assigner gives none, only "
            f"{sorted(targets.extras)}; use one that does, such as PDNetAssigner"
        )
    return targets.extras["coarse"]


@dataclass(frozen=True, kw_only=True)
class FocalTerm:
    """Sigmoid focal loss of all locations that are not ignored, over ``cls_normalizer``.

    Attributes:
        alpha: weight of the positive entries.
        gamma: exponent of the modulating factor.
        weight: factor on the whole term.
    """

    alpha: float = 0.25
    gamma: float = 2.0
    weight: float = 1.0

    def __call__(self, predictions: DensePredictions, targets: DenseTargets) -> Tensor:
        """The scalar that is added to the loss."""
        losses = sigmoid_focal_loss(predictions.logits, targets.labels, self.alpha, self.gamma)
        weights = targets.cls_weights * (targets.labels >= 0)[..., None]
        return self.weight * (losses * weights).sum() / targets.cls_normalizer


@dataclass(frozen=True, kw_only=True)
class GIoUTerm:
    """Weighted ``1 - GIoU`` over ``box_normalizer``.

    Attributes:
        weight: factor on the whole term.
        boxes: which predicted boxes (N, R, 4) are meant.
        targets: which label set they learn.
        smoothing: area in square pixels that overlap and union have in common beside what they
            are (:func:`generalized_iou_loss`).
    """

    weight: float = 1.0
    boxes: Callable[[DensePredictions], Tensor] = predicted_boxes
    targets: Callable[[DenseTargets], DenseTargets] = main_targets
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_callable(self, "boxes", "targets")

    def __call__(self, predictions: DensePredictions, targets: DenseTargets) -> Tensor:
        """The scalar that is added to the loss."""
        chosen = self.targets(targets)
        losses = generalized_iou_loss(self.boxes(predictions), chosen.boxes, self.smoothing)
        return self.weight * (losses * chosen.box_weights).sum() / chosen.box_normalizer


@dataclass(frozen=True, kw_only=True)
class IoUTerm:
    """Weighted loss of the overlap of boxes, ``-ln IoU`` if nothing else is said.

    The weighted sum is divided by ``box_normalizer``.

    Attributes:
        weight: factor on the whole term.
        loss: ``(boxes, gt_boxes) -> losses`` of (..., 4) xyxy boxes paired one to one, such as
            :func:`~d2_decouple.layers.losses.iou_loss`.
        boxes: which predicted boxes (N, R, 4) are meant.
        targets: which label set they learn.
    """

    weight: float = 1.0
    loss: Callable[[Tensor, Tensor], Tensor] = iou_loss
    boxes: Callable[[DensePredictions], Tensor] = predicted_boxes
    targets: Callable[[DenseTargets], DenseTargets] = main_targets

    def __post_init__(self) -> None:
        _check_callable(self, "loss", "boxes", "targets")

    def __call__(self, predictions: DensePredictions, targets: DenseTargets) -> Tensor:
        """The scalar that is added to the loss."""
        chosen = self.targets(targets)
        losses = self.loss(self.boxes(predictions), chosen.boxes)
        return self.weight * (losses * chosen.box_weights).sum() / chosen.box_normalizer


def _check_callable(term: Any, *names: str) -> None:
    for name in names:
        if not callable(getattr(term, name)):
            raise TypeError(
                f"{type(term).__name__}.{name} must be callable, got {getattr(term, name)!r}; a "
                "callable cannot be set on the command line: set it in a config file"
            )


@dataclass(frozen=True, kw_only=True)
class QualityTerm:
    """Binary cross entropy of the quality logits on positives, over ``cls_normalizer``.

    Attributes:
        weight: factor on the whole term.
    """

    weight: float = 1.0

    def __call__(self, predictions: DensePredictions, targets: DenseTargets) -> Tensor:
        """The scalar that is added to the loss."""
        losses = quality_losses(self, predictions, targets)
        positive = foreground(targets.labels, predictions.logits.shape[-1])
        return self.weight * (losses * positive).sum() / targets.cls_normalizer


def quality_losses(term: Any, predictions: DensePredictions, targets: DenseTargets) -> Tensor:
    """(N, R) binary cross entropy of the quality logits with their targets, of all locations.

    Raises:
        ValueError: one of the two has no quality; the message names ``term``.
    """
    if predictions.quality is None or targets.quality is None:
        raise ValueError(
            f"{type(term).__name__} wants a quality from the predictor and from the assigner, and "
            "one of them gives none; remove this term from losses"
        )
    return F.binary_cross_entropy_with_logits(
        predictions.quality, targets.quality, reduction="none"
    )


def assigned_losses(
    assigner: Callable[..., DenseTargets],
    terms: Mapping[str, Callable[[DensePredictions, DenseTargets], Tensor]],
    features: Sequence[Tensor],
    predictions: DensePredictions,
    gt_instances: Sequence[Instances],
) -> tuple[DenseTargets, dict[str, Tensor]]:
    """The assigner's targets, and what each named term makes of them, in float32 or wider.

    Of the head's input maps the assigner gets those that are predicted on.
    """
    with torch.autocast(predictions.boxes.device.type, enabled=False):
        levels = [at_least_float32(x) for x in features[-len(predictions.level_sizes) :]]
        targets = assigner(levels, predictions, gt_instances)
        return targets, {name: term(predictions, targets) for name, term in terms.items()}
