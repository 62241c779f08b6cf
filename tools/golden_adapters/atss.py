# SPDX-License-Identifier: Apache-2.0
"""Cases of ATSS's assignment, and what the hosts that assign by it have in common.

A case counts as the package does, but for two marks: a location without an object is -1, and one
in an image's own padding -2.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from d2_decouple.layers.points import make_grid, squares
from d2_decouple.modeling import ATSSAssigner
from d2_decouple.structures import DensePredictions

from .case import Case, GoldenError, require

__all__ = ["atss_assign", "gt_instances", "level_features"]

DIVISOR = 32  # images are padded to multiples of it
NEGATIVE, UNUSED = -1, -2


def atss_assign(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Whose locations are positive in each scene, which is one image, and the thresholds."""
    config = case.config
    for key, only in (("min_center_distance_px", 0.01), ("ignore_iof_thr", -1)):
        require(case.path, f"config {key!r}", str(config[key]), (str(only),))
    assigner = ATSSAssigner(num_classes=1, topk=config["topk"], size_divisor=DIVISOR)
    results: dict[str, Tensor] = {}
    for scene in (f"s{number}" for number in range(config["scenes"])):
        sizes = case.tensor(f"{scene}/level_sizes").tolist()
        boxes = case.tensor(f"{scene}/gt_boxes").reshape(-1, 4)
        classes = torch.zeros(len(boxes))
        alone, padded = (case.tensor(f"{scene}/{x}").tolist() for x in ("image_hw", "pad_hw"))
        targets = assigner(
            level_features(sizes, 1),
            _anchors_alone(config, sizes, dtype),
            [gt_instances(case, alone, padded, boxes, classes)],
        )
        assigned = torch.where(targets.labels < 0, UNUSED, targets.extras["gt_index"])[0]
        positive = assigned[assigned > NEGATIVE]
        results |= {
            f"{scene}/assigned": assigned,
            f"{scene}/num_positive": torch.tensor(len(positive)),
            f"{scene}/positives_per_gt": positive.bincount(minlength=len(boxes)),
            f"{scene}/thresholds": targets.extras["iou_thresholds"],
        }
    return results


def gt_instances(
    case: Case, alone: Sequence[int], padded: Sequence[int], boxes: Tensor, classes: Tensor
) -> Instances:
    """Ground truth of an image of ``alone`` (height, width) pixels.

    Raises:
        GoldenError: its ``padded`` size is not the one that we give it.
    """
    if list(padded) != [-(-side // DIVISOR) * DIVISOR for side in alone]:
        raise GoldenError(
            f"{case.path}: an image of {list(alone)} pixels is padded to {list(padded)}; only the "
            f"next multiples of {DIVISOR} are compared"
        )
    return Instances(tuple(alone), gt_boxes=Boxes(boxes), gt_classes=classes.long())


def level_features(sizes: Sequence[Sequence[int]], images: int) -> list[Tensor]:
    """Maps without channels: they tell an assigner the levels' sizes (H, W)."""
    return [torch.empty(images, 0, *size) for size in sizes]


def _anchors_alone(
    config: Mapping[str, Any], sizes: Sequence[Sequence[int]], dtype: torch.dtype
) -> DensePredictions:
    """The anchors of one image, with zeros where a network would have predicted."""
    grid = make_grid(
        [(height, width) for height, width in sizes],
        config["strides"],
        config["center_offset_in_strides"],
        device=torch.device("cpu"),
        dtype=dtype,
    )
    count = len(grid.locations)
    return DensePredictions(
        logits=grid.locations.new_zeros(1, count, 1),
        boxes=grid.locations.new_zeros(1, count, 4),
        quality=None,
        locations=grid.locations,
        strides=grid.strides,
        priors=squares(grid.locations, config["anchor_side_in_strides"] * grid.strides),
        level_sizes=grid.level_sizes,
        extras={},
    )
