# SPDX-License-Identifier: Apache-2.0
"""The host AutoAssign (Zhu et al., arXiv 2007.03496): no location is positive or negative by rule.

All locations inside an object, of every level, are weighed: by a learned prior around its middle,
one for each class, and by how sure and how exact their predictions are. The assigner holds the
prior and hands it to the loss terms with its gradient; what the terms sum is the paper's loss.
Details that the paper leaves open are those of the authors' code. So is the place of a location:
a cell stands for its corner, ``index * stride``, and the recipe's ``offset`` is 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from torch import Tensor, nn

from ..layers.losses import generalized_iou_loss, loss_normalizer
from ..layers.points import boxes_to_distances
from ..layers.tower import init_conv
from ..structures import DensePredictions, DenseTargets, GroundTruth, stack_ground_truth
from .atss import best_claim
from .fcos import FCOSPredictor
from .matching import best_overlaps, index_in_image, matched_truth, objects_at_once

__all__ = [
    "AutoAssignAssigner",
    "AutoAssignPredictor",
    "CenterPrior",
    "CenterPriorTerm",
    "InsideLocations",
    "NegativeTerm",
    "PositiveTerm",
]

_BOX_BIAS = 4.0  # strides from a cell to each side of its first box
_MIN_SIGMA = 1e-3  # strides
_MIN_ERROR = 1e-12  # of 1 - IoU
_MIN_PRIOR = 1e-12  # of the sum over an image's objects


class AutoAssignPredictor(FCOSPredictor):
    """FCOS's predictor, whose boxes begin with sides of 8 strides.

    ``quality`` is the objectness ("Implicit-Objectness"): a factor of every class, without a loss
    of its own. Its parameters keep the name ``ctrness``. There is no learned scale per level, as
    there is in the authors' code.
    """

    def __init__(self, *, num_classes: int, in_channels: int) -> None:
        """
        Args:
            num_classes: K.
            in_channels: channels of the box tower.
        """
        super().__init__(num_classes=num_classes, in_channels=in_channels)
        init_conv(self.bbox_pred, bias=_BOX_BIAS)


class CenterPrior(nn.Module):
    """Where around an object's middle its locations are, learned by class ("Center Weighting").

    A Gaussian in x and in y whose mean and deviation count in strides, so that it is the same in
    cells of every level.
    """

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(num_classes, 2))
        self.sigma = nn.Parameter(torch.ones(num_classes, 2))

    def forward(self, locations: Tensor, strides: Tensor, boxes: Tensor, classes: Tensor) -> Tensor:
        """(M, S) logarithms of the prior, which is 1 at its mean.

        Args:
            locations: (..., 2) pixels, one for each (M, S) or (S, 2) for all objects.
            strides: (...) pixels per cell there.
            boxes: (M, 4) xyxy pixels of the objects.
            classes: (M,) of the objects.
        """
        middle = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
        steps = (locations - middle) / strides[..., None]
        variance = self.sigma[classes, None].square().clamp(min=_MIN_SIGMA**2)
        return -((steps - self.mean[classes, None]).square() / (2 * variance)).sum(-1)


class InsideLocations(NamedTuple):
    """The S locations inside each of a batch's G objects that the prior favours most.

    Attributes:
        location: (G, S) among all N * R predictions.
        exists: (G, S) whether there is one: an object may hold fewer.
        log_prior: (G, S) logarithms of the prior, with its gradient.
        truth: the objects.
    """

    location: Tensor
    exists: Tensor
    log_prior: Tensor
    truth: GroundTruth

    def prior(self) -> Tensor:
        """(G, S) the prior; 0 where there is no location."""
        return torch.where(self.exists, self.log_prior, -torch.inf).exp()


class AutoAssignAssigner(nn.Module):
    """Finds the locations inside each object and weighs them.

    Inside means that all four distances are positive; the level does not matter. An object keeps
    its ``max_locations`` best by the prior, and what it leaves out weighs next to nothing: of an
    object that fills an image of 800 x 1344, the others have less than 1e-6 of the best one's
    prior with a deviation of two strides, and less than 1e-3 with three. So all shapes are known
    beforehand, and nothing asks the device for a number.

    As a negative a location counts fully for all classes but those of the objects around it, and
    for these the less, the better its predicted box fits any object ("Negative weights"): among
    an object's locations the best one counts nothing, the worst one fully. Of several objects of
    one class the one that lets it count least decides; in the authors' code it is the last one.
    """

    def __init__(self, *, num_classes: int, max_locations: int = 2048) -> None:
        """
        Args:
            num_classes: K, the label of background.
            max_locations: S at most, of each object.
        """
        super().__init__()
        if max_locations < 1:
            raise ValueError(
                f"assigner.max_locations is {max_locations}; wanted are locations of an object, "
                "from 1, such as 2048"
            )
        self.num_classes, self.max_locations = num_classes, max_locations
        self.center_prior = CenterPrior(num_classes=num_classes)

    def forward(
        self,
        features: Sequence[Tensor],
        predictions: DensePredictions,
        gt_instances: Sequence[Instances],
    ) -> DenseTargets:
        """Targets of all predictions.

        ``cls_weights`` (N, R, K) are the weights as negatives, ``cls_normalizer`` is the sum of the
        prior over all objects' locations, ``box_normalizer`` the number of objects, and
        ``box_weights`` the prior. ``extras`` has ``inside`` (:class:`InsideLocations`),
        ``image_normalizer``, the number of images, and ``gt_index`` (N, R), the object in its own
        image whose prior is greatest at a location, -1 outside of all. That object's class is
        the label; labels serve logs and pictures only.
        """
        truth = stack_ground_truth(gt_instances)
        truth = truth._replace(boxes=truth.boxes.to(predictions.boxes.dtype))
        count = len(predictions.locations)
        index, exists, cls_weights = self._match(predictions, truth)
        inside = InsideLocations(
            location=index + truth.image_index[:, None] * count,
            exists=exists,
            log_prior=self.center_prior(
                predictions.locations[index],
                predictions.strides[index],
                truth.boxes,
                truth.classes,
            ),
            truth=truth,
        )
        prior = inside.prior().detach()
        shape = (len(gt_instances), count)
        total = math.prod(shape)
        matched = best_claim(inside.location, prior, exists, total).view(shape)
        greatest = prior.new_zeros(total)
        greatest.scatter_reduce_(0, inside.location.flatten(), prior.flatten(), "amax")
        labels, boxes = matched_truth(matched, truth, self.num_classes, truth.boxes.dtype)
        return DenseTargets(
            labels=labels,
            boxes=boxes,
            cls_weights=cls_weights,
            box_weights=greatest.view(shape),
            quality=None,
            cls_normalizer=loss_normalizer(prior.sum()),
            box_normalizer=loss_normalizer(prior.new_full((), len(truth.boxes))),
            extras={
                "gt_index": index_in_image(matched, truth),
                "inside": inside,
                "image_normalizer": loss_normalizer(prior.new_full((), len(gt_instances))),
            },
        )

    @torch.no_grad()
    def _match(
        self, predictions: DensePredictions, truth: GroundTruth
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(G, S) locations of each object, (G, S) which exist, (N, R, K) weights as negatives."""
        kept, exists, weights = [], [], []
        images = zip(
            predictions.boxes.detach(),
            truth.boxes.split(truth.counts),
            truth.classes.split(truth.counts),
            strict=True,
        )
        chunk = objects_at_once(len(predictions.locations))
        for predicted, gt_boxes, gt_classes in images:
            fit = best_overlaps(predicted, gt_boxes).overlap
            fit = 1 / (1 - fit).clamp(min=_MIN_ERROR)
            weight = predicted.new_ones(self.num_classes, len(predicted))
            for boxes, classes in zip(gt_boxes.split(chunk), gt_classes.split(chunk), strict=True):
                prior = self._inside_prior(predictions, boxes, classes)
                best = prior.topk(min(self.max_locations, prior.shape[1]), dim=1)
                kept.append(best.indices)
                exists.append(best.values > -torch.inf)
                rows = classes[:, None].expand(-1, len(predicted))
                negative = _negative_weights(fit, prior > -torch.inf)
                weight.scatter_reduce_(0, rows, negative, "amin")
            weights.append(weight.T)
        return torch.cat(kept), torch.cat(exists), torch.stack(weights)

    def _inside_prior(
        self, predictions: DensePredictions, boxes: Tensor, classes: Tensor
    ) -> Tensor:
        """(M, R) logarithms of the prior; minus infinity outside of the objects (M, 4)."""
        locations = predictions.locations
        prior = self.center_prior(locations, predictions.strides, boxes, classes)
        inside = boxes_to_distances(locations, boxes[:, None]).amin(-1) > 0
        return torch.where(inside, prior, -torch.inf)


def _negative_weights(fit: Tensor, inside: Tensor) -> Tensor:
    """(M, R) what each location inside an object counts as a negative; 1 outside.

    Args:
        fit: (R,) one over one minus the IoU of the predicted box with its best object.
        inside: (M, R) whether a location lies inside an object.
    """
    low = torch.where(inside, fit, torch.inf).amin(1, keepdim=True)
    high = torch.where(inside, fit, -torch.inf).amax(1, keepdim=True)
    # Where all are alike, as where there is only one, all are the best.
    share = torch.where(high > low, (fit - low) / (high - low), 1)
    return torch.where(inside, 1 - share, 1)


def _inside(targets: DenseTargets) -> InsideLocations:
    if "inside" not in targets.extras:
        raise ValueError(
            "AutoAssign's terms want all locations inside each object, and the assigner gives "
            f"only {sorted(targets.extras)}; use AutoAssignAssigner"
        )
    return targets.extras["inside"]


def _objectness(predictions: DensePredictions) -> Tensor:
    if predictions.quality is None:
        raise ValueError(
            "AutoAssign's terms want an objectness as quality, and the predictor gives none; use "
            "AutoAssignPredictor"
        )
    return predictions.quality


@dataclass(frozen=True, kw_only=True)
class PositiveTerm:
    """What it costs that objects are not found by their locations together, over all objects.

    A location's confidence is class times objectness times ``exp(-box_weight * GIoU loss)``. Each
    object's locations are weighed by prior times ``exp(confidence / temperature)``, in shares of
    one; the loss is minus the logarithm of the weighted mean of confidences. An object without a
    location inside costs nothing, and counts in the normaliser; in the authors' code it costs a
    constant.

    Attributes:
        weight: factor on the whole term.
        box_weight: of the GIoU loss inside the confidence.
        temperature: the smaller, the more the most confident locations count.
    """

    weight: float = 0.25
    box_weight: float = 5.0
    temperature: float = 1 / 3

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"PositiveTerm.temperature is {self.temperature}; wanted is a positive number, "
                "such as 1 / 3"
            )

    def __call__(self, predictions: DensePredictions, targets: DenseTargets) -> Tensor:
        """The scalar that is added to the loss."""
        inside, quality = _inside(targets), _objectness(predictions).flatten()
        index, truth = inside.location, inside.truth
        classes = truth.classes[:, None].expand_as(index)
        logits = predictions.logits.flatten(0, 1)[index, classes]
        boxes = predictions.boxes.flatten(0, 1)[index]
        box_losses = generalized_iou_loss(boxes, truth.boxes[:, None].expand_as(boxes))
        # In logarithms: of a hundred thousand locations most have next to no confidence.
        confidence = F.logsigmoid(logits) + F.logsigmoid(quality[index])
        confidence = confidence - self.box_weight * box_losses
        shares = inside.log_prior + confidence.exp() / self.temperature
        never = torch.finfo(shares.dtype).min
        shares = torch.where(inside.exists, shares, never).log_softmax(1)
        joint = torch.where(inside.exists, shares + confidence, never).logsumexp(1)
        losses = torch.where(inside.exists.any(1), -joint, 0)
        return self.weight * losses.sum() / targets.box_normalizer


@dataclass(frozen=True, kw_only=True)
class NegativeTerm:
    """What confidence costs where there is no object, over ``cls_normalizer``.

    A focal loss, ``q ** 2 * -log(1 - q)``, of class times objectness times the weight as a
    negative.

    Attributes:
        weight: factor on the whole term.
    """

    weight: float = 0.75

    def __call__(self, predictions: DensePredictions, targets: DenseTargets) -> Tensor:
        """The scalar that is added to the loss."""
        logits, objectness = predictions.logits, _objectness(predictions)[..., None]
        weights = targets.cls_weights
        scores, presence = logits.sigmoid(), objectness.sigmoid()
        # 1 - weight * score * presence as a sum of what is not negative: no digits are lost.
        absent = (-logits).sigmoid() + scores * (-objectness).sigmoid()
        rest = (1 - weights) + weights * absent
        rest = rest.clamp(min=torch.finfo(rest.dtype).tiny)
        losses = (weights * scores * presence).square() * -rest.log()
        return self.weight * losses.sum() / targets.cls_normalizer


@dataclass(frozen=True, kw_only=True)
class CenterPriorTerm:
    """What it costs that the prior turns away from the objects, a mean over images.

    The number of an image's objects over the sum of their locations' prior. An image whose objects
    hold no location costs nothing.

    Attributes:
        weight: factor on the whole term.
    """

    weight: float = 0.75

    def __call__(self, predictions: DensePredictions, targets: DenseTargets) -> Tensor:
        """The scalar that is added to the loss."""
        inside = _inside(targets)
        images = torch.arange(len(targets.labels), device=targets.labels.device)[:, None]
        own = inside.truth.image_index == images  # (N, G)
        sums = (own * inside.prior().sum(1)).sum(1)
        exists = (own & inside.exists.any(1)).any(1)
        losses = torch.where(exists, own.sum(1) / sums.clamp(min=_MIN_PRIOR), 0)
        return self.weight * losses.sum() / targets.extras["image_normalizer"]
