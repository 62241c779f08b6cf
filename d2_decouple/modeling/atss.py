# SPDX-License-Identifier: Apache-2.0
"""The host ATSS (Zhang et al., CVPR 2020): one square anchor a cell, positives by statistics.

A cell stands for its corner here: its anchor is centred on ``index * stride``, so the recipe's
``offset`` is 0.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from torch import Tensor, nn

from ..layers.boxes import changed_boxes, paired_overlaps
from ..layers.losses import loss_normalizer
from ..layers.points import Grid, boxes_to_distances, centerness, squares, valid_locations
from ..layers.tower import init_conv
from ..structures import (
    DensePredictions,
    DenseTargets,
    GroundTruth,
    foreground,
    stack_ground_truth,
)
from .head import flatten_maps, map_size
from .matching import Levels, claimed_index, index_in_image, matched_truth, read_levels

__all__ = [
    "ANCHOR_STRIDES",
    "ATSSAssigner",
    "ATSSPredictor",
    "Candidates",
    "adaptive_thresholds",
    "best_claim",
    "nearest_candidates",
    "scaled_maps",
]

ANCHOR_STRIDES = 8  # side of a cell's anchor
_DEVIATIONS = (0.1, 0.1, 0.2, 0.2)  # of the changes (dx, dy, dw, dh)
_MIN_DISTANCE = 0.01  # pixels that a positive's anchor lies inside its object


def scaled_maps(maps: Sequence[Tensor], scales: Tensor) -> list[Tensor]:
    """Each level's map (N, C, H, W) times that level's learned scale, ``scales`` (L,).

    Raises:
        ValueError: there are more or fewer levels than scales.
    """
    if len(maps) != len(scales):
        raise ValueError(
            f"the predictor has scales for {len(scales)} levels and got {len(maps)}; set "
            f"model.head.predictor.num_levels={len(maps)}"
        )
    return [x * scale for x, scale in zip(maps, scales, strict=True)]


class ATSSPredictor(nn.Module):
    """One change of a square anchor, one centerness and K class logits at each cell.

    Facts for the head: K class channels from a 3x3 convolution with bias.
    """

    class_kernel_size = 3
    class_bias = True

    def __init__(self, *, num_classes: int, in_channels: int, num_levels: int) -> None:
        """
        Args:
            num_classes: K.
            in_channels: channels of the box tower.
            num_levels: L; each level has a learned factor on its changes.
        """
        super().__init__()
        self.num_classes = self.class_outputs = num_classes
        self.in_channels = in_channels
        self.bbox_pred = nn.Conv2d(in_channels, 4, 3, padding=1)
        self.ctrness = nn.Conv2d(in_channels, 1, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(num_levels))
        init_conv(self)

    def forward(
        self, class_maps: list[Tensor], box_features: list[Tensor], grid: Grid
    ) -> DensePredictions:
        """(N, K, H, W) and (N, C, H, W) maps of each level -> predictions.

        ``priors`` are the anchors, squares with sides of 8 strides.
        """
        maps = scaled_maps([self.bbox_pred(x) for x in box_features], self.scales)
        changes = flatten_maps(maps, 4)
        priors = squares(grid.locations, ANCHOR_STRIDES * grid.strides)
        quality = flatten_maps([self.ctrness(x) for x in box_features], 1)
        return DensePredictions(
            logits=flatten_maps(class_maps, self.num_classes),
            boxes=changed_boxes(changes * _sent(_DEVIATIONS, changes), priors),
            quality=quality.squeeze(-1),
            locations=grid.locations,
            strides=grid.strides,
            priors=priors,
            level_sizes=grid.level_sizes,
            extras={},
        )


class Candidates(NamedTuple):
    """The cells near each of the G boxes of a batch, ``topk`` of each level.

    Attributes:
        indices: (G, L * topk) among all N * R predictions, N * R where a level has fewer cells.
        exists: (G, L * topk) whether there is one.
    """

    indices: Tensor
    exists: Tensor


def nearest_candidates(
    truth: GroundTruth, levels: Levels, extents: Tensor, topk: int, shape: tuple[int, int]
) -> Candidates:
    """The ``topk`` cells of each level whose reference points are nearest to each box's middle.

    Only the few cells that can be among them are looked at: of those as far as (a, b) cells in x
    and y from the nearest, (a + 1) * (b + 1) - 1 are at least as near. Of equally near ones the
    first in the order of rows is taken.

    Args:
        truth: the ground truth of the batch.
        levels: of the pyramid.
        extents: (N, L, 2) cells in x and y that each image has on each level.
        topk: cells of each level.
        shape: N images and R predictions of one.
    """
    middle = (truth.boxes[:, None, :2] + truth.boxes[:, None, 2:]) / 2
    at = (middle - levels.origin) / levels.stride  # (G, L, 2) cells
    extent = extents[truth.image_index].to(at.dtype)
    nearest = torch.minimum((at - 0.5).ceil().clamp(min=0), extent - 1)  # the first of two
    cells = nearest[:, :, None] + _steps(topk, like=at)  # (G, L, S, 2)
    own = ((cells >= 0) & (cells < extent[:, :, None])).all(-1)
    distances = torch.where(own, (cells - at[:, :, None]).square().sum(-1), torch.inf)
    order = distances.argsort(dim=-1, stable=True)[..., :topk]
    index = claimed_index(cells, own, levels, truth.image_index, shape)
    index = index.gather(-1, order).flatten(1)
    return Candidates(index, index < shape[0] * shape[1])


def _steps(topk: int, like: Tensor) -> Tensor:
    """(S, 2) steps (x, y) that may lead from the nearest cell to one of the ``topk`` nearest."""
    reach = range(1 - topk, topk)
    steps = [(x, y) for y in reach for x in reach if (abs(x) + 1) * (abs(y) + 1) <= topk]
    return _sent(steps, like)


def _sent(numbers: Sequence[Any], like: Tensor) -> Tensor:
    """Numbers as a tensor of that type and device, without waiting for it."""
    return torch.tensor(numbers, dtype=like.dtype).to(like.device, non_blocking=True)


def adaptive_thresholds(overlaps: Tensor, exists: Tensor) -> Tensor:
    """(G,) mean plus (unbiased) standard deviation of each box's overlaps (G, S) that exist."""
    count = exists.sum(1)
    mean = (overlaps * exists).sum(1) / count.clamp(min=1)
    squares_sum = ((overlaps - mean[:, None]).square() * exists).sum(1)
    return mean + (squares_sum / (count - 1).clamp(min=1)).sqrt()


def best_claim(index: Tensor, values: Tensor, claim: Tensor, total: int) -> Tensor:
    """(total,) the box with the greatest value among those that claim each prediction, else G.

    Of equal values the first box wins.

    Args:
        index: (G, S) among ``total`` predictions.
        values: (G, S) above -1.
        claim: (G, S) whether the box wants that prediction.
        total: predictions of the whole batch.
    """
    index = torch.where(claim, index, total)
    greatest = values.new_full((total + 1,), -1)
    greatest.scatter_reduce_(0, index.flatten(), values.flatten(), "amax")
    index = torch.where(values == greatest[index], index, total)
    boxes = torch.arange(len(index), device=index.device)[:, None].expand_as(index)
    best = index.new_full((total + 1,), len(index))
    best.scatter_reduce_(0, index.flatten(), boxes.flatten(), "amin")
    return best[:total]


class ATSSAssigner(nn.Module):
    """Cells whose anchors overlap an object well, by its own standards, learn it (Algorithm 1).

    Candidates of an object are the ``topk`` cells of each level that are nearest to its middle.
    Positive are those whose anchor overlaps it by at least the mean plus the standard deviation of
    the candidates' overlaps, and whose reference point lies inside it. What several objects
    claim learns the one that its anchor overlaps most.

    Cells in an image's own padding are ignored and never candidates. All boxes of a batch are
    matched at once; nothing asks the device for a number.
    """

    def __init__(self, *, num_classes: int, topk: int = 9, size_divisor: int = 32) -> None:
        """
        Args:
            num_classes: K, the label of background.
            topk: candidates of each level.
            size_divisor: images are padded to multiples of it, in pixels.
        """
        super().__init__()
        if topk < 1:
            raise ValueError(f"assigner.topk is {topk}; wanted are cells of each level, such as 9")
        if size_divisor < 1:
            raise ValueError(f"assigner.size_divisor is {size_divisor}; wanted are pixels, from 1")
        self.num_classes, self.topk, self.size_divisor = num_classes, topk, size_divisor

    @torch.no_grad()
    def forward(
        self,
        features: Sequence[Tensor],
        predictions: DensePredictions,
        gt_instances: Sequence[Instances],
    ) -> DenseTargets:
        """Targets of all predictions; ``features`` only tells the levels' sizes.

        ``cls_normalizer`` is the sum over images of their positives, each image counting one at
        least. ``extras`` has ``gt_index`` (N, R), the matched box in its own image, -1 without
        one, and ``iou_thresholds`` (G,) of the batch's boxes.
        """
        truth = stack_ground_truth(gt_instances)
        truth = truth._replace(boxes=truth.boxes.to(predictions.boxes.dtype))
        sizes = [map_size(x) for x in features]
        image_sizes = [x.image_size for x in gt_instances]
        matched, thresholds = self._match(truth, predictions, sizes, image_sizes)
        labels, boxes = matched_truth(matched, truth, self.num_classes, truth.boxes.dtype)
        valid = valid_locations(
            predictions.locations, predictions.strides, image_sizes, self.size_divisor
        )
        labels = torch.where(valid, labels, -1)
        positive = foreground(labels, self.num_classes)
        box_weights, quality, minimum = self._weights(predictions, boxes, positive)
        counts = positive.sum(1).clamp(min=1)
        return DenseTargets(
            labels=labels,
            boxes=boxes,
            cls_weights=torch.ones_like(box_weights)[..., None],
            box_weights=box_weights,
            quality=quality,
            cls_normalizer=loss_normalizer(counts.sum().to(boxes.dtype)),
            box_normalizer=loss_normalizer(box_weights.sum(), minimum),
            extras={"gt_index": index_in_image(matched, truth), "iou_thresholds": thresholds},
        )

    def _weights(
        self, predictions: DensePredictions, boxes: Tensor, positive: Tensor
    ) -> tuple[Tensor, Tensor, float]:
        """(N, R) box weights, (N, R) quality targets, least value of the box normaliser.

        Both are the centerness of the matched boxes (N, R, 4) where ``positive`` (N, R).
        """
        distances = boxes_to_distances(predictions.locations, boxes)
        quality = torch.where(positive, centerness(distances), 0)
        return quality, quality, 1.0

    def _match(
        self,
        truth: GroundTruth,
        predictions: DensePredictions,
        sizes: Sequence[tuple[int, int]],
        image_sizes: Sequence[tuple[int, int]],
    ) -> tuple[Tensor, Tensor]:
        """(N, R) index among all G boxes of the batch, G where there is none; (G,) thresholds."""
        levels = read_levels(predictions, sizes)
        shape = (len(image_sizes), sum(predictions.level_sizes))
        extents = _extents(levels, image_sizes, self.size_divisor)
        index, exists = nearest_candidates(truth, levels, extents, self.topk, shape)
        overlaps = self._overlaps(predictions, truth, index)
        thresholds = adaptive_thresholds(overlaps, exists)
        locations = F.pad(predictions.locations, (0, 0, 0, 1))[_in_image(index, shape)]
        inside = boxes_to_distances(locations, truth.boxes[:, None]).amin(-1) > _MIN_DISTANCE
        claim = exists & inside & (overlaps >= thresholds[:, None])
        total = shape[0] * shape[1]
        return best_claim(index, overlaps, claim, total).view(shape), thresholds

    def _overlaps(self, predictions: DensePredictions, truth: GroundTruth, index: Tensor) -> Tensor:
        """(G, S) how well the candidates (G, S) fit each box: the IoU of their anchors."""
        shape = predictions.logits.shape[:2]
        priors = F.pad(predictions.priors, (0, 0, 0, 1))[_in_image(index, shape)]
        return paired_overlaps(priors, truth.boxes[:, None])


def _in_image(index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Indices among N * R predictions -> among R of one image; R for those that do not exist."""
    images, count = shape[0], shape[1]
    return torch.where(index < images * count, index % count, count)


def _extents(levels: Levels, image_sizes: Sequence[tuple[int, int]], size_divisor: int) -> Tensor:
    """(N, L, 2) cells in x and y of each level that begin inside an image's own padded size."""
    sizes = torch.tensor([(width, height) for height, width in image_sizes])
    padded = (sizes + size_divisor - 1) // size_divisor * size_divisor
    padded = padded.to(levels.stride.device, non_blocking=True)[:, None]
    own = (padded / levels.stride).ceil().long()
    return torch.minimum(own, levels.extent)
