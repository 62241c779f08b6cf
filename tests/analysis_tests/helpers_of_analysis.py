# SPDX-License-Identifier: Apache-2.0
"""Ground truth, detections and models whose numbers are known."""

from collections.abc import Sequence

import numpy as np

from d2_decouple.analysis import Observed, RawPredictions, view_objects
from d2_decouple.evaluation import GroundTruth, ImageDetections, ImageTruth


def objects(*rows: Sequence[float]) -> ImageTruth:
    """Each row is (x1, y1, x2, y2, class[, crowd])."""
    table = np.array([[*row, 0][:6] for row in rows], dtype=float).reshape(-1, 6)
    boxes = table[:, :4]
    return ImageTruth(
        boxes, table[:, 4].astype(int), table[:, 5] > 0, (boxes[:, 2:] - boxes[:, :2]).prod(1)
    )


def found(*rows: Sequence[float]) -> ImageDetections:
    """Each row is (x1, y1, x2, y2, score, class)."""
    table = np.array(rows, dtype=float).reshape(-1, 6)
    return ImageDetections(table[:, :4], table[:, 4], table[:, 5].astype(int))


def truth_of(*images: ImageTruth, classes: Sequence[str] = ("a", "b")) -> GroundTruth:
    """Images have the ids "i0", "i1", ..."""
    return GroundTruth(
        class_names=tuple(classes),
        dataset_ids=tuple(range(len(classes))),
        images={f"i{number}": image for number, image in enumerate(images)},
    )


def random_scene(*, images: int = 8, seed: int = 0) -> tuple[GroundTruth, dict]:
    """Objects of three classes, some of them crowds, with noisy, doubled and false detections."""
    generator = np.random.default_rng(seed)
    truths, detections = [], {}
    for number in range(images):
        corners = generator.uniform(0, 300, (6, 2))
        boxes = np.concatenate((corners, corners + generator.uniform(20, 80, (6, 2))), 1)
        labels = generator.integers(3, size=6)
        truths.append(
            objects(
                *(
                    [*box, label, crowd]
                    for box, label, crowd in zip(boxes, labels, [0] * 5 + [1], strict=True)
                )
            )
        )
        doubled = np.repeat(boxes, 3, axis=0) + generator.normal(scale=5, size=(18, 4))
        classes = np.where(
            generator.random(18) < 0.2, generator.integers(3, size=18), labels.repeat(3)
        )
        stray = generator.uniform(0, 300, (4, 2))
        doubled = np.concatenate((doubled, np.concatenate((stray, stray + 30), 1)))
        classes = np.concatenate((classes, generator.integers(3, size=4)))
        if number == 3:
            continue
        detections[f"i{number}"] = ImageDetections(doubled, generator.random(22), classes)
    return truth_of(*truths, classes=("a", "b", "c")), detections


def raw_of(boxes: np.ndarray, scores: np.ndarray, label: int, *, classes: int = 3):
    """Dense predictions of one class, whose cells are 8 pixels wide and 4 high."""
    all_scores = np.zeros((len(boxes), classes))
    all_scores[:, label] = scores
    return RawPredictions(
        all_scores,
        boxes,
        (boxes[:, :2] + boxes[:, 2:]) / 2,
        np.tile([8.0, 4.0], (len(boxes), 1)),
    )


def observed(name: str, truth: GroundTruth, detections: dict, *, dense: bool = True) -> Observed:
    """A model whose dense predictions are its detections, all of them of the class 0."""
    views = None
    if dense:
        views = []
        for number, (image_id, item) in enumerate(truth.images.items()):
            seen = detections.get(image_id, found())
            raw = raw_of(seen.boxes, seen.scores, 0, classes=len(truth.class_names))
            views += view_objects(number, item, raw)
    return Observed(name=name, source="nowhere", detections=detections, views=views)
