# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN's region proposals: the same candidates at two densities (section IV-A)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import configurable
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY, RPN
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import nms

from ..layers.precision import at_least_float32
from .matching import BestOverlaps, best_overlaps
from .selection import clip_to_image

__all__ = [
    "Candidates",
    "DecoupledProposals",
    "DecoupledRPN",
    "Density",
    "at_densities",
    "best_candidates",
    "check_densities",
    "dense_proposals",
    "suppress_levels",
]

Size = tuple[int, int]
Candidates = tuple[Tensor, list[Tensor]]  # logits (C,) of an image's, and their boxes by level


class Density(NamedTuple):
    """How far candidates are thinned out.

    Attributes:
        nms_thresh: overlap with a better one of its level that drops a candidate.
        limit: the best survivors that are kept, per image.
    """

    nms_thresh: float
    limit: int


class DecoupledProposals(list[Instances]):
    """The class branch's proposals of each image; ``reg`` has the box branch's, as a list, too.

    To everything in Detectron2 it is the list that a ``RPN`` gives. Neither set need contain the
    other: what a looser suppression keeps first can drop what a tighter one keeps.
    """

    def __init__(self, cls: Sequence[Instances], reg: Sequence[Instances]) -> None:
        super().__init__(cls)
        self.reg = list(reg)


@PROPOSAL_GENERATOR_REGISTRY.register()
class DecoupledRPN(RPN):
    """Detectron2's RPN, whose training proposals come at two densities (section IV-A).

    The same candidates are suppressed twice. In evaluation there is one ordinary set. The best
    candidates of each level are chosen before boxes are decoded, not after.
    """

    @configurable
    def __init__(
        self, *, nms_thresh_reg: float = 0.85, post_nms_topk_reg: int = 1000, **rpn: Any
    ) -> None:
        """
        Args:
            nms_thresh_reg: overlap that drops a proposal of the box branch.
            post_nms_topk_reg: the best proposals of the box branch that are kept, per image.
            rpn: arguments of Detectron2's ``RPN``; ``nms_thresh`` and ``post_nms_topk`` are those
                of the class branch, and of evaluation.
        """
        super().__init__(**rpn)
        check_densities(self.nms_thresh, nms_thresh_reg, post_nms_topk_reg)
        self.nms_thresh_reg, self.post_nms_topk_reg = nms_thresh_reg, post_nms_topk_reg

    @classmethod
    def from_config(cls, cfg: Any, input_shape: Mapping[str, Any]) -> dict[str, Any]:
        """The parts of the recipe that ``cfg.MODEL.DECOUPLE`` names (the yacs door)."""
        from ..config import instantiate_parts

        return instantiate_parts(cfg, "proposal_generator", input_shape)

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As Detectron2's, without holding the overlaps of all anchors and all objects at once.

        An object without an area is nobody's; there it makes every anchor a positive.

        Args:
            anchors: those of each level, R of all levels.
            gt_instances: of each image, with ``gt_boxes``.

        Returns:
            Of each image (R,) labels, 1, 0, or -1 for what is not sampled, and (R, 4) matched
            boxes, which mean something where the label is 1.
        """
        if type(self.anchor_matcher) is not Matcher:
            found: tuple[list[Tensor], list[Tensor]] = super().label_and_sample_anchors(
                anchors, gt_instances
            )
            return found
        boxes = Boxes.cat(list(anchors))
        labels, matched = [], []
        for truth in gt_instances:
            gt_boxes = truth.gt_boxes.tensor
            best = best_overlaps(boxes.tensor, gt_boxes)
            label = _labels(self.anchor_matcher, best)
            if self.anchor_boundary_thresh >= 0:
                inside = boxes.inside_box(truth.image_size, self.anchor_boundary_thresh)
                label = label.masked_fill_(~inside, -1)
            labels.append(self._subsample_labels(label))
            some = len(gt_boxes) > 0
            matched.append(gt_boxes[best.matched] if some else torch.zeros_like(boxes.tensor))
        return labels, matched

    @torch.no_grad()
    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[Size],
    ) -> list[Instances]:
        """Proposals of each image; in training :class:`DecoupledProposals`.

        Args:
            anchors: those of each level.
            pred_objectness_logits: (N, A) of each level.
            pred_anchor_deltas: (N, A, 4) of each level.
            image_sizes: (H, W) of each image, without padding.
        """
        found = self.candidates(
            [x.tensor for x in anchors], pred_objectness_logits, pred_anchor_deltas, image_sizes
        )
        return at_densities(
            found,
            image_sizes,
            Density(self.nms_thresh, self.post_nms_topk[self.training]),
            Density(self.nms_thresh_reg, self.post_nms_topk_reg) if self.training else None,
        )

    def candidates(
        self,
        anchors: Sequence[Tensor],
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        image_sizes: Sequence[Size],
    ) -> list[Candidates]:
        """For each image the logits (C,) of its candidates, and their boxes level by level.

        A level's candidates are its best ``pre_nms_topk``, best first: boxes (C_l, 4) in pixels,
        cut to the image, without those that are too small.

        Raises:
            FloatingPointError: in training, if there is NaN or infinity among them.
        """

        def decode(level: int, image: int, kept: Tensor) -> Tensor:
            change = at_least_float32(deltas[level][image, kept])
            return self.box2box_transform.apply_deltas(change, anchors[level][kept])

        return best_candidates(
            logits,
            decode,
            image_sizes,
            limit=self.pre_nms_topk[self.training],
            min_box_size=self.min_box_size,
            blamed="RPN" if self.training else None,
        )


def _labels(matcher: Matcher, best: BestOverlaps) -> Tensor:
    """(R,) int8, what Detectron2's matcher says of boxes with these overlaps."""
    labels = best.overlap.new_ones(len(best.overlap), dtype=torch.int8)
    limits = zip(matcher.labels, matcher.thresholds[:-1], matcher.thresholds[1:], strict=True)
    for label, low, high in limits:
        labels.masked_fill_((best.overlap >= low) & (best.overlap < high), label)
    if matcher.allow_low_quality_matches:
        labels.masked_fill_(best.top_overlap > 0, 1)
    return labels


def check_densities(nms_thresh: float, nms_thresh_reg: float, post_nms_topk_reg: int) -> None:
    """Raise ValueError unless a generator's two densities can be meant."""
    for name, value in (("nms_thresh", nms_thresh), ("nms_thresh_reg", nms_thresh_reg)):
        if not 0 < value <= 1:
            raise ValueError(
                f"proposal_generator.{name} is {value}; wanted is an overlap above 0, at most "
                "1, such as 0.7 for classes and 0.85 for boxes"
            )
    if post_nms_topk_reg < 1:
        raise ValueError(
            f"proposal_generator.post_nms_topk_reg is {post_nms_topk_reg}; wanted is how many "
            "proposals are kept, from 1, such as 1000"
        )


def best_candidates(
    logits: Sequence[Tensor],
    decode: Callable[[int, int, Tensor], Tensor],
    image_sizes: Sequence[Size],
    *,
    limit: int,
    min_box_size: float,
    blamed: str | None,
) -> list[Candidates]:
    """Each image's best of each level, best first, cut to the image, those too small left out.

    Args:
        logits: (N, A) of each level.
        decode: ``(level, image, rows)`` -> (D, 4) boxes of these rows of A, xyxy pixels.
        image_sizes: (H, W) of each image, without padding.
        limit: candidates of a level.
        min_box_size: pixels that both sides of a box must exceed.
        blamed: who predicts them, for the error; None leaves out what is no number.

    Raises:
        FloatingPointError: there is NaN or infinity among them, and somebody to blame.
    """
    images: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in image_sizes]
    for level, scores in enumerate(logits):
        scores, index = at_least_float32(scores).topk(min(limit, scores.shape[1]), dim=1)
        for image, (size, kept) in enumerate(zip(image_sizes, index, strict=True)):
            value, boxes = scores[image], decode(level, image, kept)
            finite = boxes.isfinite().all(-1) & value.isfinite()
            if not bool(finite.all()):
                if blamed is not None:
                    raise FloatingPointError(
                        f"the {blamed} predicts NaN or infinity for {int((~finite).sum())} "
                        f"proposals of level {level}: the training has diverged; lower the "
                        "learning rate, or type train.max_grad_norm=10"
                    )
                value, boxes = value[finite], boxes[finite]
            boxes = clip_to_image(boxes, size)
            large = (boxes[:, 2:] - boxes[:, :2] > min_box_size).all(-1)
            for part, found in zip(images[image], (value[large], boxes[large]), strict=True):
                part.append(found)
    return [(torch.cat(scores), boxes) for scores, boxes in images]


def at_densities(
    found: Sequence[Candidates],
    image_sizes: Sequence[Size],
    of_classes: Density,
    of_boxes: Density | None,
) -> list[Instances]:
    """Proposals of each image, best first, with ``proposal_boxes`` and ``objectness_logits``.

    With a second density they are :class:`DecoupledProposals`: the same candidates, suppressed
    twice (section IV-A).
    """

    def suppressed(density: Density) -> list[Instances]:
        results = []
        for (scores, levels), size in zip(found, image_sizes, strict=True):
            kept = suppress_levels(scores, levels, density.nms_thresh)[: density.limit]
            boxes = Boxes(torch.cat(list(levels))[kept])
            results.append(Instances(size, proposal_boxes=boxes, objectness_logits=scores[kept]))
        return results

    first = suppressed(of_classes)
    return first if of_boxes is None else DecoupledProposals(first, suppressed(of_boxes))


def suppress_levels(scores: Tensor, levels: Sequence[Tensor], threshold: float) -> Tensor:
    """Indices of the boxes that survive among those of their own level, best first.

    Args:
        scores: (C,) of all boxes, level by level.
        levels: (C_l, 4) boxes of each level.
        threshold: a box that overlaps a better one by more is dropped.
    """
    kept, start = [], 0
    for boxes in levels:
        kept.append(start + nms(boxes, scores[start : start + len(boxes)], threshold))
        start += len(boxes)
    survivors = torch.cat(kept)
    return survivors[scores[survivors].argsort(descending=True, stable=True)]


def dense_proposals(proposals: Sequence[Instances]) -> list[Instances]:
    """The box branch's proposals of each image.

    Raises:
        TypeError: there is one density only.
    """
    dense = getattr(proposals, "reg", None)
    if dense is None or len(dense) != len(proposals):
        raise TypeError(
            f"training wants proposals at two densities, DecoupledProposals of a DecoupledRPN, got "
            f"a {type(proposals).__name__} of {len(proposals)}: precomputed proposals have one "
            "density (they can be used for evaluation), and a slice or a copy of "
            "DecoupledProposals loses its `reg`; use model.proposal_generator=DecoupledRPN, or "
            "DenseProposals"
        )
    return dense
