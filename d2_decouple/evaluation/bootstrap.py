# SPDX-License-Identifier: Apache-2.0
"""How far a difference in AP may be luck of the test images: a paired bootstrap over them.

Images are drawn with replacement, many times over, and each time the AP of both models is taken
on the same draw. Matching does not depend on which images were drawn, so it is done once; a draw
only weighs what was matched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .coco import IOU_THRESHOLDS, coco_eval
from .truth import GroundTruth, ImageDetections, ImageId

__all__ = [
    "ClassMatches",
    "Interval",
    "ap_on_draws",
    "draw_images",
    "match_images",
    "paired_difference",
    "weighted_ap",
]

_RECALLS = np.linspace(0, 1, 101)
_THRESHOLDS = len(IOU_THRESHOLDS)


class ClassMatches(NamedTuple):
    """One class: D detections by falling score, at T IoU thresholds, in I images.

    ``images`` (D,) says where a detection lies, ``right`` and ``wrong`` (T, D) whether it counts
    for or against (on a crowd it does neither), ``objects`` (I,) how many there are to find.
    """

    images: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    objects: np.ndarray


class Interval(NamedTuple):
    """A difference on the images as they are, and the middle 95 percent of those on the draws."""

    difference: float
    low: float
    high: float


def match_images(
    truth: GroundTruth,
    detections: Mapping[ImageId, ImageDetections],
    *,
    max_detections_per_image: int = 100,
) -> list[ClassMatches]:
    """Match as COCO does, image by image, for each class."""
    # The faster backend does not tell what it matched.
    evaluation = coco_eval(
        truth,
        detections,
        max_detections_per_image=max_detections_per_image,
        backend="pycocotools",
    )
    count = len(truth.images)
    # One list: all images of a class and a range of area, then the next range, the next class.
    step = count * len(evaluation.params.areaRng)
    return [
        _class_matches(evaluation.evalImgs[place : place + count])
        for place in range(0, step * len(truth.class_names), step)
    ]


def _class_matches(results: Sequence[Mapping[str, np.ndarray] | None]) -> ClassMatches:
    scores, images = [np.empty(0)], [np.empty(0, np.int64)]
    right, wrong = ([np.empty((_THRESHOLDS, 0), bool)] for _ in range(2))
    objects = np.zeros(len(results), np.int64)
    for index, result in enumerate(results):
        if result is None:  # neither objects nor detections of the class
            continue
        matched = result["dtMatches"] > 0
        counted = ~result["dtIgnore"].astype(bool)
        scores.append(np.array(result["dtScores"], dtype=np.float64))
        images.append(np.full(matched.shape[1], index))
        right.append(matched & counted)
        wrong.append(~matched & counted)
        objects[index] = np.count_nonzero(result["gtIgnore"] == 0)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return ClassMatches(
        images=np.concatenate(images)[order],
        right=np.concatenate(right, axis=1)[:, order],
        wrong=np.concatenate(wrong, axis=1)[:, order],
        objects=objects,
    )


def weighted_ap(matches: Sequence[ClassMatches], weights: np.ndarray) -> np.ndarray:
    """COCO's AP when each image counts a number of times.

    It is that of so many copies of the image, but for equal scores within one image: they come
    in one order here and once in each copy there.

    Args:
        matches: of each class.
        weights: (B, I) how often each of I images counts, in B draws.

    Returns:
        (B,) mean over thresholds and over the classes that have an object, between 0 and 1; NaN
        where no class has one.
    """
    each = np.array([[_class_ap(item, row) for item in matches] for row in np.asarray(weights)])
    known = ~np.isnan(each)
    total = np.where(known, each, 0.0).sum(axis=1)
    return np.where(known.any(axis=1), total / np.maximum(known.sum(axis=1), 1), np.nan)


def _class_ap(matches: ClassMatches, weights: np.ndarray) -> float:
    objects = int(matches.objects @ weights)
    if objects == 0:
        return float("nan")
    weight = weights[matches.images]
    hits = np.cumsum(matches.right * weight, axis=1)  # (T, D)
    misses = np.cumsum(matches.wrong * weight, axis=1)
    precision = hits / (hits + misses + np.spacing(1))
    # Precision made to fall with recall, and 0 behind the last recall that is reached.
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    precision = np.pad(precision, ((0, 0), (0, 1)))
    # How many hits each reading of recall takes; then one search in all thresholds' rows at once,
    # which lie one behind the other without overlap.
    wanted = np.searchsorted(np.arange(objects + 1) / objects, _RECALLS)
    start = (objects + 1) * np.arange(len(hits))[:, None]
    places = np.searchsorted((hits + start).ravel(), wanted + start)  # (T, R)
    places -= hits.shape[1] * np.arange(len(hits))[:, None]
    return float(np.take_along_axis(precision, places, axis=1).mean())


def draw_images(count: int, draws: int, seed: int) -> np.ndarray:
    """(draws, count): how often each image comes when ``count`` are drawn with replacement."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(count, np.full(count, 1 / count), size=draws)


def ap_on_draws(matches: Sequence[ClassMatches], *, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """(1 + draws,) AP on the images as they are, then on each draw of them.

    The draws are the same for all models that were tested on as many images.
    """
    count = len(matches[0].objects)
    once = np.ones((1, count), np.int64)
    return weighted_ap(matches, np.concatenate((once, draw_images(count, draws, seed))))


def paired_difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> Interval:
    """AP of one model less that of another, mean over trainings that belong together.

    Args:
        ours: :func:`ap_on_draws` of each training.
        theirs: likewise, in the same order of seeds, on the same images and draws.

    Returns:
        Differences between -1 and 1.
    """
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} trainings against {len(theirs)}; wanted pairs")
    lengths = {len(values) for values in (*ours, *theirs)}
    if len(lengths) != 1:
        raise ValueError(f"{sorted(lengths)} draws; wanted as many for all")
    differences = np.mean(ours, axis=0) - np.mean(theirs, axis=0)
    low, high = np.nanpercentile(differences[1:], (2.5, 97.5))
    return Interval(float(differences[0]), float(low), float(high))
