# SPDX-License-Identifier: Apache-2.0
"""Loss arithmetic: functions on tensors, no parameters, no knowledge of a detector.

All of them work in the dtype they are given (float64 too) and keep finite gradients on extreme
logits, on boxes without area and on inverted boxes.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .boxes import paired_overlaps
from .precision import at_least_float32

__all__ = [
    "distribution_focal_loss",
    "generalized_iou_loss",
    "integral",
    "iou_loss",
    "linear_iou_loss",
    "loss_normalizer",
    "quality_focal_loss",
    "sigmoid_focal_loss",
]

_MIN_AREA = 1e-6  # floor of unions and enclosing areas, in the boxes' unit squared
_MIN_IOU = 1e-6  # in the logarithm
_SMOOTH_HULL = 1e-7  # what a smoothed enclosing area has beside its own, in shares of smoothing
_BELOW_LAST_BIN = 0.1  # how far from the last bin a side's distance is kept, so that it has a next


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


def quality_focal_loss(
    logits: Tensor,
    labels: Tensor,
    quality: Tensor,
    beta: float,
    quality_logits: Tensor | None = None,
) -> Tensor:
    """Quality focal loss (Li et al. 2020, section 3) of independent scores p, elementwise.

    ``|t - p| ** beta`` times the binary cross entropy of p with a target t in [0, 1]: the
    quality at the entry of the label, 0 at all others. Both factors pass gradients.

    Args:
        logits: (..., K) class logits z.
        labels: (...) integers; 0..K-1 names the entry whose target is the quality.
        quality: (...) targets in [0, 1]; not looked at where the label is none of these.
        beta: exponent of the modulating factor, 0 or at least 1: between them its slope at
            p = t is infinite.
        quality_logits: (...) logits q of a second sigmoid, where the score is the product
            p = sigmoid(z) sigmoid(q) (GFLv2, SALT-Net); without them it is sigmoid(z).

    Returns:
        (..., K) losses.
    """
    positive = (labels >= 0) & (labels < logits.shape[-1])
    index = torch.where(positive, labels, 0)[..., None]
    target = torch.where(positive, quality, 0)[..., None]
    log_score, log_rest = _log_product(logits, quality_logits)
    # All but one entry of a row have the target 0, and there the power is one of the score alone.
    losses = -(beta * log_score).exp() * log_rest
    log_score, log_rest = (x.gather(-1, index) for x in (log_score, log_rest))
    modulation = (target - log_score.exp()).abs() ** beta
    chosen = -modulation * (target * log_score + (1 - target) * log_rest)
    return losses.scatter(-1, index, chosen)


def _log_product(logits: Tensor, quality_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """log p and log (1 - p) of p = sigmoid(z), or of p = sigmoid(z) sigmoid(q), (..., K) each.

    The second from 1 - p = sigmoid(-z) + sigmoid(z) sigmoid(-q): in this sum nothing cancels.
    """
    log_class, log_rest = F.logsigmoid(logits), F.logsigmoid(-logits)
    if quality_logits is None:
        return log_class, log_rest
    log_quality = F.logsigmoid(quality_logits)[..., None]
    log_missing = F.logsigmoid(-quality_logits)[..., None]
    return log_class + log_quality, torch.logaddexp(log_rest, log_class + log_missing)


def integral(logits: Tensor) -> Tensor:
    """(..., bins) logits of a distribution over 0, 1, ..., bins - 1 -> (...) its mean.

    The side of a box, in strides (Li et al. 2020, section 3). Half precision is computed, and
    given back, in float32.
    """
    weights = at_least_float32(logits).softmax(-1)
    # A sum, not a matrix product: that would run in half precision under autocast, and in
    # TensorFloat-32 where it is allowed, which is a pixel at the coarsest level.
    return (weights * _bins(weights)).sum(-1)


def _bins(logits: Tensor) -> Tensor:
    return torch.arange(logits.shape[-1], device=logits.device, dtype=logits.dtype)


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    """Distribution focal loss (Li et al. 2020, section 3), the mean over the four sides of a box.

    Cross entropy with the two bins next to a distance, each weighted by its nearness.

    Args:
        logits: (..., 4, bins) of distributions over 0, 1, ..., bins - 1 strides.
        distances: (..., 4) of left, top, right and bottom in strides; cut to
            [0, bins - 1.1] (the authors' code).

    Returns:
        (...) losses.
    """
    distances = distances.clamp(0, logits.shape[-1] - 1 - _BELOW_LAST_BIN)
    lower = distances.floor()
    nearness = torch.stack((lower + 1 - distances, distances - lower), dim=-1)
    index = torch.stack((lower, lower + 1), dim=-1).long()
    log_weights = logits.log_softmax(-1).gather(-1, index)
    return -(log_weights * nearness).sum(-1).mean(-1)


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


def iou_loss(boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """``-ln IoU`` (UnitBox, Yu et al. 2016) of boxes paired one to one.

    Args:
        boxes: (..., 4) xyxy, any unit. One with x2 < x1 or y2 < y1 overlaps nothing.
        gt_boxes: (..., 4) xyxy in the same unit.

    Returns:
        (...) losses from 0 to 13.8: overlaps below 1e-6 count as that, without gradient.
    """
    return -paired_overlaps(boxes, gt_boxes).clamp(min=_MIN_IOU).log()


def linear_iou_loss(boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """``1 - IoU``, (...) of (..., 4) xyxy boxes paired one to one; see :func:`iou_loss`."""
    return 1 - paired_overlaps(boxes, gt_boxes)
