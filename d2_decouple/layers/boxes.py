# SPDX-License-Identifier: Apache-2.0
"""Boxes as changes of other boxes, and what else is computed on (..., 4) xyxy tensors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

__all__ = [
    "BoxTransform",
    "box_changes",
    "changed_boxes",
    "clip_to_sizes",
    "enlarged",
    "overlaps",
    "paired_overlaps",
]

_LARGEST_CHANGE = math.log(1000 / 16)  # of the logarithm of a side
_MIN_AREA = 1e-6  # floor of unions, in the boxes' unit squared


class BoxTransform:
    """The changes (dx, dy, dw, dh) that turn one box into another (R-CNN, appendix C).

    It takes the place of Detectron2's ``Box2BoxTransform``, and differs in two points: a side may
    shrink as little as it may grow, as in the Decoupled R-CNN authors' code (Detectron2 limits
    growth alone), and float64 stays float64.
    """

    def __init__(
        self, *, weights: Sequence[float] = (1, 1, 1, 1), scale_clamp: float = _LARGEST_CHANGE
    ) -> None:
        """
        Args:
            weights: factors of (dx, dy, dw, dh): one over their standard deviations.
            scale_clamp: dw and dh are cut to +- this before the exponential.
        """
        self.weights = tuple(float(weight) for weight in weights)
        if len(self.weights) != 4 or not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(
                f"BoxTransform.weights is {list(weights)}; wanted are four positive numbers, for "
                "dx, dy, dw and dh, such as [10, 10, 5, 5]"
            )
        if not 0 < scale_clamp < math.inf:
            raise ValueError(
                f"BoxTransform.scale_clamp is {scale_clamp}; wanted is a positive number, such as "
                f"log(1000 / 16) = {_LARGEST_CHANGE:.3f}"
            )
        self.scale_clamp = float(scale_clamp)

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """(S, 4) changes from boxes (S, 4) to targets (S, 4), all xyxy in one unit.

        Raises:
            ValueError: a box has no width or no height.
        """
        size = src_boxes[:, 2:] - src_boxes[:, :2]
        flat = ~(size > 0).all(-1)  # also where there is NaN
        if bool(flat.any()):
            number = int(flat.sum())
            raise ValueError(
                f"{number} of {len(src_boxes)} boxes have no area, so no change leads from them "
                "to another; leave them out before (x2 > x1 and y2 > y1)"
            )
        changes = box_changes(src_boxes, target_boxes)
        return changes * changes.new_tensor(self.weights)

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Boxes (S, 4 B) after B changes each.

        Args:
            deltas: (S, 4 B) changes; half precision is computed in float32.
            boxes: (S, 4) xyxy.
        """
        if not deltas.dtype.itemsize > 2:
            deltas = deltas.float()
        changes = deltas.unflatten(-1, (-1, 4)) / deltas.new_tensor(self.weights)
        boxes = boxes.to(deltas.dtype)[:, None]
        return changed_boxes(changes, boxes, self.scale_clamp).flatten(1)


def box_changes(boxes: Tensor, targets: Tensor) -> Tensor:
    """(..., 4) changes (dx, dy, dw, dh) that make (..., 4) xyxy targets of (..., 4) xyxy boxes.

    The way back from :func:`changed_boxes`. Nothing is checked: a box without an area gives what
    is not finite.
    """
    middle, size = _middle_and_size(boxes)
    target_middle, target_size = _middle_and_size(targets)
    return torch.cat(((target_middle - middle) / size, (target_size / size).log()), dim=-1)


def changed_boxes(changes: Tensor, boxes: Tensor, scale_clamp: float = _LARGEST_CHANGE) -> Tensor:
    """(..., 4) xyxy boxes that (..., 4) changes (dx, dy, dw, dh) make of (..., 4) xyxy boxes.

    Args:
        changes: of the middle in shares of the box's sides, and of the logarithms of the sides.
        boxes: anything that broadcasts against the changes.
        scale_clamp: dw and dh are cut to +- this before the exponential.
    """
    middle, size = _middle_and_size(boxes)
    middle = middle + changes[..., :2] * size
    half = size * changes[..., 2:].clamp(-scale_clamp, scale_clamp).exp() / 2
    return torch.cat((middle - half, middle + half), dim=-1)


def _middle_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    size = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + size / 2, size


def clip_to_sizes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """(S, ..., 4) xyxy boxes cut to [0, W] x [0, H] of ``sizes`` (S, 2) = (H, W) of each."""
    limits = sizes.flip(-1).repeat(1, 2).to(boxes.dtype)
    limits = limits.view(len(limits), *[1] * (boxes.dim() - 2), 4)
    return torch.minimum(boxes.clamp(min=0), limits)


def enlarged(boxes: Tensor, factor: float) -> Tensor:
    """(S, 4) xyxy boxes ``factor`` times as wide and as high, around the same middles."""
    middle, size = _middle_and_size(boxes)
    return torch.cat((middle - size * factor / 2, middle + size * factor / 2), dim=-1)


def overlaps(gt_boxes: Tensor, boxes: Tensor) -> Tensor:
    """(M, S) IoU of (M, 4) with (S, 4) xyxy boxes; 0 where neither has an area."""
    return box_iou(gt_boxes, boxes.to(gt_boxes.dtype)).nan_to_num_(nan=0.0)


def paired_overlaps(boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """(...) IoU of (..., 4) boxes with (..., 4) others, one to one, all xyxy in one unit.

    0 where neither has an area, and where one is inverted.
    """
    low = torch.maximum(boxes[..., :2], gt_boxes[..., :2])
    high = torch.minimum(boxes[..., 2:], gt_boxes[..., 2:])
    common = (high - low).clamp(min=0).prod(-1)
    areas = [(x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1) for x in (boxes, gt_boxes)]
    return common / (areas[0] + areas[1] - common).clamp(min=_MIN_AREA)
