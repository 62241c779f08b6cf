# SPDX-License-Identifier: Apache-2.0
"""A one-stage detector as the first of two stages: its boxes are proposals, its scores objectness.

That a proposal holds an object, and which, are then two probabilities, as in "Probabilistic
two-stage detection" (Zhou et al., 2103.07461). Here the second stage is Decoupled R-CNN's, so
proposals come at two densities. No numbers are taken from that paper.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from ..structures import DensePredictions, DenseTargets, foreground
from .decoupled_rcnn import DecoupledROIHeads
from .decoupled_rpn import (
    Candidates,
    Density,
    at_densities,
    best_candidates,
    check_densities,
)
from .head import DenseHead, map_size
from .regions import log_scalar
from .terms import assigned_losses

__all__ = ["DenseProposals", "ProbabilisticROIHeads", "geometric_mean", "probability_logits"]

Term = Callable[[DensePredictions, DenseTargets], Tensor]
Size = tuple[int, int]


def probability_logits(scores: Tensor) -> Tensor:
    """Finite logits of scores in [0, 1], same shape; 0 and 1 become what is next to them."""
    info = torch.finfo(scores.dtype)
    scores = scores.clamp(min=info.tiny, max=1 - info.eps)
    return scores.log() - (-scores).log1p()


def _without_class(instances: Instances) -> Instances:
    """The ground truth of one image, where everything is an object, class 0."""
    classes = torch.zeros_like(instances.gt_classes)
    return Instances(instances.image_size, gt_boxes=instances.gt_boxes, gt_classes=classes)


class DenseProposals(nn.Module):
    """The slots of a one-stage detector with one class, in the place of an RPN.

    Detectron2's ``GeneralizedRCNN`` calls it as its ``proposal_generator``. Predictions become
    proposals as in :class:`.decoupled_rpn.DecoupledRPN`: the best of each level are suppressed
    among those of their level, in training at two densities.
    """

    def __init__(
        self,
        *,
        head: DenseHead,
        assigner: nn.Module,
        losses: Mapping[str, Term],
        score: Callable[[DensePredictions], Tensor],
        head_in_features: Sequence[str],
        num_classes: int = 1,
        pre_nms_topk: tuple[int, int] = (2000, 1000),
        post_nms_topk: tuple[int, int] = (1000, 1000),
        nms_thresh: float = 0.7,
        nms_thresh_reg: float = 0.85,
        post_nms_topk_reg: int = 1000,
        min_box_size: float = 0.0,
    ) -> None:
        """
        Args:
            head: features -> :class:`DensePredictions` of one class.
            assigner: ``(features, predictions, gt_instances) -> DenseTargets`` of one class.
            losses: name -> term. ``loss_x`` is logged as ``loss_rpn_x``, beside the second stage's.
            score: (N, R, 1) scores in [0, 1] of the predictions, such as ``product_score``.
            head_in_features: names of the maps that the head gets, finest first.
            num_classes: 1, for the head and the assigner to refer to.
            pre_nms_topk: candidates of each level, in training and evaluation.
            post_nms_topk: proposals of an image, in training those of the class branch.
            nms_thresh: overlap that drops one of them.
            nms_thresh_reg: overlap that drops a proposal of the box branch.
            post_nms_topk_reg: proposals of the box branch, of an image.
            min_box_size: pixels that both sides of a proposal must exceed.
        """
        super().__init__()
        check_densities(nms_thresh, nms_thresh_reg, post_nms_topk_reg)
        for name, part in {**{f"losses.{k}": v for k, v in losses.items()}, "score": score}.items():
            if not callable(part):
                raise TypeError(f"proposal_generator.{name} must be callable, got {part!r}")
        if num_classes != 1:
            raise ValueError(
                f"proposal_generator.num_classes is {num_classes}; wanted is 1: what an object is "
                "the second stage decides, so set model.roi_heads.num_classes instead"
            )
        for name, limits in (("pre_nms_topk", pre_nms_topk), ("post_nms_topk", post_nms_topk)):
            if len(limits) != 2 or min(limits) < 1:
                raise ValueError(
                    f"proposal_generator.{name} is {limits}; wanted are two numbers from 1, of "
                    "training and evaluation, such as [2000, 1000]"
                )
        self.head, self.assigner = head, assigner
        self.losses, self.score = dict(losses), score
        self.in_features, self.num_classes = list(head_in_features), num_classes
        self.pre_nms_topk, self.post_nms_topk = (
            {True: training, False: evaluation}
            for training, evaluation in (pre_nms_topk, post_nms_topk)
        )
        self.nms_thresh, self.nms_thresh_reg = nms_thresh, nms_thresh_reg
        self.post_nms_topk_reg, self.min_box_size = post_nms_topk_reg, min_box_size

    def forward(
        self,
        images: ImageList,
        features: Mapping[str, Tensor],
        gt_instances: Sequence[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """As an RPN: (proposals, losses); in training :class:`.decoupled_rpn.DecoupledProposals`.

        Raises:
            ValueError: the maps are not those that the head is made for.
            FloatingPointError: in training, if there is NaN or infinity among the proposals.
        """
        self._check_maps(images, features)
        maps = [features[name] for name in self.in_features]
        predictions = self.head(maps)
        if predictions.logits.shape[-1] != 1:
            raise ValueError(
                f"the head of proposal_generator predicts {predictions.logits.shape[-1]} classes; "
                "wanted is 1: set model.proposal_generator.head.predictor.num_classes=1"
            )
        losses: dict[str, Tensor] = {}
        if self.training:
            assert gt_instances is not None, "proposals need ground truth in training"
            losses = self.losses_of(maps, predictions, gt_instances)
        return self.propose(predictions, images.image_sizes), losses

    def losses_of(
        self,
        features: Sequence[Tensor],
        predictions: DensePredictions,
        gt_instances: Sequence[Instances],
    ) -> dict[str, Tensor]:
        """``loss_rpn_*`` of each term, from the head's maps, in float32 or wider."""
        objects = [_without_class(x) for x in gt_instances]
        named = {f"loss_rpn_{k.removeprefix('loss_')}": term for k, term in self.losses.items()}
        targets, losses = assigned_losses(self.assigner, named, features, predictions, objects)
        positive = foreground(targets.labels, self.num_classes).sum()
        log_scalar("rpn/num_positives_per_image", positive / len(targets.labels))
        return losses

    @torch.no_grad()
    def propose(
        self, predictions: DensePredictions, image_sizes: Sequence[Size]
    ) -> list[Instances]:
        """Proposals of each image; ``objectness_logits`` are the logits of their scores."""
        return at_densities(
            self.candidates(predictions, image_sizes),
            image_sizes,
            Density(self.nms_thresh, self.post_nms_topk[self.training]),
            Density(self.nms_thresh_reg, self.post_nms_topk_reg) if self.training else None,
        )

    def candidates(
        self, predictions: DensePredictions, image_sizes: Sequence[Size]
    ) -> list[Candidates]:
        """For each image the logits (C,) of its candidates, and their boxes level by level.

        A level's are its best ``pre_nms_topk``, as in :func:`.decoupled_rpn.best_candidates`.
        """
        scores = self.score(predictions).squeeze(-1)
        boxes = predictions.boxes.split(predictions.level_sizes, dim=1)
        return best_candidates(
            probability_logits(scores).split(predictions.level_sizes, dim=1),
            lambda level, image, rows: boxes[level][image, rows],
            image_sizes,
            limit=self.pre_nms_topk[self.training],
            min_box_size=self.min_box_size,
            blamed="proposal generator's head" if self.training else None,
        )

    def _check_maps(self, images: ImageList, features: Mapping[str, Tensor]) -> None:
        """A map of a level has as many cells as fit into the padded images, rounded either way."""
        names, strides = self.in_features, self.head.strides
        wanted = self.head.context.finer_levels + len(strides)
        if len(names) != wanted or not set(names) <= features.keys():
            raise ValueError(
                f"proposal_generator.head_in_features names {names}, the backbone gives "
                f"{sorted(features)}; wanted are {wanted} of these: "
                f"{self.head.context.finer_levels} finer maps for "
                f"{type(self.head.context).__name__} (such as res2), then levels of strides "
                f"{strides}"
            )
        padded = map_size(images.tensor)
        for name, stride in zip(names[-len(strides) :], strides, strict=True):
            size = map_size(features[name])
            if any(
                not whole // stride <= cells <= -(-whole // stride)
                for whole, cells in zip(padded, size, strict=True)
            ):
                raise ValueError(
                    f"{name} has {size} cells for images of {padded} pixels, which is not the "
                    f"stride {stride} of the head; change model.proposal_generator.head.strides "
                    "or model.proposal_generator.head_in_features"
                )


def geometric_mean(class_scores: Tensor, objectness: Tensor) -> Tensor:
    """(D,) square root of class probability (D,) times objectness (D,)."""
    return (class_scores * objectness).sqrt()


class ProbabilisticROIHeads(DecoupledROIHeads):
    """Decoupled R-CNN's ROI heads whose scores are of object and class together.

    A detection's score combines its class's probability with the objectness of its proposal. The
    threshold of ``selection`` is one on class probabilities alone, which decides what is worth
    refining. With :func:`geometric_mean` it loses nothing that ``test_score_thresh`` would keep
    if it is at most the square of it.
    """

    def __init__(
        self,
        *,
        combine: Callable[[Tensor, Tensor], Tensor] = geometric_mean,
        test_score_thresh: float = 0.05,
        **decoupled: Any,
    ) -> None:
        """
        Args:
            combine: class probabilities (D,) and objectness (D,) -> scores (D,).
            test_score_thresh: detections with this score or less are dropped, before suppression.
            decoupled: arguments of :class:`DecoupledROIHeads`.
        """
        super().__init__(**decoupled)
        if not callable(combine):
            raise TypeError(
                f"roi_heads.combine must be callable, such as geometric_mean, got {combine!r}; a "
                "callable cannot be set on the command line: set it in a config file"
            )
        self.combine, self.test_score_thresh = combine, test_score_thresh

    def propose(
        self, features: Mapping[str, Tensor], proposals: Sequence[Instances]
    ) -> list[Instances]:
        """As :meth:`DecoupledROIHeads.propose`, with scores of object and class together.

        Raises:
            ValueError: the proposals have no ``objectness_logits``.
        """
        if not all(x.has("objectness_logits") for x in proposals):
            raise ValueError(
                "scores of object and class want proposals with objectness_logits, and some have "
                "none; use DecoupledROIHeads, or a proposal_generator that gives them"
            )
        logits = torch.cat([x.objectness_logits for x in proposals])
        results = []
        for found in super().propose(features, proposals):
            objectness = logits[found.proposal_index].sigmoid().to(found.scores.dtype)
            found.scores = self.combine(found.scores, objectness)
            results.append(found[found.scores > self.test_score_thresh])
        return results
