# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN (Wang et al., "Sensitivity-Specific Detector for Higher Accurate Localization",
T-CSVT): the two branches of a two-stage detector learn from proposals of different density.

A box is sensitive to small shifts of a proposal, a class is not. So the box branch learns from
more densely overlapping proposals, of which it sees the positives alone, and the class branch from
an ordinary sample. Boxes are refined stage by stage; there is one classifier. Details that the
paper leaves open are those of the authors' code.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.boxes import clip_to_sizes
from ..layers.losses import loss_normalizer
from ..layers.precision import at_least_float32
from ..structures import foreground
from .decoupled_rpn import dense_proposals
from .loading import FASTER_RCNN, drop_misfits, rename
from .regions import (
    Regions,
    RegionSelection,
    Samples,
    draw_samples,
    log_accuracy,
    log_scalar,
    match_regions,
    pool_both,
    pool_regions,
)
from .roi_branches import ClassBranch, Regressor, check_num_classes, check_settings, class_change

__all__ = ["DecoupledROIHeads"]

Size = tuple[int, int]


@ROI_HEADS_REGISTRY.register()
class DecoupledROIHeads(StandardROIHeads):
    """One classifier and K >= 1 regression stages, each with its own sample (sections IV-A, B).

    *Training.* The class branch learns from Detectron2's sample of the first set of proposals.
    Stage 1 of the box branches learns from the positives of the second set, without ground truth;
    each further stage from what the one before it has moved and that still overlaps an object
    enough. *Test.* Scores are those of a proposal, its box is that of the last stage.

    Masks and keypoints are Detectron2's, and learn from the class branch's sample.
    """

    box_branches: Any  # a ModuleList of Regressor

    @configurable
    def __init__(
        self,
        *,
        box_in_features: Sequence[str],
        box_pooler: ROIPooler,
        class_branch: ClassBranch,
        box_branches: Sequence[Regressor],
        box_matcher: Callable[[Tensor], tuple[Tensor, Tensor]],
        selection: RegionSelection,
        box_batch_size_per_image: int = 512,
        box_loss_weight: float = 0.5,
        stage_loss_weights: Sequence[float] = (1.0, 0.5, 0.25),
        **standard: Any,
    ) -> None:
        """
        Args:
            box_in_features: names of the maps that regions are pooled from, finest first.
            box_pooler: how they are pooled.
            class_branch: the classifier.
            box_branches: the regressor of each stage.
            box_matcher: overlaps -> matches of the box branches, the same at every stage.
            selection: scores and boxes -> detections.
            box_batch_size_per_image: regions that stage 1 gets of an image, positives first.
            box_loss_weight: of all stages together (lambda of Eq. 8).
            stage_loss_weights: of each stage (the authors' code; 1 each in Eq. 8).
            standard: arguments of Detectron2's ``StandardROIHeads``, without its box head.
        """
        if standard.pop("train_on_pred_boxes", False):
            raise ValueError(
                "train_on_pred_boxes is on: masks would learn from boxes that the class branch's "
                "sample does not have, since regressors get a sample of their own; turn it off"
            )
        super().__init__(
            box_in_features=list(box_in_features),
            box_pooler=box_pooler,
            box_head=None,
            box_predictor=None,
            **standard,
        )
        self.class_branch, self.box_branches = class_branch, nn.ModuleList(box_branches)
        self.box_matcher, self.selection = box_matcher, selection
        self.box_batch_size_per_image = box_batch_size_per_image
        self.box_loss_weight = float(box_loss_weight)
        self.stage_loss_weights = tuple(float(weight) for weight in stage_loss_weights)
        check_settings(self)
        check_num_classes(self.class_branch, self.box_branches, self.num_classes)

    @classmethod
    def from_config(cls, cfg: Any, input_shape: Mapping[str, Any]) -> dict[str, Any]:
        """The parts of the recipe that ``cfg.MODEL.DECOUPLE`` names (the yacs door)."""
        from ..config import instantiate_parts

        return instantiate_parts(cfg, "roi_heads", input_shape)

    def forward(
        self,
        images: Any,
        features: Mapping[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """As Detectron2's ROI heads: (sample, losses) in training, (detections, {}) in evaluation.

        Raises:
            TypeError: in training, if the proposals have one density only.
            FloatingPointError: a stage predicts NaN or infinity.
        """
        if not self.training:
            found = [self.selection.suppress(x) for x in self.propose(features, proposals)]
            return self.forward_with_given_boxes(features, found), {}
        dense = dense_proposals(proposals)
        assert targets is not None, "ROI heads need ground truth in training"
        sample = self.label_and_sample_proposals(proposals, targets)
        losses = self.losses(features, sample, self.sample_boxes(dense, targets), targets)
        losses.update(self._forward_mask(features, sample))
        losses.update(self._forward_keypoint(features, sample))
        return sample, losses

    def maps(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        """The maps that regions are pooled from, laid out for it, in float32 or wider."""
        # In bfloat16 coordinates would be rounded to four pixels and more.
        return [at_least_float32(features[name]).contiguous() for name in self.box_in_features]

    def pool(self, maps: Sequence[Tensor], regions: Regions, scale: float = 1.0) -> Tensor:
        """(S, C, P, P) features of regions."""
        return pool_regions(self.box_pooler, maps, regions, scale)

    @torch.no_grad()
    def sample_boxes(self, proposals: Sequence[Instances], targets: Sequence[Instances]) -> Samples:
        """The regions of stage 1: positives, filled up with others that nothing is learned from.

        The others count in the divisor of the loss, and are seen by branches that see all.
        """
        samples = self.match(Regions.of_proposals(proposals, torch.float32), targets, 0)
        return draw_samples(
            samples, len(proposals), self.box_batch_size_per_image, self.num_classes
        )

    def match(self, regions: Regions, targets: Sequence[Instances], stage: int) -> Samples:
        """What each region of a stage (from 0) of the box branches shall learn."""
        return match_regions(regions, targets, self.box_matcher, self.num_classes)

    def losses(
        self,
        features: Mapping[str, Tensor],
        class_sample: Sequence[Instances],
        box_sample: Samples,
        targets: Sequence[Instances],
    ) -> dict[str, Tensor]:
        """``loss_cls``, and ``loss_box_reg_stage{k}`` of each stage from 0.

        Args:
            features: maps by name.
            class_sample: of each image, with ``proposal_boxes`` and ``gt_classes``.
            box_sample: the regions of the first stage.
            targets: ground truth of each image.
        """
        maps = self.maps(features)
        regions = Regions.of_proposals(class_sample, maps[0].dtype)
        box_sample = box_sample.to(maps[0].dtype)
        labels = torch.cat([x.gt_classes for x in class_sample])
        known = not self.box_branches[0].sees_all and self.box_branches[0].roi_scale == 1
        learned = box_sample.regions.at(foreground(box_sample.gt_classes, self.num_classes) & known)
        pooled, pooled_learned = pool_both(self.box_pooler, maps, regions, learned)
        logits, _ = self.class_branch(pooled)
        losses = {"loss_cls": self.class_loss(logits, labels)}
        for stage in range(len(self.box_branches)):
            losses[f"loss_box_reg_stage{stage}"], box_sample = self.box_loss(
                stage,
                maps,
                regions,
                box_sample,
                targets,
                pooled_learned if known and not stage else None,
            )
        return losses

    def class_loss(self, logits: Tensor, labels: Tensor, stage: int = 0) -> Tensor:
        """Mean softmax cross entropy of (S, K + 1) logits over the regions of all processes."""
        logits = at_least_float32(logits)
        log_accuracy(logits, labels, self.num_classes, f"_stage{stage}" if stage else "")
        total = F.cross_entropy(logits, labels, reduction="sum")
        return total / loss_normalizer(logits.new_tensor(len(labels)))

    def box_loss(
        self,
        stage: int,
        maps: Sequence[Tensor],
        class_regions: Regions,
        sample: Samples,
        targets: Sequence[Instances],
        pooled: Tensor | None = None,
    ) -> tuple[Tensor, Samples]:
        """A stage's loss, and the next one's regions; ``pooled`` (S+, ...) are the positives'."""
        learned = sample.at(foreground(sample.gt_classes, self.num_classes))
        log_scalar(f"roi_head/num_positives_stage{stage}", len(learned) / len(targets))
        change = self.changes_in_training(stage, maps, class_regions, sample, learned, pooled)
        transform = self.box_branches[stage].transform
        gt_change = transform.get_deltas(learned.regions.boxes, learned.gt_boxes)
        # Half of both samples at stage 1, which is the box sample's size where both are full.
        count = (len(class_regions) + len(sample)) / 2 if stage == 0 else len(sample)
        weight = self.box_loss_weight * self.stage_loss_weights[stage]
        loss = weight * (change - gt_change).abs().sum() / loss_normalizer(change.new_tensor(count))
        if stage + 1 < len(self.box_branches):
            sample = self.match_again(self.refined(stage, sample, change), targets, stage + 1)
        return loss, sample

    def changes_in_training(
        self,
        stage: int,
        maps: Sequence[Tensor],
        class_regions: Regions,
        sample: Samples,
        learned: Samples,
        pooled: Tensor | None = None,
    ) -> Tensor:
        """(S+, 4) predicted changes of the positives, each of its object's class."""
        branch = self.box_branches[stage]
        if branch.sees_all:
            seen = class_regions.joined(sample.regions) if stage == 0 else sample.regions
            deltas = self.run_stage(stage, maps, seen)[len(seen) - len(sample) :]
            deltas = deltas[foreground(sample.gt_classes, self.num_classes)]
        else:
            deltas = self.run_stage(stage, maps, learned.regions, pooled)
        return class_change(deltas, learned.gt_classes)

    @torch.no_grad()
    def refined(self, stage: int, sample: Samples, change: Tensor) -> Regions:
        """Positives moved by their ``change`` (S+, 4) and cut to the image; others as they were."""
        positive = foreground(sample.gt_classes, self.num_classes)
        learned = sample.regions.at(positive)
        moved = self.box_branches[stage].transform.apply_deltas(change.detach(), learned.boxes)
        boxes = sample.regions.boxes.clone()
        boxes[positive] = learned.moved(moved).boxes.to(boxes.dtype)
        return Regions(boxes, sample.regions.image_index, sample.regions.sizes)

    @torch.no_grad()
    def match_again(self, regions: Regions, targets: Sequence[Instances], stage: int) -> Samples:
        """The sample of a later stage (Eq. 7): matched anew, in each image positives first."""
        matched = self.match(regions, targets, stage)
        background = matched.gt_classes == self.num_classes
        return matched.at((2 * regions.image_index + background).argsort(stable=True))

    def run_stage(
        self,
        stage: int,
        maps: Sequence[Tensor],
        regions: Regions,
        pooled: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Changes (S, 4) or (S, 4 K) that one stage (from 0) predicts for regions.

        Args:
            stage: which.
            maps: pooled from, unless ``pooled`` (S, C, P, P) fits the branch.
            regions: S of them.
            pooled: their features, where these are known.
            hidden: (S, D) what the class branch's head made of them, where that is known.

        Raises:
            FloatingPointError: there is NaN or infinity among the changes.
        """
        branch = self.box_branches[stage]
        if pooled is None or branch.roi_scale != 1:
            pooled = self.pool(maps, regions, branch.roi_scale)
        if branch.shares_head and hidden is None:
            hidden = self.classifier(stage).head(pooled)
        deltas = at_least_float32(branch(pooled, hidden))
        if not bool(deltas.isfinite().all()):
            raise FloatingPointError(
                f"regression stage {stage + 1} of {len(self.box_branches)} predicts NaN or "
                f"infinity for {int((~deltas.isfinite()).any(-1).sum())} of {len(deltas)} regions: "
                "the weights or the maps have some; in training, lower the learning rate or type "
                "train.max_grad_norm=10"
            )
        return deltas

    def classifier(self, stage: int) -> Any:
        """The class branch that regions of a stage go through, and whose head may be shared."""
        return self.class_branch

    def propose(
        self, features: Mapping[str, Tensor], proposals: Sequence[Instances]
    ) -> list[Instances]:
        """Candidates of each image, before suppression.

        Beside ``pred_boxes``, ``scores`` and ``pred_classes`` they have ``proposal_index``, which
        of the batch's proposals each was, and ``stage_boxes`` (D, K + 1, 4): the proposal, and
        the box after each stage, xyxy pixels of the resized image.
        """
        maps = self.maps(features)
        regions = Regions.of_proposals(proposals, maps[0].dtype)
        pooled = self.pool(maps, regions)
        logits, hidden = self.class_branch(pooled)
        scores = self.score(logits)
        rows = self.selection.worth_refining(scores)
        if len(rows) < len(regions):
            regions, scores, logits = regions.at(rows), scores[rows], logits[rows]
            pooled, hidden = pooled[rows], hidden[rows]
        boxes = self.refine(maps, regions, logits, pooled, hidden)
        return self.select(regions, boxes, scores, rows, [x.image_size for x in proposals])

    def score(self, logits: Tensor) -> Tensor:
        """(S, K) probabilities of the classes, without that of background, from (S, K + 1)."""
        return at_least_float32(logits).softmax(-1)[:, :-1]

    def refine(
        self,
        maps: Sequence[Tensor],
        regions: Regions,
        logits: Tensor,
        pooled: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> list[Tensor]:
        """The boxes of regions after each stage: (S, 4), or (S, K, 4) of the last one.

        A stage with a change for each class moves a region by that of its likeliest class, and
        the last one by each. No region is dropped, so rows stay those of ``logits`` (S, K + 1).
        """
        likeliest = logits[:, :-1].argmax(-1)
        boxes = []
        for stage in range(len(self.box_branches)):
            deltas = self.run_stage(stage, maps, regions, pooled, hidden)
            pooled = hidden = None  # those of the proposals; regions move
            boxes.append(self.moved_boxes(stage, regions, deltas, likeliest))
            if stage + 1 < len(self.box_branches):
                regions = regions.moved(boxes[-1])
        return boxes

    def moved_boxes(self, stage: int, regions: Regions, deltas: Tensor, classes: Tensor) -> Tensor:
        """Boxes (S, 4) after a stage, cut to the image; (S, K, 4) after the last, of each class.

        Where each class has a change of its own, an earlier stage takes that of ``classes`` (S,).
        """
        if stage + 1 < len(self.box_branches):
            deltas = class_change(deltas, classes)
        boxes = self.box_branches[stage].transform.apply_deltas(deltas, regions.boxes)
        boxes = clip_to_sizes(boxes.unflatten(1, (-1, 4)), regions.sizes)
        return boxes[:, 0] if boxes.shape[1] == 1 else boxes

    def select(
        self,
        regions: Regions,
        boxes: Sequence[Tensor],
        scores: Tensor,
        rows: Tensor,
        image_sizes: Sequence[Size],
    ) -> list[Instances]:
        """Candidates of each image from boxes after each stage and scores (S, K) of regions."""
        found = self.selection.propose(
            regions,
            boxes[-1],
            scores,
            image_sizes,
            proposal_index=rows,
            stage_boxes=torch.stack([regions.boxes, *boxes[:-1]], dim=1),
        )
        for item in found:
            last = item.pred_boxes.tensor[:, None]
            item.stage_boxes = torch.cat((item.stage_boxes.to(last.dtype), last), dim=1)
        return found

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # A Faster R-CNN's one head begins as both: with one stage this then detects the same.
        rename(self, state_dict, prefix, FASTER_RCNN)
        drop_misfits(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
