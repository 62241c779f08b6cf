# SPDX-License-Identifier: Apache-2.0
"""Ground truth and detections for the tests of the evaluation."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from d2_decouple.evaluation import GroundTruth, ImageDetections, ImageTruth


def objects(*items: Sequence[float]) -> ImageTruth:
    """Each item is (x1, y1, x2, y2, class[, crowd])."""
    rows = np.array([[*item, 0][:6] for item in items], dtype=float).reshape(-1, 6)
    boxes = rows[:, :4]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return ImageTruth(boxes, rows[:, 4].astype(int), rows[:, 5].astype(bool), areas)


def found(*items: Sequence[float]) -> ImageDetections:
    """Each item is (x1, y1, x2, y2, score[, class])."""
    rows = np.array([[*item, 0][:6] for item in items], dtype=float).reshape(-1, 6)
    return ImageDetections(rows[:, :4], rows[:, 4], rows[:, 5].astype(int))


def truth(*images: ImageTruth, classes: int = 1) -> GroundTruth:
    """Images have the ids 0, 1, ...; classes are called a, b, ..."""
    return GroundTruth(
        class_names=tuple("abcdefgh"[:classes]),
        dataset_ids=tuple(range(classes)),
        images=dict(enumerate(images)),
    )


def jittered(
    ground_truth: GroundTruth, *, seed: int = 0, jitter: float = 0.04, decimals: int = 2
) -> dict[int | str, ImageDetections]:
    """Three noisy copies of most objects, some of a wrong class, and boxes at random places.

    Better boxes tend to have higher scores. Those are rounded, so that equal ones occur unless
    there are many decimals; one image in eight has no detections.
    """
    generator = np.random.default_rng(seed)
    made: dict[int | str, ImageDetections] = {}
    classes = len(ground_truth.class_names)
    for number, (image, item) in enumerate(ground_truth.images.items()):
        if number % 8 == 7:
            made[image] = found()
            continue
        boxes = np.concatenate([item.boxes[generator.random(len(item.boxes)) < 0.8]] * 3)
        labels = np.resize(item.classes, len(boxes))
        size = (boxes[:, 2:] - boxes[:, :2]).repeat(2, axis=1)
        noise = generator.normal(scale=jitter, size=boxes.shape)
        boxes = boxes + noise * size
        quality = np.exp(-np.abs(noise).sum(axis=1) / 0.1)
        corners = generator.uniform(0, 400, (12, 2))
        extra = np.concatenate((corners, corners + generator.uniform(5, 200, (12, 2))), axis=1)
        boxes = np.concatenate((boxes, extra))
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        labels = np.concatenate((labels, generator.integers(classes, size=12)))
        wrong = generator.random(len(labels)) < 0.1
        labels[wrong] = generator.integers(classes, size=wrong.sum())
        quality = np.concatenate((quality, np.zeros(12)))
        scores = (0.6 * generator.random(len(boxes)) + 0.4 * quality).round(decimals)
        # As a model gives them, and as Detectron2's evaluator keeps them.
        kept = np.argsort(-scores, kind="stable")
        boxes = boxes.astype(np.float32).astype(np.float64)
        made[image] = ImageDetections(
            boxes[kept], scores[kept].astype(np.float32).astype(np.float64), labels[kept]
        )
    return made


def outputs(detections: Mapping[int | str, ImageDetections]) -> tuple[list, list]:
    """Inputs and outputs of a model that found these."""
    given, made = [], []
    for image, item in detections.items():
        instances = Instances((480, 640))
        instances.pred_boxes = Boxes(torch.tensor(item.boxes, dtype=torch.float32))
        instances.scores = torch.tensor(item.scores, dtype=torch.float32)
        instances.pred_classes = torch.tensor(item.classes, dtype=torch.int64)
        given.append({"image_id": image})
        made.append({"instances": instances})
    return given, made
