# SPDX-License-Identifier: Apache-2.0
"""What a dense head hands on, and what an assigner answers: the shape contract of the package.

Shape letters, here and everywhere: N images, K classes, R predictions over all levels (cells
times anchors per cell, levels one after the other, finest first, row-major inside a level), M
ground-truth boxes of one image, G ground-truth boxes of the whole batch, L levels, P points,
C channels, H and W height and width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.structures import Instances
from torch import Tensor

__all__ = [
    "DensePredictions",
    "DenseTargets",
    "GroundTruth",
    "foreground",
    "stack_ground_truth",
]


class DensePredictions(NamedTuple):
    """Everything a dense head predicts, flattened over levels. All floats are float32 or wider.

    Attributes:
        logits: (N, R, K) class scores before the sigmoid.
        boxes: (N, R, 4) decoded boxes, xyxy in absolute pixels of the padded input; they may be
            inverted or leave the image.
        quality: (N, R) logits of a quality branch (centerness, IoU), or None.
        locations: (R, 2) reference points (x, y) in pixels of the padded input.
        strides: (R,) stride of each prediction's level, in pixels.
        priors: (R, 4) the square or the anchor each prediction is measured against, xyxy pixels.
        level_sizes: predictions of each level, finest first; they add up to R.
        extras: what only one method knows: distribution logits, weights of levels, ... Entries
            named ``*boxes`` (N, R, 4) and ``*points`` (N, R, P, 2) are pixels of the padded input;
            what is drawn is found by these names.
    """

    logits: Tensor
    boxes: Tensor
    quality: Tensor | None
    locations: Tensor
    strides: Tensor
    priors: Tensor
    level_sizes: tuple[int, ...]
    extras: dict[str, Any]


class DenseTargets(NamedTuple):
    """What each prediction shall learn, how strongly, and what the sums are divided by.

    Attributes:
        labels: (N, R) integers: 0..K-1 a class, K background, -1 ignored.
        boxes: (N, R, 4) matched ground truth, xyxy pixels of the padded input; zeros where there
            is none.
        cls_weights: (N, R, 1) or (N, R, K) weights of the class losses.
        box_weights: (N, R) weights of the box losses; zero where there is no box to learn.
        quality: (N, R) targets of the quality branch in [0, 1], or None.
        cls_normalizer: scalar tensor that the class and quality sums are divided by.
        box_normalizer: scalar tensor that the weighted box sums are divided by.
        extras: what only one method knows; a second label set is a second ``DenseTargets`` here.
    """

    labels: Tensor
    boxes: Tensor
    cls_weights: Tensor
    box_weights: Tensor
    quality: Tensor | None
    cls_normalizer: Tensor
    box_normalizer: Tensor
    extras: dict[str, Any]


class GroundTruth(NamedTuple):
    """The ground truth of a batch in one piece, so that matching needs no loop over images.

    Attributes:
        boxes: (G, 4) xyxy pixels of the padded input.
        classes: (G,) integers 0..K-1.
        image_index: (G,) which image of the batch a box belongs to.
        counts: boxes of each image (Python integers, known without asking the device).
    """

    boxes: Tensor
    classes: Tensor
    image_index: Tensor
    counts: tuple[int, ...]


def stack_ground_truth(gt_instances: Sequence[Instances]) -> GroundTruth:
    """Concatenate the ``gt_boxes`` and ``gt_classes`` of N >= 1 images, empty ones included."""
    boxes = torch.cat([instances.gt_boxes.tensor for instances in gt_instances])
    classes = torch.cat([instances.gt_classes for instances in gt_instances])
    counts = tuple(len(instances) for instances in gt_instances)
    image_index = torch.cat(
        [classes.new_full((count,), index) for index, count in enumerate(counts)]
    )
    return GroundTruth(boxes, classes, image_index, counts)


def foreground(labels: Tensor, num_classes: int) -> Tensor:
    """Mask (same shape) of the labels that name a class: neither background nor ignored."""
    return (labels >= 0) & (labels < num_classes)
