# SPDX-License-Identifier: Apache-2.0
"""From the outputs of an exported model to detections, in numpy.

The same rules as :mod:`d2_decouple.modeling.selection` has, for models that were exported without
the suppression.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Detections", "select"]


class Detections(NamedTuple):
    """What was found in an image, best first.

    Attributes:
        boxes: (D, 4) float32, xyxy pixels.
        scores: (D,) float32.
        classes: (D,) int64, 0..K-1.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray

    def where(self, chosen: np.ndarray) -> "Detections":
        """Those of a mask or of indices."""
        return Detections(self.boxes[chosen], self.scores[chosen], self.classes[chosen])


def select(
    boxes: np.ndarray, scores: np.ndarray, strides: np.ndarray, rules: Mapping[str, Any]
) -> Detections:
    """Candidates of each level, class-wise suppression, and the best of what is left.

    Args:
        boxes: (R, 4) xyxy pixels of the input.
        scores: (R, K).
        strides: (R,) stride of each row's level, level after level.
        rules: the model's ``selection`` (:mod:`d2_decouple.export.description`).
    """
    pick = {"pairs": _best_pairs, "locations": _best_locations}[rules["candidates"]]
    limit, floor = rules["test_topk_candidates"], rules["test_score_thresh"]
    found = [
        (start + rows, labels)
        for start, end in _levels(strides)
        for rows, labels in [pick(scores[start:end], limit, floor)]
    ]
    rows, labels = (np.concatenate(parts) for parts in zip(*found, strict=True))
    candidates = Detections(boxes[rows], scores[rows, labels], labels)
    kept = _suppressed(candidates, rules["test_nms_thresh"], rules["nms_side_offset"])
    return candidates.where(kept[: rules["max_detections_per_image"]])


def _levels(strides: np.ndarray) -> Iterator[tuple[int, int]]:
    """First row of each level, and the one behind its last."""
    changes = (np.flatnonzero(np.diff(strides)) + 1).tolist()
    return zip([0, *changes], [*changes, len(strides)], strict=True)


def _best(values: np.ndarray, limit: int) -> np.ndarray:
    return np.argsort(-values, kind="stable")[:limit]


def _best_pairs(level: np.ndarray, limit: int, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows and classes of the best pairs of a level's (r, K) scores."""
    rows, labels = np.nonzero(level > floor)
    order = _best(level[rows, labels], limit)
    return rows[order], labels[order]


def _best_locations(level: np.ndarray, limit: int, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows and classes above the threshold at the best rows of a level's (r, K) scores."""
    kept = _best(level.max(axis=1), limit)
    rows, labels = np.nonzero(level[kept] > floor)
    return kept[rows], labels


def _suppressed(candidates: Detections, threshold: float, side_offset: float) -> np.ndarray:
    """Indices of the candidates that no better one of their class overlaps, best first."""
    boxes = candidates.boxes.astype(np.float64)
    boxes[:, 2:] += side_offset
    alive = np.ones(len(boxes), bool)
    order = _best(candidates.scores, len(boxes))
    for label in np.unique(candidates.classes):
        rivals = order[candidates.classes[order] == label]
        for place, index in enumerate(rivals):
            if alive[index]:
                behind = rivals[place + 1 :]
                alive[behind[_overlaps(boxes[index], boxes[behind]) > threshold]] = False
    return order[alive[order]]


def _overlaps(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(D,) IoU of a box (4,) with others (D, 4); 0 where neither has an area."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    common = np.prod(np.maximum(high - low, 0), axis=1)
    areas = np.prod(others[:, 2:] - others[:, :2], axis=1)
    union = np.prod(box[2:] - box[:2]) + areas - common
    return np.where(common > 0, common / np.where(union == 0, 1, union), 0)
