# SPDX-License-Identifier: Apache-2.0
"""A one-stage detector as one graph of tensors: images in, candidates or detections out."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from ..modeling.detector import OneStageDetector
from ..modeling.folding import fold_batch_norms
from ..modeling.selection import BestPairs
from ..structures import DensePredictions
from .description import check_exportable

__all__ = ["ExportableDetector", "class_wise_nms", "exportable"]

_NOTHING = -1.0  # the score of a candidate that is none


@torch.library.custom_op("d2_decouple::class_wise_nms", mutates_args=())
def class_wise_nms(
    boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float, limit: int
) -> Tensor:
    """Which candidates survive non-maximum suppression among those of their class.

    An operator of its own, so that an exporter finds one node to translate (ONNX's
    ``NonMaxSuppression``) and no shape that depends on values.

    Args:
        boxes: (N, D, 4) two opposite corners in any order; one without an area overlaps nothing.
        scores: (N, K, D).
        iou_threshold: a box that overlaps a better one by more is dropped.
        score_threshold: candidates with this score or less are dropped.
        limit: survivors of a class, at most.

    Returns:
        (N, K, D) whether each one survives.
    """
    kept = torch.zeros_like(scores, dtype=torch.bool)
    low, high = boxes[..., :2], boxes[..., 2:]
    boxes = torch.cat((torch.minimum(low, high), torch.maximum(low, high)), dim=-1)
    for image, label in (scores > score_threshold).any(-1).nonzero().tolist():
        (rivals,) = (scores[image, label] > score_threshold).nonzero(as_tuple=True)
        best = nms(boxes[image, rivals], scores[image, label, rivals], iou_threshold)[:limit]
        kept[image, label, rivals[best]] = True
    return kept


@class_wise_nms.register_fake
def _(
    boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float, limit: int
) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def exportable(model: Any, *, nms_inside: bool) -> "ExportableDetector":
    """Make a trained model ready to be exported; it is taken over and changed.

    Batch norms are folded into convolutions, and it runs on the CPU in float32.

    Raises:
        ExportError: a model that cannot be exported, such as a two-stage detector.
    """
    model = check_exportable(model).eval().requires_grad_(False)
    fold_batch_norms(model)
    model = model.float().cpu().to(memory_format=torch.contiguous_format)
    return ExportableDetector(model, nms_inside=nms_inside).eval()


class ExportableDetector(nn.Module):
    """Normalisation, padding, backbone, head and scores, and by choice what selects among them.

    All of it is the model's own, and so are the results. Losses and assigner are left behind.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, model: OneStageDetector, *, nms_inside: bool) -> None:
        """
        Args:
            model: of the kind that :func:`~.description.check_exportable` lets pass.
            nms_inside: whether :meth:`forward` answers detections, not candidates.
        """
        super().__init__()
        self.backbone, self.head = model.backbone, model.head
        self.register_buffer("pixel_mean", model.pixel_mean.clone(), persistent=False)
        self.register_buffer("pixel_std", model.pixel_std.clone(), persistent=False)
        self.in_features = tuple(model.head_in_features)
        self.selection: Any = model.selection
        self.nms_inside = nms_inside

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of what :meth:`forward` answers, in its order."""
        if self.nms_inside:
            return "boxes", "scores", "classes", "counts"
        return "boxes", "scores", "strides"

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            image: (N, 3, H, W) float32, 0 to 255, in the recipe's order of channels. Any size:
                it is padded to a multiple of the backbone's divisor here.

        Returns:
            Without suppression, candidates: boxes (N, R, 4) xyxy pixels of the input, cut to it
            where the recipe does so, scores (N, R, K), and strides (R,), which tell the levels.

            With it, the D best detections of each image, best first: boxes (N, D, 4), scores
            (N, D), classes (N, D) int64, and counts (N,) int64 of how many there are. Behind
            these boxes and scores are 0, and classes -1.
        """
        height, width = image.shape[-2:]
        predictions = self._predictions(image)
        scores, boxes = self.selection.score(predictions), self.selection.boxes(predictions)
        if self.selection.clip is not None:
            boxes = _clipped(boxes, height, width)
        if not self.nms_inside:
            return boxes, scores, predictions.strides
        return self._detections(boxes, scores, predictions.level_sizes)

    def _predictions(self, image: Tensor) -> DensePredictions:
        normalized = (image - self.pixel_mean) / self.pixel_std
        divisor = max(self.backbone.size_divisibility, 1)
        # Written so that a tracer sees a multiple of the divisor: of what it cannot simplify it
        # makes longer and longer expressions, level by level.
        below, right = (
            (side + divisor - 1) // divisor * divisor - side for side in image.shape[-2:]
        )
        # Behind the normalisation, as in training: what is padded is the mean colour.
        maps = self.backbone(F.pad(normalized, (0, right, 0, below)))
        return self.head([maps[name] for name in self.in_features])

    def _detections(
        self, boxes: Tensor, scores: Tensor, level_sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        locations, of_class = self._candidates(scores, level_sizes)
        chosen = boxes.gather(1, locations[..., None].expand(-1, -1, 4))
        rule, floor = self.selection.nms, self.selection.candidates.test_score_thresh
        limit = self.selection.max_detections_per_image
        low, high = chosen[..., :2], chosen[..., 2:] + rule.side_offset
        # ONNX's operator takes the corners in any order: an inverted box must not get an area.
        whole = (high > low).all(-1, keepdim=True)
        seen = torch.where(whole, torch.cat((low, high), dim=-1), 0.0)
        kept = class_wise_nms(seen, of_class, rule.test_nms_thresh, floor, limit)
        value, place = _padded_topk(torch.where(kept, of_class, _NOTHING).flatten(1), limit)
        count = locations.shape[1]
        label, row = place // count, place % count
        found = value > floor
        best = chosen.gather(1, row[..., None].expand(-1, -1, 4))
        return (
            torch.where(found[..., None], best, 0.0),
            torch.where(found, value, 0.0),
            torch.where(found, label, -1),
            found.sum(1),
        )

    def _candidates(self, scores: Tensor, level_sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Rows (N, D) of the best candidates of all levels, and their scores (N, K, D)."""
        pick = _best_pairs if isinstance(self.selection.candidates, BestPairs) else _best_locations
        limit = self.selection.candidates.test_topk_candidates
        rows, values = [], []
        starts = [0, *accumulate(level_sizes)]
        for start, level in zip(starts, scores.split(list(level_sizes), 1), strict=False):
            row, value = pick(level, limit)
            rows.append(row + start)
            values.append(value)
        return torch.cat(rows, dim=1), torch.cat(values, dim=-1)


def _clipped(boxes: Tensor, height: int, width: int) -> Tensor:
    """As :func:`~d2_decouple.modeling.selection.clip_to_image`, of (N, R, 4) boxes.

    That one makes a tensor of numbers, and here the size is not known before an image comes.
    """
    sides = [torch.full((1,), side, dtype=boxes.dtype) for side in (width, height)]
    return torch.minimum(boxes.clamp(min=0), torch.cat(sides * 2))


def _best_pairs(level: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """(N, r, K) scores of a level -> rows (N, limit) and scores (N, K, limit) of its best pairs.

    A pair has a score in its own class alone.
    """
    num_classes = level.shape[-1]
    value, place = _padded_topk(level.flatten(1), limit)
    labels = torch.arange(num_classes, device=level.device)[:, None]
    mine = (place % num_classes)[:, None] == labels
    return place // num_classes, torch.where(mine, value[:, None], _NOTHING)


def _best_locations(level: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """(N, r, K) scores of a level -> rows (N, limit) and all scores (N, K, limit) of its best."""
    best, rows = _padded_topk(level.amax(-1), limit)
    values = level.gather(1, rows[..., None].expand(-1, -1, level.shape[-1]))
    return rows, torch.where(best[..., None] < 0, _NOTHING, values).transpose(1, 2)


def _padded_topk(values: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """The ``limit`` largest of each row of (N, r) and where they stand; r may be less.

    What is missing has the score of nothing and stands at 0. So the number is the same for every
    size of image.
    """
    found = F.pad(values, (0, limit), value=_NOTHING).topk(limit)
    return found.values, torch.where(found.values < 0, 0, found.indices)
