# SPDX-License-Identifier: Apache-2.0
"""How much boxes have in common, in NumPy's arrays."""

import numpy as np
import torch

from ..layers.boxes import paired_overlaps

__all__ = ["overlaps", "shares_inside"]


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(A, B) IoU of (A, 4) with (B, 4) xyxy boxes in one unit; 0 where one is inverted."""
    ours, theirs = (torch.from_numpy(np.asarray(x, dtype=np.float64)) for x in (boxes, others))
    return paired_overlaps(ours[:, None], theirs[None]).numpy()


def shares_inside(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(A, B) which share of each box's own area lies on each of the others (COCO's crowds)."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = (high - low).clip(min=0).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(-1)
    return common / np.maximum(areas, np.finfo(np.float64).tiny)[:, None]
