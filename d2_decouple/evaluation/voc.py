# SPDX-License-Identifier: Apache-2.0
"""Average precision as Pascal VOC counts it.

It differs from COCO's AP50 in how detections are matched. In both, the highest score chooses
first. VOC gives a detection the object that it overlaps most, whether that one is free or not: if
it is taken, the detection is a second one for the same object and false. COCO lets it have the best
object that is still free, so that in a crowd of objects fewer detections are false. VOC's difficult
objects (``crowds`` here) overlap like any other, COCO's crowds by the share of the detection that
lies inside. And VOC takes the area below the precision itself, COCO the mean of 101 readings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from pycocotools import mask

from .truth import GroundTruth, ImageDetections, ImageId, ImageTruth

__all__ = ["area_below", "eleven_points", "voc_ap"]


def voc_ap(
    truth: GroundTruth,
    detections: Mapping[ImageId, ImageDetections],
    *,
    iou_threshold: float = 0.5,
    average: Callable[[np.ndarray, np.ndarray], float] | None = None,
) -> np.ndarray:
    """Average precision of each class.

    Args:
        truth: the objects; ``crowds`` are VOC's difficult ones, which are neither demanded nor
            false to find.
        detections: by image id.
        iou_threshold: what a detection must reach at least.
        average: of (recall, precision) in the order of falling scores; :func:`area_below` (since
            2010) if None, or :func:`eleven_points` (until 2009).

    Returns:
        (K,) between 0 and 1; NaN for classes without objects.
    """
    average = average or area_below
    precisions = np.full(len(truth.class_names), np.nan)
    for index, objects in enumerate(truth.count_objects()):
        if not objects:
            continue
        scores, right, counted = _judge(truth, detections, index, iou_threshold)
        order = np.argsort(-scores, kind="stable")
        right, counted = right[order], counted[order]
        hits = np.cumsum(right[counted])
        precision = hits / np.arange(1, len(hits) + 1)
        precisions[index] = average(hits / objects, precision)
    return precisions


def area_below(recall: np.ndarray, precision: np.ndarray) -> float:
    """The area below the precision, made to fall with the recall; both are (D,)."""
    if not len(recall):
        return 0.0
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * highest).sum())


def eleven_points(recall: np.ndarray, precision: np.ndarray) -> float:
    """The mean of the best precisions at a recall of at least 0, 0.1, ... 1; both are (D,)."""
    # A tenth cannot be written in binary: 3 hits of 10 do reach a recall of 0.3.
    reached = [precision[recall >= level / 10 - 1e-9] for level in range(11)]
    return float(np.mean([values.max() if values.size else 0.0 for values in reached]))


def _judge(
    truth: GroundTruth,
    detections: Mapping[ImageId, ImageDetections],
    class_index: int,
    iou_threshold: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of all detections of a class, whether each is right, and whether it counts."""
    scores, right, counted = [np.empty(0)], [np.empty(0, bool)], [np.empty(0, bool)]
    for image_id, objects in truth.images.items():
        if image_id not in detections:
            continue
        found = detections[image_id]
        mine = np.flatnonzero(found.classes == class_index)
        if not len(mine):
            continue
        mine = mine[np.argsort(-found.scores[mine], kind="stable")]
        verdicts = _judge_image(objects, found.boxes[mine], class_index, iou_threshold)
        scores.append(found.scores[mine])
        right.append(verdicts[0])
        counted.append(verdicts[1])
    return np.concatenate(scores), np.concatenate(right), np.concatenate(counted)


def _judge_image(
    objects: ImageTruth, boxes: np.ndarray, class_index: int, iou_threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    right, counted = np.zeros(len(boxes), bool), np.ones(len(boxes), bool)
    mine = objects.classes == class_index
    if not mine.any() or not len(boxes):
        return right, counted
    wanted, difficult = objects.boxes[mine], objects.crowds[mine]
    overlap = mask.iou(_xywh(boxes), _xywh(wanted), [0] * len(wanted))  # (D, M)
    best = overlap.argmax(axis=1)
    taken = np.zeros(len(wanted), bool)
    for place, target in enumerate(best):
        if overlap[place, target] < iou_threshold:
            continue
        if difficult[target]:
            counted[place] = False
        elif not taken[target]:
            right[place] = taken[target] = True
    return right, counted


def _xywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1)
