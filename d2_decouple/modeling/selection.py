# SPDX-License-Identifier: Apache-2.0
"""From predictions to detections: score, candidates, boxes, suppression.

Every step is a callable in :class:`Selection`, because the papers differ in each of them.
Candidates and suppression are two steps, so that something (test-time augmentation) can merge
candidates in between.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..structures import DensePredictions

__all__ = [
    "BestLocations",
    "BestPairs",
    "HardNMS",
    "Selection",
    "class_score",
    "clip_to_image",
    "geometric_mean_score",
    "predicted_boxes",
    "product_score",
]

Size = tuple[int, int]
Candidates = tuple[Tensor, Tensor, Tensor]


def class_score(predictions: DensePredictions) -> Tensor:
    """(N, R, K) class probabilities alone."""
    return predictions.logits.sigmoid()


def product_score(predictions: DensePredictions) -> Tensor:
    """(N, R, K) class probability times quality (FCOS, 2019)."""
    return predictions.logits.sigmoid() * _quality(predictions)


def geometric_mean_score(predictions: DensePredictions) -> Tensor:
    """(N, R, K) square root of class probability times quality (FCOS, TPAMI version, Eq. 4)."""
    return (predictions.logits.sigmoid() * _quality(predictions)).sqrt()


def _quality(predictions: DensePredictions) -> Tensor:
    if predictions.quality is None:
        raise ValueError(
            "this score multiplies with a quality, but the predictor has no quality branch; use "
            "selection.score=class_score"
        )
    return predictions.quality.sigmoid()[..., None]


def predicted_boxes(predictions: DensePredictions) -> Tensor:
    """(N, R, 4) the final boxes of the predictor, xyxy pixels."""
    return predictions.boxes


def clip_to_image(boxes: Tensor, size: Size) -> Tensor:
    """(D, 4) xyxy boxes cut to [0, W] x [0, H] of ``size`` = (H, W)."""
    height, width = size
    limits = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limits)


@dataclass(frozen=True, kw_only=True)
class BestPairs:
    """The best (location, class) pairs of each level above a threshold (RetinaNet, FCOS).

    Attributes:
        test_score_thresh: pairs at or below this score are dropped.
        test_topk_candidates: pairs kept per level and image.
    """

    test_score_thresh: float
    test_topk_candidates: int

    def __call__(self, scores: Tensor, level_sizes: Sequence[int]) -> Candidates:
        """(R, K) scores of one image -> scores, location indices, classes, (D,) each."""
        return _pick_per_level(scores, level_sizes, self._pick)

    def _pick(self, level: Tensor) -> Candidates:
        location, label = (level > self.test_score_thresh).nonzero(as_tuple=True)
        value, order = _topk(level[location, label], self.test_topk_candidates)
        return value, location[order], label[order]


@dataclass(frozen=True, kw_only=True)
class BestLocations:
    """The best locations of each level by their best class, then all classes above a threshold
    (ATSS, GFL, SALT).

    Attributes:
        test_score_thresh: pairs at or below this score are dropped.
        test_topk_candidates: locations kept per level and image.
    """

    test_score_thresh: float
    test_topk_candidates: int

    def __call__(self, scores: Tensor, level_sizes: Sequence[int]) -> Candidates:
        """(R, K) scores of one image -> scores, location indices, classes, (D,) each."""
        return _pick_per_level(scores, level_sizes, self._pick)

    def _pick(self, level: Tensor) -> Candidates:
        kept = _topk(level.amax(-1), self.test_topk_candidates)[1]
        best = level[kept]
        row, label = (best > self.test_score_thresh).nonzero(as_tuple=True)
        return best[row, label], kept[row], label


def _topk(values: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    return values.topk(min(limit, len(values)))


def _pick_per_level(
    scores: Tensor, level_sizes: Sequence[int], pick: Callable[[Tensor], Candidates]
) -> Candidates:
    """Candidates of all levels; ``pick`` counts locations from the start of its level."""
    found = []
    for start, level in zip(
        [0, *accumulate(level_sizes)], scores.split(list(level_sizes)), strict=False
    ):
        value, location, label = pick(level)
        found.append((value, location + start, label))
    values, locations, labels = zip(*found, strict=True)
    return torch.cat(values), torch.cat(locations), torch.cat(labels)


@dataclass(frozen=True, kw_only=True)
class HardNMS:
    """Class-wise non-maximum suppression.

    Attributes:
        test_nms_thresh: a box that overlaps a better one of its class by more is dropped.
    """

    test_nms_thresh: float

    def __call__(self, candidates: Instances) -> Instances:
        """Candidates of one image -> the survivors, best first."""
        boxes = candidates.pred_boxes.tensor
        # Classes are told apart by shifting each beyond the largest coordinate, which keeps them
        # apart only if no coordinate is negative.
        lowest = torch.cat((boxes.flatten(), boxes.new_zeros(1))).amin()
        scores = candidates.scores.float()  # batched_nms makes the boxes float32, too
        keep = batched_nms(boxes - lowest, scores, candidates.pred_classes, self.test_nms_thresh)
        return candidates[keep]


class Selection:
    """Predictions -> detections of each image, as Detectron2 ``Instances``.

    The results have ``pred_boxes`` (xyxy pixels of the resized image), ``scores``,
    ``pred_classes`` and ``location_index`` (which of the R predictions it was).
    """

    def __init__(
        self,
        *,
        score: Callable[[DensePredictions], Tensor],
        candidates: Callable[[Tensor, Sequence[int]], Candidates],
        nms: Callable[[Instances], Instances],
        boxes: Callable[[DensePredictions], Tensor] = predicted_boxes,
        clip: Callable[[Tensor, Size], Tensor] | None = None,
        max_detections_per_image: int = 100,
    ) -> None:
        """
        Args:
            score: (N, R, K) scores of the predictions.
            candidates: picks candidates from one image's scores (:class:`BestPairs`).
            nms: suppresses among one image's candidates (:class:`HardNMS`).
            boxes: which boxes are meant, (N, R, 4).
            clip: what is done to boxes that leave the image, ``(boxes, (H, W)) -> boxes``.
            max_detections_per_image: the best that are kept after suppression.
        """
        steps = {"score": score, "candidates": candidates, "nms": nms, "boxes": boxes}
        for name, step in {**steps, **({"clip": clip} if clip else {})}.items():
            if not callable(step):
                raise TypeError(
                    f"selection.{name} must be callable, got {step!r}; a callable cannot be set "
                    "on the command line: set it in a config file"
                )
        self.score, self.candidates, self.nms = score, candidates, nms
        self.boxes, self.clip = boxes, clip
        self.max_detections_per_image = max_detections_per_image

    def __call__(
        self, predictions: DensePredictions, image_sizes: Sequence[Size]
    ) -> list[Instances]:
        """Detections of each image; ``image_sizes`` are (H, W) before padding."""
        return [self.suppress(found) for found in self.propose(predictions, image_sizes)]

    def propose(
        self, predictions: DensePredictions, image_sizes: Sequence[Size]
    ) -> list[Instances]:
        """Candidates of each image, before suppression."""
        scores, boxes = self.score(predictions), self.boxes(predictions)
        proposals = []
        for image_scores, image_boxes, size in zip(scores, boxes, image_sizes, strict=True):
            value, location, label = self.candidates(image_scores, predictions.level_sizes)
            chosen = image_boxes[location]
            if self.clip is not None:
                chosen = self.clip(chosen, size)
            proposals.append(
                Instances(
                    size,
                    pred_boxes=Boxes(chosen),
                    scores=value,
                    pred_classes=label,
                    location_index=location,
                )
            )
        return proposals

    def suppress(self, candidates: Instances) -> Instances:
        """Candidates of one image -> its detections, best first."""
        return self.nms(candidates)[: self.max_detections_per_image]
