# SPDX-License-Identifier: Apache-2.0
"""How far a detector's two answers are apart: is the box with the best score the best box?

The five papers argue about this misalignment. Two views of it:

- of **detections**, after suppression: does a higher score mean a higher IoU?
- of **predictions**, before it: among those of one object, how good is the one that scores best,
  which suppression keeps, beside the one that lies best, which it throws away?

Boxes are xyxy pixels of the image as it is on disk. Crowds are no objects here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from ..evaluation import GroundTruth, ImageDetections, ImageTruth
from ..evaluation.truth import ImageId
from .intervals import mean_on_draws, rank_correlation, rank_correlation_on_draws
from .overlaps import overlaps

__all__ = [
    "MATCHED_IOU",
    "OBJECT_MEASURES",
    "ObjectView",
    "Pairs",
    "RawPredictions",
    "correlation_within_classes",
    "detection_pairs",
    "object_measures",
    "view_objects",
]

MATCHED_IOU = 0.5
"""From this IoU on a box is about an object."""

OBJECT_MEASURES = ("rank_correlation", "iou_gap", "best_iou", "distance", "other_best", "reached")


class Pairs(NamedTuple):
    """P detections: score, and IoU with the object of their class that they overlap most.

    Attributes:
        images: (P,) place of the image in the ground truth.
        classes: (P,) as predicted.
        scores: (P,).
        ious: (P,) 0 where the image has no object of the class.
    """

    images: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    ious: np.ndarray


def detection_pairs(truth: GroundTruth, detections: Mapping[ImageId, ImageDetections]) -> Pairs:
    """Score and IoU of every detection."""
    columns: list[list[np.ndarray]] = [[np.empty(0, int)], [np.empty(0, int)]]
    columns += [[np.empty(0)], [np.empty(0)]]
    for index, (image_id, objects) in enumerate(truth.images.items()):
        if image_id not in detections:
            continue
        found, real = detections[image_id], ~objects.crowds
        own = found.classes[:, None] == objects.classes[real][None]
        ious = np.where(own, overlaps(found.boxes, objects.boxes[real]), 0.0).max(1, initial=0.0)
        where = np.full(len(found.scores), index)
        for column, values in zip(columns, (where, found.classes, found.scores, ious), strict=True):
            column.append(values)
    return Pairs(*(np.concatenate(column) for column in columns))


def correlation_within_classes(
    pairs: Pairs, weights: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rank correlation of score and IoU, among detections whose IoU is at least 0.5.

    Within each class: classes that are found better and score higher would make a correlation of
    their own, although no detection competes with one of another class.

    Returns:
        (B, K) of each class, and (B,) their mean; NaN where there is too little to rank.
    """
    matched = pairs.ious >= MATCHED_IOU
    each = np.full((len(weights), num_classes), np.nan)
    for label in range(num_classes):
        of_class = matched & (pairs.classes == label)
        each[:, label] = rank_correlation_on_draws(
            pairs.scores[of_class], pairs.ious[of_class], pairs.images[of_class], weights
        )
    known = ~np.isnan(each)
    total = np.where(known, each, 0.0).sum(1)
    return each, np.where(known.any(1), total / np.maximum(known.sum(1), 1), np.nan)


class RawPredictions(NamedTuple):
    """The R dense predictions of one image, before candidates are chosen and suppressed.

    Attributes:
        scores: (R, K) by which candidates are ranked.
        boxes: (R, 4) cut to the image, as detections are.
        locations: (R, 2) reference points (x, y), pixels of the image.
        strides: (R, 2) width and height of a cell, pixels of the image.
    """

    scores: np.ndarray
    boxes: np.ndarray
    locations: np.ndarray
    strides: np.ndarray


class ObjectView(NamedTuple):
    """What the dense predictions say about one object.

    Its candidates are the predictions whose IoU with it is at least 0.5 and is with no other
    object of its class larger; without any, it is not reached, and the numbers are NaN.

    Attributes:
        image: place of the image in the ground truth.
        label: the object's class.
        box: (4,) of the object.
        candidates: how many.
        rank_correlation: of score and IoU among them; NaN for fewer than three.
        best_iou: the largest IoU of a candidate.
        iou_gap: that, less the IoU of the candidate with the best score; not negative.
        distance: between the locations of these two, in cells of the one with the best score.
        boxes: (2, 4) of the candidate with the best score, and of that with the largest IoU.
        locations: (2, 2) of these.
        scores: (2,) of these.
    """

    image: int
    label: int
    box: np.ndarray
    candidates: int
    rank_correlation: float
    best_iou: float
    iou_gap: float
    distance: float
    boxes: np.ndarray
    locations: np.ndarray
    scores: np.ndarray


def view_objects(image: int, objects: ImageTruth, raw: RawPredictions) -> list[ObjectView]:
    """A view of each object of an image that is no crowd."""
    real = ~objects.crowds
    boxes, labels = objects.boxes[real], objects.classes[real]
    ious = overlaps(boxes, raw.boxes)
    views = []
    for index, label in enumerate(labels):
        rivals = ious[labels == label]
        mine = (ious[index] >= MATCHED_IOU) & (ious[index] >= rivals.max(0))
        views.append(_view(image, int(label), boxes[index], ious[index], np.flatnonzero(mine), raw))
    return views


def _view(
    image: int, label: int, box: np.ndarray, ious: np.ndarray, mine: np.ndarray, raw: RawPredictions
) -> ObjectView:
    if len(mine) == 0:
        return _unreached(image, label, box)
    scores, own = raw.scores[mine, label], ious[mine]
    first = int(scores.argmax())
    # Of equally good boxes the one with the best score: a tie is no misalignment.
    best = int(np.lexsort((-scores, -own))[0])
    chosen = mine[[first, best]]
    apart = (raw.locations[chosen[0]] - raw.locations[chosen[1]]) / raw.strides[chosen[0]]
    return ObjectView(
        image=image,
        label=label,
        box=box,
        candidates=len(mine),
        rank_correlation=rank_correlation(scores, own),
        best_iou=float(own[best]),
        iou_gap=float(own[best] - own[first]),
        distance=float(np.hypot(*apart)),
        boxes=raw.boxes[chosen],
        locations=raw.locations[chosen],
        scores=raw.scores[chosen, label],
    )


def _unreached(image: int, label: int, box: np.ndarray) -> ObjectView:
    nothing = float("nan")
    return ObjectView(
        image=image,
        label=label,
        box=box,
        candidates=0,
        rank_correlation=nothing,
        best_iou=nothing,
        iou_gap=nothing,
        distance=nothing,
        boxes=np.full((2, 4), np.nan),
        locations=np.full((2, 2), np.nan),
        scores=np.full(2, np.nan),
    )


def object_measures(views: Iterable[ObjectView], weights: np.ndarray) -> dict[str, np.ndarray]:
    """Means over objects, on draws of the images.

    Returns:
        (B,) each of :data:`OBJECT_MEASURES`: of the attributes of that name; ``other_best`` the
        share of reached objects whose best-scoring box is not the best; ``reached`` the share of
        objects that have a candidate.
    """
    views = list(views)
    images = np.array([view.image for view in views], dtype=int)
    gaps = np.array([view.iou_gap for view in views], dtype=float)
    values = {
        "rank_correlation": np.array([view.rank_correlation for view in views], dtype=float),
        "iou_gap": gaps,
        "best_iou": np.array([view.best_iou for view in views], dtype=float),
        "distance": np.array([view.distance for view in views], dtype=float),
        "other_best": np.where(np.isnan(gaps), np.nan, gaps > 0),
        "reached": np.array([view.candidates > 0 for view in views], dtype=float),
    }
    return {name: mean_on_draws(values[name], images, weights) for name in OBJECT_MEASURES}
