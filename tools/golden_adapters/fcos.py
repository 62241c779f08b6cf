# SPDX-License-Identifier: Apache-2.0
"""Cases of FCOS."""

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from d2_decouple.layers.points import boxes_to_distances, grid_locations, squares
from d2_decouple.modeling import FCOSAssigner
from d2_decouple.structures import DensePredictions, foreground

from .case import Case

__all__ = ["fcos_targets"]


def fcos_targets(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """FCOS's labels, distances and centerness of every location.

    Locations lie at stride // 2 in their cell; the distances are counted in strides (in pixels
    without ``norm_on_bbox``) and are zero on background.
    """
    config = case.config
    sizes = [(height, width) for height, width in case.tensor("level_sizes").tolist()]
    gt_instances = _gt_instances(case)
    predictions = _blank_predictions(sizes, config, len(gt_instances), dtype)
    assigner = FCOSAssigner(
        num_classes=config["classes"],
        radius=_radius(config, gt_instances),
        size_ranges=config["regress_ranges"],
    )
    features = [torch.empty(len(gt_instances), 0, *size) for size in sizes]
    targets = assigner(features, predictions, gt_instances)

    positive = foreground(targets.labels, config["classes"])
    distances = boxes_to_distances(predictions.locations, targets.boxes)
    if config["norm_on_bbox"]:
        distances = distances / predictions.strides[:, None]
    return {
        "labels": targets.labels,
        "ltrb": torch.where(positive[..., None], distances, 0),
        "centerness": targets.quality,
        "num_positive": positive.sum(),
    }


def _gt_instances(case: Case) -> list[Instances]:
    """``gt_boxes/n`` and ``gt_labels/n`` of all images n (the assigner reads no image size)."""
    count = sum(name.startswith("gt_boxes/") for name in case.inputs)
    return [
        Instances(
            (0, 0),
            gt_boxes=Boxes(case.tensor(f"gt_boxes/{image}").reshape(-1, 4)),
            gt_classes=case.tensor(f"gt_labels/{image}").long(),
        )
        for image in range(count)
    ]


def _blank_predictions(
    sizes: list[tuple[int, int]], config: Mapping[str, Any], images: int, dtype: torch.dtype
) -> DensePredictions:
    """The geometry of the locations, with zeros where a network would have predicted."""
    levels = [
        grid_locations(size, stride, (stride // 2) / stride, dtype=dtype)
        for size, stride in zip(sizes, config["strides"], strict=True)
    ]
    locations = torch.cat(levels)
    strides = torch.cat(
        [locations.new_full((len(x),), s) for x, s in zip(levels, config["strides"], strict=True)]
    )
    return DensePredictions(
        logits=locations.new_zeros(images, len(locations), config["classes"]),
        boxes=locations.new_zeros(images, len(locations), 4),
        quality=None,
        locations=locations,
        strides=strides,
        priors=squares(locations, strides),
        level_sizes=tuple(len(x) for x in levels),
        extras={},
    )


def _radius(config: Mapping[str, Any], gt_instances: list[Instances]) -> float:
    """Of the central region, in strides; one that holds every box where there is none."""
    if config["center_sampling"]:
        return float(config["center_sample_radius"])
    boxes = torch.cat([x.gt_boxes.tensor for x in gt_instances])
    sides = [0.0, *(boxes[:, 2:] - boxes[:, :2]).flatten().tolist()]
    return max(sides) / 2 / min(config["strides"]) + 1
