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
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import batched_nms

from ..structures import DensePredictions

__all__ = [
    "BestLocations",
    "BestPairs",
    "GaussianDecay",
    "HardNMS",
    "LinearDecay",
    "Selection",
    "SoftNMS",
    "class_score",
    "clip_to_image",
    "coarse_boxes",
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


def coarse_boxes(predictions: DensePredictions) -> Tensor:
    """(N, R, 4) the boxes of a first stage (PDNet, SALT-Net), xyxy pixels."""
    if "coarse_boxes" not in predictions.extras:
        raise ValueError(
            "coarse boxes are wanted, and neither predictor nor aligner gives any, only "
            f"{sorted(predictions.extras)}; use one that does, such as PDNetPredictor"
        )
    return predictions.extras["coarse_boxes"]


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
        side_offset: what a side of a box has beside x2 - x1: 0 pixels, or 1 where x2 and y2 are
            the last pixels inside (maskrcnn-benchmark).
    """

    test_nms_thresh: float
    side_offset: float = 0.0

    def __call__(self, candidates: Instances) -> Instances:
        """Candidates of one image -> the survivors, best first."""
        boxes = candidates.pred_boxes.tensor
        # Classes are told apart by shifting each beyond the largest coordinate. That takes digits,
        # hence float64 (which MPS has not), and keeps them apart only above zero.
        exact = torch.float32 if boxes.device.type == "mps" else torch.float64
        boxes, scores = boxes.to(exact), candidates.scores.to(exact)
        lowest = torch.cat((boxes.flatten(), boxes.new_zeros(1))).amin()
        boxes = boxes - lowest + boxes.new_tensor([0, 0, self.side_offset, self.side_offset])
        keep = batched_nms(boxes, scores, candidates.pred_classes, self.test_nms_thresh)
        return candidates[keep]


@dataclass(frozen=True, kw_only=True)
class LinearDecay:
    """The linear rule of soft-NMS: an overlap that reaches the threshold costs its share.

    Attributes:
        test_nms_thresh: smaller overlaps cost nothing.
    """

    test_nms_thresh: float

    def __call__(self, overlaps: Tensor) -> Tensor:
        """Overlaps (IoU) with a better box -> factors of the scores, same shape."""
        return torch.where(overlaps >= self.test_nms_thresh, 1 - overlaps, 1.0)


@dataclass(frozen=True, kw_only=True)
class GaussianDecay:
    """The Gaussian rule of soft-NMS: every overlap costs, a small one next to nothing.

    Attributes:
        sigma: the smaller, the harder overlaps are punished; the paper takes 0.5.
    """

    sigma: float

    def __call__(self, overlaps: Tensor) -> Tensor:
        """Overlaps (IoU) with a better box -> factors of the scores, same shape."""
        return torch.exp(-overlaps.square() / self.sigma)


@dataclass(frozen=True, kw_only=True)
class SoftNMS:
    """Class-wise suppression that lowers scores instead of dropping boxes (Bodla et al., 2017).

    Again and again the best candidate left is taken, and the scores of the others of its class
    are multiplied with the decay of their overlaps with it. Of equal scores the first is taken.
    The survivors carry the lowered scores.

    Attributes:
        decay: overlaps (IoU) -> factors of the scores, from 0 to 1 (:class:`GaussianDecay`).
        test_score_thresh: a candidate is dropped once its score is not above this.
        max_detections: stop after so many; those found are the same as without a limit. It saves
            time where there are thousands of candidates; ``None`` takes all.
    """

    decay: Callable[[Tensor], Tensor]
    test_score_thresh: float
    max_detections: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.decay):
            raise TypeError(
                f"SoftNMS.decay must be callable, got {self.decay!r}; "
                "wanted LinearDecay(...), GaussianDecay(...) or a function"
            )

    def __call__(self, candidates: Instances) -> Instances:
        """Candidates of one image -> the survivors with their new scores, best first."""
        device = candidates.scores.device
        # One pick depends on the one before it: a GPU would only wait for its next small kernel.
        boxes, scores, labels = (
            value.detach().cpu()
            for value in (
                candidates.pred_boxes.tensor.float(),
                candidates.scores.float(),
                candidates.pred_classes,
            )
        )
        kept, decayed = self._pick(boxes, scores, labels)
        survivors = candidates[kept.to(device)]
        survivors.scores = decayed.to(device)
        return survivors

    def _pick(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the survivors and their scores, best first."""
        members = {label: (labels == label).nonzero()[:, 0] for label in labels.unique().tolist()}
        rivals = {label: boxes[index] for label, index in members.items()}
        # What was taken or has sunk is put below every threshold: it is never the maximum again.
        remaining = scores.masked_fill(scores <= self.test_score_thresh, -torch.inf)
        kept: list[int] = []
        values: list[float] = []
        limit = len(scores) if self.max_detections is None else self.max_detections
        while len(kept) < min(limit, len(scores)):
            best = int(remaining.argmax())
            value = float(remaining[best])
            if value == -torch.inf:
                break
            kept.append(best)
            values.append(value)
            label = int(labels[best])
            index = members[label]
            lowered = remaining[index] * self.decay(_overlaps(boxes[best], rivals[label]))
            # "Not above", so that a NaN of a strange decay falls out as well.
            remaining[index] = lowered.masked_fill(~(lowered > self.test_score_thresh), -torch.inf)
            remaining[best] = -torch.inf
        return torch.tensor(kept, dtype=torch.int64), scores.new_tensor(values)


def _overlaps(box: Tensor, others: Tensor) -> Tensor:
    """IoU of a box (4,) with others (D, 4); boxes without an area overlap nothing."""
    low = torch.maximum(box[:2], others[:, :2])
    high = torch.minimum(box[2:], others[:, 2:])
    inner = (high - low).clamp(min=0).prod(-1)
    areas = (others[:, 2:] - others[:, :2]).clamp(min=0).prod(-1)
    area = (box[2:] - box[:2]).clamp(min=0).prod()
    return torch.where(inner > 0, inner / (area + areas - inner), 0.0)


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
