# SPDX-License-Identifier: Apache-2.0
"""Which cells of which level would learn each object of an image, and how strongly.

The assigner of a detector is asked as in a training, at its end, with what the detector predicts.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor

from ..config import ConfigError
from ..layers.losses import generalized_iou_loss
from ..layers.precision import at_least_float32
from ..modeling import OneStageDetector, PositiveTerm
from ..modeling.autoassign import InsideLocations
from ..modeling.head import map_size
from ..structures import DensePredictions, DenseTargets, foreground
from .looks import as_one_stage, level_names_of, ordinary, rounded, scale_to

__all__ = ["Assignment", "LabelSet", "assignment_of", "check_assignment"]

_METHODS = tuple(
    f"{name}_"
    for name in (
        *("atss", "autoassign", "ddod", "fcos", "gfl", "gflv2", "ota", "pdnet", "retinanet"),
        *("salt", "sapd", "tscode"),
    )
)  # recipes of one-stage detectors begin so
_FAINT = 0.01  # of an object's greatest weight: what a cell below it learns is left out
_END = 10**9  # iteration: whatever an assigner does later in a training, it does by then
_BOTH = "class and box"
# A second label set in the extras -> what the first one teaches, whether that is a box, too; what
# the second one teaches, always boxes alone.
_SECOND = {
    "coarse": ("class and final box", True, "coarse box"),
    "box": ("class", False, "box"),
}


class LabelSet(NamedTuple):
    """The C cells that learn objects from one set of targets.

    A cell that learns two objects comes twice. Where a cell has several predictions (anchors), the
    weights of those that learn the object are added. A cell whose weights are all below a
    hundredth of its object's greatest is left out.

    Attributes:
        learns: what is learned, such as "class and box".
        cells: (C, 4) the square of a stride's side, xyxy pixels of the image; it may leave it.
        levels: (C,) place of the level in ``level_names``.
        gt_index: (C,) the object.
        predictions: (C,) how many of the cell's predictions learn it.
        cls_weights: (C,) in the class's loss, before the normaliser; None if it teaches no class.
        box_weights: (C,) in the box's loss; None if it teaches no box.
        ignored: (I, 4) squares of cells that have a prediction whose class learns nothing, as far
            as they are in the image.
        ignored_levels: (I,) of these.
    """

    learns: str
    cells: Tensor
    levels: Tensor
    gt_index: Tensor
    predictions: Tensor
    cls_weights: Tensor | None
    box_weights: Tensor | None
    ignored: Tensor
    ignored_levels: Tensor

    @property
    def strengths(self) -> Tensor:
        """(C,) the class's weights, or the box's, if it teaches boxes alone."""
        weights = self.box_weights if self.cls_weights is None else self.cls_weights
        return torch.zeros(len(self.cells)) if weights is None else weights


class Assignment(NamedTuple):
    """Which cells would learn each of the M objects of one image.

    Attributes:
        instances: the detections of the model, best first, as a call of the predictor gives them.
        gt_boxes: (M, 4) the objects, xyxy pixels of the image, as they were given.
        gt_classes: (M,) of the objects.
        sets: a :class:`LabelSet`, or two: PDNet's final and coarse boxes, DDOD's class and box.
        level_names: the names of the L predicted levels, finest first, such as "p3".
        strides: their strides, in pixels of the image as the model saw it.
        assigner: the class of the assigner.
        by_predictions: whether cells or weights depend on what the model predicts, so that they
            mean nothing without trained weights.
    """

    instances: Instances
    gt_boxes: Tensor
    gt_classes: Tensor
    sets: tuple[LabelSet, ...]
    level_names: tuple[str, ...]
    strides: tuple[int, ...]
    assigner: str
    by_predictions: bool

    def as_records(self) -> list[dict[str, Any]]:
        """For each object its box, its class, and of each set and level its cells, for JSON."""
        records = []
        objects = zip(self.gt_boxes.tolist(), self.gt_classes.tolist(), strict=True)
        for index, (box, label) in enumerate(objects):
            learned = {x.learns: self._levels_record(x, index) for x in self.sets}
            records.append({"class_id": label, "bbox": rounded(box, 2), "learned_by": learned})
        return records

    def _levels_record(self, labels: LabelSet, index: int) -> dict[str, dict[str, Any]]:
        """By level that learns an object: cells, predictions, and sums of weights."""
        record: dict[str, dict[str, Any]] = {}
        for level, name in enumerate(self.level_names):
            own = (labels.gt_index == index) & (labels.levels == level)
            if not bool(own.any()):
                continue
            record[name] = {
                "cells": int(own.sum()),
                "predictions": int(labels.predictions[own].sum()),
            }
            for key, weights in (("class", labels.cls_weights), ("box", labels.box_weights)):
                if weights is not None:
                    record[name][f"{key}_weight"] = round(float(weights[own].sum()), 4)
        return record


class _Rows(NamedTuple):
    """P pairs of a prediction and an object that it learns, and the weights of both losses."""

    row: Tensor
    gt_index: Tensor
    cls_weights: Tensor
    box_weights: Tensor


class _Cells(NamedTuple):
    """The cell of each of R predictions, on the CPU.

    Attributes:
        number: (R,) of the cell among all of the pyramid.
        square: (R, 4) xyxy pixels of the image.
        level: (R,) place among the levels.
        in_image: (R,) whether some of the square lies in the image.
    """

    number: Tensor
    square: Tensor
    level: Tensor
    in_image: Tensor


def check_assignment(model: Any) -> OneStageDetector:
    """The model, or ConfigError if it has no dense assigner, or sees an image several times."""
    return as_one_stage(model, "assignment", _METHODS)


@torch.no_grad()
def assignment_of(
    model: OneStageDetector,
    features: Sequence[Tensor],
    predictions: DensePredictions,
    found: Instances,
    truth: Instances,
    seen: tuple[int, int],
) -> Assignment:
    """Ask the assigner of a model about one image.

    The model is not changed: a copy of the assigner is asked, which may count what it assigns.

    Args:
        model: that made the predictions.
        features: the head's input maps of a batch of one image.
        predictions: of that batch.
        found: its detections.
        truth: its objects, ``gt_boxes`` and ``gt_classes``, in pixels of the image. Boxes are cut
            to the image, as in a training; one without area in it is learned by no cell.
        seen: (H, W) of the image as the model saw it, before padding.

    Raises:
        ConfigError: the objects are for another image, not finite, or of unknown classes.
    """
    boxes, classes = _checked(truth, found.image_size, model.num_classes)
    scale = scale_to(found.image_size, seen).repeat(2)
    frame = torch.tensor(found.image_size[::-1], dtype=boxes.dtype).repeat(2)
    cut = torch.minimum(boxes.clamp(min=0), frame)
    kept = (cut[:, 2:] > cut[:, :2]).all(1).nonzero()[:, 0]
    known = Instances(seen, gt_boxes=Boxes(cut[kept] / scale), gt_classes=classes[kept])
    known = known.to(predictions.boxes.device)
    levels = [at_least_float32(x) for x in features[-len(predictions.level_sizes) :]]
    cells = _cells(predictions, [map_size(x) for x in levels], model.head.offset, scale, frame)

    def sets(seen_predictions: DensePredictions) -> tuple[LabelSet, ...]:
        assigner = deepcopy(model.assigner).train()
        with torch.autocast(predictions.boxes.device.type, enabled=False), EventStorage(_END):
            targets = assigner(levels, seen_predictions, [known])
        return tuple(
            _label_set(learns, teaches, _rows(x, model, seen_predictions, known), kept, x, cells)
            for learns, teaches, x in _all_targets(targets)
        )

    answers = [sets(x) for x in (predictions, _reversed(predictions))]
    return Assignment(
        instances=found,
        gt_boxes=ordinary(boxes),
        gt_classes=ordinary(classes),
        sets=answers[0],
        level_names=level_names_of(model),
        strides=model.head.strides,
        assigner=type(model.assigner).__name__,
        by_predictions=not all(map(_same, *answers)),
    )


def _checked(truth: Instances, size: tuple[int, int], num_classes: int) -> tuple[Tensor, Tensor]:
    """(M, 4) boxes and (M,) classes on the CPU."""
    if tuple(truth.image_size) != tuple(size):
        raise ConfigError(
            f"the objects are for an image of height and width {tuple(truth.image_size)}, the "
            f"image has {tuple(size)}; give the annotation of this image, in its own pixels"
        )
    boxes, classes = truth.gt_boxes.tensor.float().cpu(), truth.gt_classes.cpu()
    if not bool(boxes.isfinite().all()):
        raise ConfigError("gt_boxes are not all finite; wanted is [x1, y1, x2, y2] in pixels")
    wrong = classes[(classes < 0) | (classes >= num_classes)].tolist()
    if wrong:
        raise ConfigError(
            f"gt_classes has {wrong[0]}, and the model knows the classes 0 to {num_classes - 1}; "
            "give the objects in the order of predictor.classes"
        )
    return boxes, classes


def _reversed(predictions: DensePredictions) -> DensePredictions:
    """The same geometry with each prediction at another place: the last at the first, ..."""

    def turned(value: Any) -> Any:
        of_rows = isinstance(value, Tensor) and value.shape[:2] == predictions.boxes.shape[:2]
        return value.flip(1) if of_rows else value

    return predictions._replace(
        logits=turned(predictions.logits),
        boxes=turned(predictions.boxes),
        quality=turned(predictions.quality),
        extras={name: turned(value) for name, value in predictions.extras.items()},
    )


def _all_targets(targets: DenseTargets) -> list[tuple[str, tuple[bool, bool], DenseTargets]]:
    """For each label set what it teaches, in words and as (class, box)."""
    second = {name: x for name, x in targets.extras.items() if isinstance(x, DenseTargets)}
    first, first_box, _ = next((_SECOND[x] for x in second if x in _SECOND), (_BOTH, True, ""))
    found = [(first, (True, first_box), targets)]
    for name, other in second.items():
        known = name in _SECOND
        found.append((_SECOND[name][2] if known else name, (not known, True), other))
    return found


def _rows(
    targets: DenseTargets, model: OneStageDetector, predictions: DensePredictions, truth: Instances
) -> _Rows:
    """What each prediction of one image learns."""
    inside = targets.extras.get("inside")
    if isinstance(inside, InsideLocations):
        weights = _autoassign_weights(inside, model, predictions)
        gt_index, place = inside.exists.nonzero(as_tuple=True)
        weights = weights[gt_index, place]
        return _Rows(inside.location[gt_index, place], gt_index, weights, weights)
    labels = targets.labels[0]
    row = foreground(labels, model.num_classes).nonzero()[:, 0]
    weights = targets.cls_weights[0, row]
    if weights.shape[1] > 1:
        weights = weights.gather(1, labels[row, None])
    if "gt_index" in targets.extras:
        gt_index = targets.extras["gt_index"][0, row]
    else:
        gt_index = _nearest_object(targets.boxes[0, row], labels[row], truth)
    return _Rows(row, gt_index, weights[:, 0], targets.box_weights[0, row])


def _nearest_object(boxes: Tensor, labels: Tensor, truth: Instances) -> Tensor:
    """(P,) the object of the label's class whose box is nearest to the target's (P, 4)."""
    away = torch.cdist(boxes, truth.gt_boxes.tensor.to(boxes.dtype), p=1)
    other = labels[:, None] != truth.gt_classes
    return away.masked_fill(other, torch.inf).argmin(1)


def _autoassign_weights(
    inside: InsideLocations, model: OneStageDetector, predictions: DensePredictions
) -> Tensor:
    """(M, S) the positive weights of AutoAssign, by prior and confidence; 1 for each object.

    As :class:`~d2_decouple.modeling.PositiveTerm` weighs; without such a term it is the prior.
    """
    term = next((x for x in model.losses.values() if isinstance(x, PositiveTerm)), None)
    if term is None or predictions.quality is None:
        return inside.prior()
    index, truth = inside.location, inside.truth
    logits = predictions.logits[0][index, truth.classes[:, None].expand_as(index)]
    boxes = predictions.boxes[0][index]
    losses = generalized_iou_loss(boxes, truth.boxes[:, None].expand_as(boxes))
    confidence = F.logsigmoid(logits) + F.logsigmoid(predictions.quality[0][index])
    confidence = confidence - term.box_weight * losses
    shares = inside.log_prior + confidence.exp() / term.temperature
    return torch.where(inside.exists, shares, torch.finfo(shares.dtype).min).softmax(1)


def _cells(
    predictions: DensePredictions,
    sizes: Sequence[tuple[int, int]],
    offset: float,
    scale: Tensor,
    frame: Tensor,
) -> _Cells:
    """The cells of one image's predictions; a cell's anchors follow each other.

    Args:
        predictions: of a batch of one image.
        sizes: (H, W) cells of each level.
        offset: where in its cell a reference point lies.
        scale: (4,) pixels of the image per pixel that the model sees.
        frame: (4,) width, height, width, height of the image.
    """
    numbers, levels, count = [], [], 0
    for level, (rows, (height, width)) in enumerate(
        zip(predictions.level_sizes, sizes, strict=True)
    ):
        anchors = rows // (height * width)
        numbers.append(count + torch.arange(rows) // anchors)
        levels.append(torch.full((rows,), level))
        count += height * width
    strides = predictions.strides[:, None]
    corner = predictions.locations - offset * strides
    square = ordinary(torch.cat((corner, corner + strides), dim=1)) * scale
    in_image = (square[:, :2] < frame[:2]).all(1)  # padding is on the right and at the bottom
    return _Cells(torch.cat(numbers), square, torch.cat(levels), in_image)


def _label_set(
    learns: str,
    teaches: tuple[bool, bool],
    rows: _Rows,
    kept: Tensor,
    targets: DenseTargets,
    cells: _Cells,
) -> LabelSet:
    """Rows are put together by cell and object; ``kept`` (M,) are the objects as given."""
    row, gt_index, cls_weights, box_weights = (ordinary(x) for x in rows)
    count = max(len(kept), 1)
    pairs, which = (cells.number[row] * count + gt_index).unique(return_inverse=True)
    own = torch.zeros_like(pairs).scatter_(0, which, row)  # any of the cell's predictions
    gt_index = pairs % count
    cls, box = (torch.zeros(len(pairs)).index_add_(0, which, x) for x in (cls_weights, box_weights))
    strong = torch.zeros(len(pairs), dtype=torch.bool)
    for weights, taught in zip((cls, box), teaches, strict=True):
        if taught:
            greatest = torch.zeros(count).scatter_reduce_(0, gt_index, weights, "amax")
            strong |= (weights > 0) & (weights >= _FAINT * greatest[gt_index])
    number = torch.bincount(which, minlength=len(pairs))
    ignored = ((ordinary(targets.labels[0]) == -1) & cells.in_image).nonzero()[:, 0]
    first = torch.ones(len(ignored), dtype=torch.bool)
    first[1:] = cells.number[ignored].diff() > 0
    ignored = ignored[first]
    return LabelSet(
        learns=learns,
        cells=cells.square[own][strong],
        levels=cells.level[own][strong],
        gt_index=kept[gt_index[strong]],
        predictions=number[strong],
        cls_weights=cls[strong] if teaches[0] else None,
        box_weights=box[strong] if teaches[1] else None,
        ignored=cells.square[ignored],
        ignored_levels=cells.level[ignored],
    )


def _same(one: LabelSet, other: LabelSet) -> bool:
    """Whether two label sets have the same cells and weights."""
    pairs = zip(one, other, strict=True)
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y
        for x, y in pairs
    )
