# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN with a classifier at every stage, as Cascade R-CNN has it (Table X).

The paper compares this with its own single classifier, and finds it hardly better. Neither the
authors' code nor the paper has details: what both leave open is Cascade R-CNN's way.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from .decoupled_rcnn import DecoupledROIHeads
from .regions import Regions, Samples, match_regions
from .roi_branches import ClassBranch, class_change

__all__ = ["CascadedClassROIHeads"]

Matching = Callable[[Tensor], tuple[Tensor, Tensor]]


class CascadedClassROIHeads(DecoupledROIHeads):
    """A classifier and a regressor at each stage, with rising overlaps that make a positive.

    The classifier of a later stage learns from the class branch's sample as the regressors before
    it have moved it: of positives by the change of their class, of others by that of the
    likeliest. At test its scores are averaged over the stages, so no region can be left out early.
    """

    class_branches: Any  # a ModuleList of ClassBranch, of the stages from the second on

    def __init__(
        self,
        *,
        class_branches: Sequence[ClassBranch],
        stage_matchers: Sequence[Matching],
        **decoupled: Any,
    ) -> None:
        """
        Args:
            class_branches: classifiers of the second, third, ... stage.
            stage_matchers: overlaps -> matches, of each stage, for both branches.
            decoupled: other arguments of :class:`DecoupledROIHeads`; ``class_branch`` is that of
                the first stage.
        """
        stages = len(decoupled["box_branches"])
        if len(class_branches) + 1 != stages or len(stage_matchers) != stages:
            raise ValueError(
                f"roi_heads has {stages} box_branches, {len(class_branches)} class_branches and "
                f"{len(stage_matchers)} stage_matchers; wanted is a classifier for each stage from "
                "the second on (the first one's is class_branch), and a matcher for each stage"
            )
        seen = [stage for stage, x in enumerate(decoupled["box_branches"]) if x.sees_all]
        if seen:
            raise ValueError(
                f"box_branches {seen} see all regions for their norms, such as ConvBoxBranch; in "
                "CascadedClassROIHeads each sees the class branch's regions once more, so that "
                "its statistics would be of both: take BoxBranch or SharedBoxBranch"
            )
        super().__init__(box_matcher=stage_matchers[0], **decoupled)
        self.class_branches = nn.ModuleList(class_branches)
        self.stage_matchers = list(stage_matchers)

    def match(self, regions: Regions, targets: Sequence[Instances], stage: int) -> Samples:
        """What each region of a stage (from 0) shall learn."""
        return match_regions(regions, targets, self.stage_matchers[stage], self.num_classes)

    def losses(
        self,
        features: Mapping[str, Tensor],
        class_sample: Sequence[Instances],
        box_sample: Samples,
        targets: Sequence[Instances],
    ) -> dict[str, Tensor]:
        """Those of :class:`DecoupledROIHeads`, and ``loss_cls_stage{k}`` from stage 1 on."""
        losses = super().losses(features, class_sample, box_sample, targets)
        maps = self.maps(features)
        regions = Regions.of_proposals(class_sample, maps[0].dtype)
        labels = torch.cat([x.gt_classes for x in class_sample])
        for stage, branch in enumerate(self.class_branches, start=1):
            regions = self._carried(stage - 1, maps, regions, labels)
            labels = self.match(regions, targets, stage).gt_classes
            logits, _ = branch(self.pool(maps, regions))
            weight = self.stage_loss_weights[stage]
            losses[f"loss_cls_stage{stage}"] = weight * self.class_loss(logits, labels, stage)
        return losses

    @torch.no_grad()
    def _carried(
        self, stage: int, maps: Sequence[Tensor], regions: Regions, labels: Tensor
    ) -> Regions:
        """The class branch's regions after a stage of the regressors."""
        pooled = self.pool(maps, regions)
        logits, hidden = self.classifier(stage)(pooled)
        background = labels == self.num_classes
        classes = torch.where(background, logits[:, :-1].argmax(-1), labels)
        deltas = self.run_stage(stage, maps, regions, pooled, hidden)
        transform = self.box_branches[stage].transform
        return regions.moved(transform.apply_deltas(class_change(deltas, classes), regions.boxes))

    def classifier(self, stage: int) -> Any:
        """That of the stage (from 0)."""
        return self.class_branches[stage - 1] if stage else self.class_branch

    def propose(
        self, features: Mapping[str, Tensor], proposals: Sequence[Instances]
    ) -> list[Instances]:
        """As :meth:`DecoupledROIHeads.propose`, with the mean of all classifiers' scores."""
        sizes = [x.image_size for x in proposals]
        maps = self.maps(features)
        first = Regions.of_proposals(proposals, maps[0].dtype)
        regions, boxes, scores = first, [], []
        for stage in range(len(self.box_branches)):
            pooled = self.pool(maps, regions)
            logits, hidden = self.classifier(stage)(pooled)
            scores.append(self.score(logits))
            deltas = self.run_stage(stage, maps, regions, pooled, hidden)
            boxes.append(self.moved_boxes(stage, regions, deltas, logits[:, :-1].argmax(-1)))
            if stage + 1 < len(self.box_branches):
                regions = regions.moved(boxes[-1])
        rows = torch.arange(len(first), device=first.boxes.device)
        return self.select(first, boxes, torch.stack(scores).mean(0), rows, sizes)
