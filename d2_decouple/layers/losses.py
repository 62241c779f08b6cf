# SPDX-License-Identifier: Apache-2.0
"""Loss arithmetic: functions on tensors, no parameters, no knowledge of a detector.

All of them work in the dtype they are given (float64 too) and keep finite gradients on extreme
logits, on boxes without area and on inverted boxes.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

__all__ = ["generalized_iou_loss", "loss_normalizer", "sigmoid_focal_loss"]

_MIN_AREA = 1e-6  # floor of unions and enclosing areas, in the boxes' unit squared
_SMOOTH_HULL = 1e-7  # what a smoothed enclosing area has beside its own, in shares of smoothing


def sigmoid_focal_loss(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """Focal loss of independent sigmoids (Lin et al. 2017, Eq. 5), elementwise.

    A positive entry of logit z costs what a negative one of logit -z costs, up to alpha. So the
    sign of the positive entries is turned and one stable formula serves both.

    Args:
        logits: (..., K) class logits.
        labels: (...) integers; 0..K-1 makes that entry positive, anything else none.
        alpha: weight of positive entries; negative ones have 1 - alpha.
        gamma: exponent of the modulating factor.

    Returns:
        (..., K) losses.
    """
    num_classes = logits.shape[-1]
    positive = (labels >= 0) & (labels < num_classes)
    index = torch.where(positive, labels, 0)[..., None]
    is_positive = positive.to(logits.dtype)[..., None]
    signs = torch.ones_like(logits).scatter_(-1, index, 1 - 2 * is_positive)
    weights = torch.full_like(logits, 1 - alpha)
    weights.scatter_(-1, index, is_positive * (2 * alpha - 1) + (1 - alpha))
    signed = logits * signs
    # As exponentials of log-sigmoids, since a power has no finite slope at zero for gamma < 1.
    return -weights * (gamma * F.logsigmoid(signed)).exp() * F.logsigmoid(-signed)


def generalized_iou_loss(boxes: Tensor, gt_boxes: Tensor, smoothing: float = 0.0) -> Tensor:
    """``1 - GIoU`` (Rezatofighi et al. 2019) of boxes paired one to one.

    Args:
        boxes: (..., 4) xyxy, any unit. A box with x2 < x1 or y2 < y1 costs 1, without gradient.
        gt_boxes: (..., 4) xyxy in the same unit.
        smoothing: an area, in the boxes' unit squared, that overlap and union have in common
            beside what they are. PDNet's is one pixel: small boxes cost less, and two without
            any area, at the same place, cost 1.

    Returns:
        (...) losses in [0, 2].
    """
    inverted = (boxes[..., 2:] < boxes[..., :2]).any(-1)  # a NaN is not: it must come through
    boxes = torch.where(inverted[..., None], gt_boxes, boxes)
    low, high = boxes[..., :2], boxes[..., 2:]
    gt_low, gt_high = gt_boxes[..., :2], gt_boxes[..., 2:]
    overlap = _area((torch.minimum(high, gt_high) - torch.maximum(low, gt_low)).clamp(min=0))
    union = _area(high - low) + _area(gt_high - gt_low) - overlap
    hull = _area(torch.maximum(high, gt_high) - torch.minimum(low, gt_low))
    if smoothing:
        iou = (overlap + smoothing) / (union + smoothing)
        hull = hull + smoothing * _SMOOTH_HULL
    else:
        union, hull = union.clamp(min=_MIN_AREA), hull.clamp(min=_MIN_AREA)
        iou = overlap / union
    loss = 1 - (iou - (hull - union) / hull)
    return loss.masked_fill(inverted, 1)


def _area(sides: Tensor) -> Tensor:
    return sides[..., 0] * sides[..., 1]


def loss_normalizer(total: Tensor, minimum: float = 1.0) -> Tensor:
    """``max(sum over processes of total, minimum) / processes``, a scalar without gradient.

    Dividing each process's loss sum by it, and averaging gradients over processes as DDP does,
    gives exactly the gradient of one process with the whole batch, also where some process, or
    every one of them, has next to nothing to learn.
    """
    total = total.detach().clone()
    processes = 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
        processes = dist.get_world_size()
    return total.clamp(min=minimum) / processes
