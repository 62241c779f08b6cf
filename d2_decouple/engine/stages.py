# SPDX-License-Identifier: Apache-2.0
"""How the boxes of an image's detections came about: proposals at two densities, and stages."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..config import ConfigError
from ..layers.boxes import overlaps
from ..modeling import DecoupledROIHeads, DecoupledRPN, TestTimeAugmentation
from ..modeling.decoupled_rpn import suppress_levels
from .looks import kept_outputs, ordinary, recipes_with, rounded, scale_to

__all__ = ["DetectionStages", "KeptProposals", "Proposals", "kept_proposals", "stages_of"]


class Proposals(NamedTuple):
    """Those of one branch, as it would learn from them if the image were one of training.

    Candidates are those of the test; the limit after suppression is that of training.

    Attributes:
        boxes: (P, 4) xyxy pixels of the image, best first.
        logits: (P,) of their objectness.
        nms_thresh: the overlap that suppresses one.
        survivors: how many suppression leaves, before the limit.
    """

    boxes: Tensor
    logits: Tensor
    nms_thresh: float
    survivors: int


class DetectionStages(NamedTuple):
    """How each of the D detections of one image came about, in K stages.

    IoU is that with the *reference* of a detection: the object that it overlaps most, where ground
    truth is given, else its own last box.

    Attributes:
        instances: the detections, best first, on the CPU, in pixels of the image: ``pred_boxes``,
            ``scores``, ``pred_classes``, and

            - ``stage_boxes`` (D, K + 1, 4) xyxy: the proposal, and the box after each stage;
            - ``stage_ious`` (D, K + 1) of these with the reference; 0 where there is no object;
            - ``proposal_index`` (D,), the proposal's place among those of the test;
            - ``near_proposals`` (D, 2), how many of either density have an IoU of ``near_iou``
              or more with the reference;
            - ``gt_index`` (D,), the object among ``gt_boxes``, -1 for none, if these are given.
        class_proposals: of the class branch; it sees the first of them in the test, too.
        box_proposals: of the box branch, more densely, of the same candidates.
        gt_boxes: (M, 4) boxes of objects, or None.
        near_iou: least IoU of the proposals that ``near_proposals`` counts; in the recipes also of
            those that the box branch learns from.
    """

    instances: Instances
    class_proposals: Proposals
    box_proposals: Proposals
    gt_boxes: Tensor | None
    near_iou: float = 0.5

    @property
    def references(self) -> Tensor:
        """(D, 4) what IoU is measured with; zeros where there is no object."""
        if self.gt_boxes is None:
            return self.instances.stage_boxes[:, -1]
        nothing = self.gt_boxes.new_zeros(1, 4)
        return torch.cat((self.gt_boxes, nothing))[self.instances.gt_index]  # -1 is the last

    def owners(self, limit: int) -> tuple[Tensor, Tensor]:
        """For each proposal, of the class branch and of the box branch, the detection near it.

        That is, of the first ``limit``, the one whose reference it overlaps most, by ``near_iou``
        or more; -1 where there is none.
        """
        shown, least = self.references[:limit], self.near_iou
        return (
            _best_object(shown, self.class_proposals.boxes, least=least),
            _best_object(shown, self.box_proposals.boxes, least=least),
        )

    def as_records(self) -> list[dict[str, Any]]:
        """For each detection its proposal, boxes and IoU of all stages, and counts, for JSON."""
        found = self.instances
        records = [
            {
                "proposal_index": int(found.proposal_index[index]),
                "boxes": rounded(found.stage_boxes[index].tolist(), 2),
                "ious": rounded(found.stage_ious[index].tolist(), 4),
                "near_proposals": found.near_proposals[index].tolist(),
            }
            for index in range(len(found))
        ]
        if self.gt_boxes is not None:
            for record, index in zip(records, found.gt_index.tolist(), strict=True):
                record["gt_index"] = index
        return records

    def proposals_record(self) -> dict[str, Any]:
        """How many proposals each density has, for JSON."""
        return {
            name: {"nms_thresh": x.nms_thresh, "survivors": x.survivors, "count": len(x.boxes)}
            for name, x in (("class", self.class_proposals), ("box", self.box_proposals))
        }


class KeptProposals(NamedTuple):
    """Outputs of each forward: of the anchor generator, the RPN's head, and the RPN."""

    anchors: list[list[Boxes]]
    predictions: list[tuple[list[Tensor], list[Tensor]]]
    proposals: list[tuple[list[Instances], dict[str, Tensor]]]


@contextmanager
def kept_proposals(model: nn.Module) -> Iterator[KeptProposals]:
    """What the RPN predicts in each forward inside the block.

    Raises:
        ConfigError: the model is no Decoupled R-CNN.
    """
    if isinstance(model, TestTimeAugmentation):
        raise ConfigError(
            "test-time augmentation merges detections of several forwards, and does not keep "
            "the stages of each: leave tta out to see stages"
        )
    parts = [getattr(model, name, None) for name in ("proposal_generator", "roi_heads")]
    rpn, heads = parts
    if not isinstance(rpn, DecoupledRPN) or not isinstance(heads, DecoupledROIHeads):
        names = " and ".join(type(part).__name__ for part in parts if part is not None)
        raise ConfigError(
            f"{type(model).__name__}{names and ' with '}{names} is not a GeneralizedRCNN with "
            "DecoupledRPN and DecoupledROIHeads, which keep the box of each stage; "
            + recipes_with("stages", ["decoupled_rcnn_"])
        )
    with kept_outputs(rpn.anchor_generator, rpn.rpn_head, rpn) as kept:
        yield KeptProposals(*kept)


def stages_of(
    model: GeneralizedRCNN, kept: KeptProposals, found: Instances, gt_boxes: Any = None
) -> DetectionStages:
    """Collect what one forward, of one image, says about its detections.

    Args:
        model: the Decoupled R-CNN that made them.
        kept: by :func:`kept_proposals`.
        found: detections in pixels of the image; their ``stage_boxes`` in those of the resized one.
        gt_boxes: (M, 4) xyxy pixels of the image, or None.

    Raises:
        ConfigError: ``gt_boxes`` have another shape, or are not finite.
    """
    gt_boxes = None if gt_boxes is None else _as_boxes(gt_boxes)
    rpn, size = model.proposal_generator, found.image_size
    seen = kept.proposals[0][0][0].image_size
    scale = scale_to(size, seen).repeat(2)
    of_class, of_box = (
        Proposals(ordinary(boxes) * scale, ordinary(logits), threshold, survivors)
        for boxes, logits, threshold, survivors in _densities(rpn, kept, seen)
    )
    boxes = found.stage_boxes * scale
    boxes[:, -1] = found.pred_boxes.tensor  # cut to the image
    fields = {**found.get_fields(), "stage_boxes": boxes}
    if gt_boxes is not None:
        fields["gt_index"] = _best_object(gt_boxes, boxes[:, -1])
    stages = DetectionStages(Instances(size, **fields), of_class, of_box, gt_boxes)
    near = [overlaps(stages.references, x.boxes) >= stages.near_iou for x in (of_class, of_box)]
    stages.instances.near_proposals = torch.stack([x.sum(dim=1) for x in near], dim=1)
    ious = overlaps(stages.references, boxes.flatten(0, 1)).unflatten(1, boxes.shape[:2])
    stages.instances.stage_ious = ious.diagonal().T.contiguous()
    return stages


@torch.inference_mode()
def _densities(
    rpn: DecoupledRPN, kept: KeptProposals, size: tuple[int, int]
) -> list[tuple[Tensor, Tensor, float, int]]:
    """For the class and the box branch :class:`Proposals` in pixels of the resized image."""
    anchors = [x.tensor for x in kept.anchors[0]]
    ((logits, levels),) = rpn.candidates(anchors, *_by_anchor(*kept.predictions[0]), [size])
    densities = []
    for threshold, limit in (
        (rpn.nms_thresh, rpn.post_nms_topk[True]),
        (rpn.nms_thresh_reg, rpn.post_nms_topk_reg),
    ):
        survivors = suppress_levels(logits, levels, threshold)
        best = survivors[:limit]
        densities.append((torch.cat(levels)[best], logits[best], threshold, len(survivors)))
    return densities


def _as_boxes(values: Any) -> Tensor:
    """(M, 4) of boxes in any form."""
    values = torch.as_tensor(getattr(values, "tensor", values), dtype=torch.float32).cpu()
    values = values.reshape(0, 4) if not values.numel() else values
    if values.dim() != 2 or values.shape[1] != 4 or not bool(values.isfinite().all()):
        raise ConfigError(
            f"gt_boxes have the shape {tuple(values.shape)}; wanted are finite boxes (M, 4), "
            "[x1, y1, x2, y2] in pixels of the image"
        )
    return values


def _by_anchor(
    logits: Sequence[Tensor], deltas: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """(N, A, H, W) logits and (N, 4 A, H, W) changes of each level -> (N, H W A) and (..., 4)."""
    rows, changes = ([x.permute(0, 2, 3, 1).flatten(1) for x in maps] for maps in (logits, deltas))
    return rows, [x.unflatten(1, (-1, 4)) for x in changes]


def _best_object(gt_boxes: Tensor, boxes: Tensor, *, least: float = 0.0) -> Tensor:
    """(D,) the object that each box overlaps most, -1 where that is nothing or below ``least``."""
    if not len(gt_boxes):
        return torch.full((len(boxes),), -1)
    iou, index = overlaps(gt_boxes, boxes).max(dim=0)
    return torch.where((iou > 0) & (iou >= least), index, -1)
