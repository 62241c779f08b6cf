# SPDX-License-Identifier: Apache-2.0
"""What kind of errors a detector makes, and how much AP each kind costs.

After TIDE (Bolya et al., *TIDE: A General Toolbox for Identifying Object Detection Errors*, ECCV
2020, sections 2.2 to 2.4). A wrong detection is of one kind:

- ``localisation``: its IoU with an object of its class is from 0.1 to below 0.5;
- ``classification``: its IoU with an object of another class is 0.5 or more;
- ``duplicate``: its IoU with an object of its class is 0.5 or more, and a better one has that;
- ``background``: its IoU with every object is below 0.1;
- ``both``: what remains, an object of another class at an IoU from 0.1 to below 0.5.

They are asked in this order, which the paper leaves open and its code has. An object that nothing
found and that no localisation or classification error could find is ``missed``.

The cost of a kind is AP at IoU 0.5 after that kind alone is mended, less AP as it is. A
localisation or classification error that would find a free object becomes right, the best one of
each object; all other wrong detections vanish; missed objects are no longer counted. Departures:
costs keep their sign (the code cuts negative ones to 0); each kind is mended without a look at the
others (in the code, localisation and classification errors compete for an object); and a class
whose objects were all missed gains nothing by leaving them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..evaluation import GroundTruth, ImageDetections, ImageTruth, weighted_ap
from ..evaluation.bootstrap import ClassMatches
from ..evaluation.truth import ImageId
from .overlaps import overlaps, shares_inside

__all__ = [
    "BACKGROUND_IOU",
    "FOREGROUND_IOU",
    "KINDS",
    "ORACLES",
    "RIGHT",
    "Judgement",
    "ap_of_oracles",
    "judge",
    "kind_counts",
]

KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
ORACLES = (*KINDS, "false positives", "false negatives")
"""What can be mended: each kind, all wrong detections, all objects that were not found."""

FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.1

RIGHT, _IGNORED = -1, -2
_MENDED = ("classification", "localisation")  # by becoming right, not by vanishing


class Judgement(NamedTuple):
    """D detections by falling score, and G objects without crowds, of I images.

    Attributes:
        class_names: K names.
        image_count: I.
        images: (D,) which image, in the order of the ground truth.
        places: (D,) which detection of that image.
        classes: (D,) as predicted.
        scores: (D,).
        kinds: (D,) place in :data:`KINDS`, ``RIGHT``, or -2 for one on a crowd, which nothing
            counts.
        objects: (D,) the object that a right one found, or that a classification or localisation
            error is nearest to, a place among the G; -1 for others.
        gt_images: (G,) which image.
        gt_classes: (G,).
        found: (G,) whether a detection is right about it.
        missed: (G,) whether no detection comes near it.
    """

    class_names: tuple[str, ...]
    image_count: int
    images: np.ndarray
    places: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    kinds: np.ndarray
    objects: np.ndarray
    gt_images: np.ndarray
    gt_classes: np.ndarray
    found: np.ndarray
    missed: np.ndarray


def judge(
    truth: GroundTruth,
    detections: Mapping[ImageId, ImageDetections],
    *,
    max_detections_per_image: int = 100,
) -> Judgement:
    """Match as COCO does at IoU 0.5, and say of each wrong detection what is wrong about it.

    Args:
        truth: the objects of the data set.
        detections: by image id; an image may be without.
        max_detections_per_image: so many per image *and class* are looked at, the best.
    """
    parts, gt_images, gt_classes, start = [], [], [], 0
    for index, (image_id, objects) in enumerate(truth.images.items()):
        real = np.flatnonzero(~objects.crowds)
        gt_images.append(np.full(len(real), index))
        gt_classes.append(objects.classes[real])
        if image_id in detections:
            found = detections[image_id]
            chosen = _best_of_each_class(found, max_detections_per_image)
            kinds, near = _judge_image(objects, found, chosen)
            near = np.where(near >= 0, near + start, -1)
            where = np.full(len(chosen), index)
            labels, scores = found.classes[chosen], found.scores[chosen]
            parts.append((where, chosen, labels, scores, kinds, near))
        start += len(real)
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    if not columns:
        columns = [np.empty(0, dtype) for dtype in (int, int, int, float, int, int)]
    order = np.argsort(-columns[3], kind="stable")
    images, places, classes, scores, kinds, near = (column[order] for column in columns)
    found_objects, usable = np.zeros(start, bool), np.zeros(start, bool)
    found_objects[near[kinds == RIGHT]] = True
    usable[near[near >= 0]] = True
    return Judgement(
        class_names=truth.class_names,
        image_count=len(truth.images),
        images=images,
        places=places,
        classes=classes,
        scores=scores,
        kinds=kinds,
        objects=near,
        gt_images=np.concatenate([np.empty(0, int), *gt_images]),
        gt_classes=np.concatenate([np.empty(0, int), *gt_classes]),
        found=found_objects,
        missed=~usable,
    )


def _best_of_each_class(found: ImageDetections, limit: int) -> np.ndarray:
    """Places of the detections that count, best first."""
    order = np.argsort(-found.scores, kind="stable")
    labels = found.classes[order]
    rank = np.array([np.count_nonzero(labels[:at] == label) for at, label in enumerate(labels)])
    return order[rank < limit] if len(order) else order


def _judge_image(
    objects: ImageTruth, found: ImageDetections, chosen: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Kinds of the chosen detections (best first), and the objects that they are about."""
    real = ~objects.crowds
    boxes, labels = found.boxes[chosen], found.classes[chosen]
    ious = overlaps(boxes, objects.boxes[real])
    own = labels[:, None] == objects.classes[real][None]
    on_crowd = (
        (shares_inside(boxes, objects.boxes[~real]) >= FOREGROUND_IOU)
        & (labels[:, None] == objects.classes[~real][None])
    ).any(1)
    kinds, near = np.empty(len(chosen), int), np.full(len(chosen), -1)
    free = own.copy()
    for at in range(len(chosen)):
        open_ious = np.where(free[at], ious[at], 0.0)
        if open_ious.max(initial=0.0) >= FOREGROUND_IOU:
            kinds[at], near[at] = RIGHT, open_ious.argmax()
            free[:, near[at]] = False
        elif on_crowd[at]:
            kinds[at] = _IGNORED
        else:
            kinds[at], near[at] = _kind_of(ious[at], own[at])
    return kinds, near


def _kind_of(ious: np.ndarray, own: np.ndarray) -> tuple[int, int]:
    """Kind of a wrong detection, and the object that it would find if it were mended."""
    same, other = np.where(own, ious, 0.0), np.where(own, 0.0, ious)
    same_best, other_best = same.max(initial=0.0), other.max(initial=0.0)
    if BACKGROUND_IOU <= same_best < FOREGROUND_IOU:
        return KINDS.index("localisation"), int(same.argmax())
    if other_best >= FOREGROUND_IOU:
        return KINDS.index("classification"), int(other.argmax())
    if same_best >= FOREGROUND_IOU:
        return KINDS.index("duplicate"), -1
    if other_best < BACKGROUND_IOU:
        return KINDS.index("background"), -1
    return KINDS.index("both"), -1


def kind_counts(judgement: Judgement) -> dict[str, int]:
    """How many errors there are of each kind."""
    counts = {kind: int((judgement.kinds == at).sum()) for at, kind in enumerate(KINDS)}
    return {**counts, "missed": int(judgement.missed.sum())}


def ap_of_oracles(judgement: Judgement, weights: np.ndarray) -> dict[str, np.ndarray]:
    """AP at IoU 0.5 as it is, and what each oracle adds to it.

    Args:
        judgement: of :func:`judge`.
        weights: (B, I) how often each image counts, in B draws.

    Returns:
        ``AP50`` and by name of each of :data:`ORACLES` the difference that it makes, (B,) each, in
        percent.
    """
    plain = _ap_by_class(_mended(judgement, None), weights)
    known = ~np.isnan(plain)
    classes = np.maximum(known.sum(0), 1)

    def mean(each: np.ndarray) -> np.ndarray:
        total = np.where(known, each, 0.0).sum(0)
        return np.where(known.any(0), 100 * total / classes, np.nan)

    costs = {}
    for name in ORACLES:
        mended = _ap_by_class(_mended(judgement, name), weights)
        # A class whose objects were all missed has none left: without it the others would
        # seem to gain.
        costs[name] = mean(np.where(np.isnan(mended), plain, mended) - plain)
    return {"AP50": mean(plain), **costs}


def _ap_by_class(matches: list[ClassMatches], weights: np.ndarray) -> np.ndarray:
    """(K, B), NaN where a class has no object in a draw."""
    return np.array([weighted_ap([of_class], weights) for of_class in matches])


def _mended(judgement: Judgement, oracle: str | None) -> list[ClassMatches]:
    """What is matched, class by class, after an oracle."""
    right = judgement.kinds == RIGHT
    wrong = judgement.kinds >= 0
    classes = judgement.classes
    wanted = np.ones(len(judgement.found), bool)
    if oracle == "missed":
        wanted = ~judgement.missed
    elif oracle == "false negatives":
        wanted = judgement.found
    elif oracle == "false positives":
        wrong = np.zeros_like(wrong)
    elif oracle is not None:
        of_kind = judgement.kinds == KINDS.index(oracle)
        wrong = wrong & ~of_kind
        if oracle in _MENDED:
            finds = _first_of_each(judgement, of_kind)
            right = right | finds
            classes = classes.copy()
            classes[finds] = judgement.gt_classes[judgement.objects[finds]]
    return [
        ClassMatches(
            images=judgement.images[classes == label],
            right=right[None, classes == label],
            wrong=wrong[None, classes == label],
            objects=np.bincount(
                judgement.gt_images[wanted & (judgement.gt_classes == label)],
                minlength=judgement.image_count,
            ),
        )
        for label in range(len(judgement.class_names))
    ]


def _first_of_each(judgement: Judgement, of_kind: np.ndarray) -> np.ndarray:
    """(D,) the best of these detections for each object that no detection is right about."""
    places = np.flatnonzero(of_kind)
    places = places[~judgement.found[judgement.objects[places]]]
    _, first = np.unique(judgement.objects[places], return_index=True)  # by falling score
    mask = np.zeros(len(of_kind), bool)
    mask[places[first]] = True
    return mask
