# SPDX-License-Identifier: Apache-2.0
"""The least that the papers need of an assigner: their targets, not their methods."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn
from torchvision.ops import roi_align

from d2_decouple.layers.losses import loss_normalizer
from d2_decouple.structures import (
    DensePredictions,
    DenseTargets,
    foreground,
    stack_ground_truth,
)


def targets_by_index(
    matched: Tensor, gt_instances: Sequence[Instances], num_classes: int
) -> DenseTargets:
    """Plain targets from (N, R) indices into the stacked ground truth; -1 none, -2 ignored."""
    truth = stack_ground_truth(gt_instances)
    spare = torch.tensor([-1, num_classes])
    labels = torch.cat((truth.classes, spare))[matched]
    positive = foreground(labels, num_classes).float()
    total = loss_normalizer(positive.sum())
    return DenseTargets(
        labels=labels,
        boxes=torch.cat((truth.boxes, truth.boxes.new_zeros(2, 4)))[matched],
        cls_weights=torch.ones_like(positive)[..., None],
        box_weights=positive,
        quality=None,
        cls_normalizer=total,
        box_normalizer=total,
        extras={},
    )


class AnchorAssigner(nn.Module):
    """IoU with the priors: positive from 0.5, background below 0.4, ignored between."""

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    @torch.no_grad()
    def forward(
        self,
        features: Sequence[Tensor],
        predictions: DensePredictions,
        gt_instances: Sequence[Instances],
    ) -> DenseTargets:
        matched, first = [], 0
        for instances in gt_instances:
            overlap = pairwise_iou(Boxes(predictions.priors), instances.gt_boxes)
            best, index = F.pad(overlap, (0, 1)).max(1)  # the last column: no object
            index = torch.where(best >= 0.5, index + first, torch.where(best < 0.4, -1, -2))
            matched.append(index)
            first += len(instances)
        return targets_by_index(torch.stack(matched), gt_instances, self.num_classes)


class LearnedLevels(nn.Module):
    """SAPD: a network of its own reads the maps at each object and weighs levels."""

    def __init__(self, *, host: nn.Module, channels: int, num_levels: int) -> None:
        super().__init__()
        self.host = host
        self.net = nn.Sequential(
            nn.Conv2d(channels * num_levels, 8, 3), nn.ReLU(), nn.Conv2d(8, num_levels, 5)
        )

    def forward(
        self,
        features: Sequence[Tensor],
        predictions: DensePredictions,
        gt_instances: Sequence[Instances],
    ) -> DenseTargets:
        targets = self.host(features, predictions, gt_instances)
        truth = stack_ground_truth(gt_instances)
        starts = torch.tensor([0, *predictions.level_sizes[:-1]]).cumsum(0)
        # Under autocast the maps are half precision, and this runs with autocast off.
        dtype = self.net[0].weight.dtype
        index, boxes = truth.image_index.to(dtype)[:, None], truth.boxes.to(dtype)
        pooled = [
            roi_align(x.to(dtype), torch.cat((index, boxes / stride), dim=1), 7, 1.0, 2, True)
            for x, stride in zip(features, predictions.strides[starts], strict=True)
        ]
        logits = self.net(torch.cat(pooled, dim=1)).flatten(1)  # (G, L)
        with torch.no_grad():
            easiest = self._overlaps(predictions, gt_instances).argmax(1)
            object_weights = logits.softmax(1).amax(1)
            first = torch.tensor([0, *truth.counts[:-1]]).cumsum(0)
            matched = targets.extras["gt_index"] + first[:, None]
            positive = targets.extras["gt_index"] >= 0
            weights = torch.cat((object_weights, torch.ones(1)))[torch.where(positive, matched, -1)]
        return targets._replace(
            cls_weights=weights[..., None],
            box_weights=weights * positive,
            box_normalizer=loss_normalizer((weights * positive).sum()),
            extras={
                "level_logits": logits,
                "levels": easiest,
                "normalizer": loss_normalizer(logits.new_tensor(len(logits))),
            },
        )

    def _overlaps(self, predictions: DensePredictions, gt_instances: Sequence[Instances]) -> Tensor:
        """(G, L) best overlap of each object with the boxes that each level predicts."""
        rows = []
        for boxes, instances in zip(predictions.boxes, gt_instances, strict=True):
            levels = boxes.split(list(predictions.level_sizes))
            rows.append(
                torch.stack(
                    [pairwise_iou(instances.gt_boxes, Boxes(x)).amax(1) for x in levels], dim=1
                )
            )
        return torch.cat(rows)


@dataclass(frozen=True, kw_only=True)
class LevelTerm:
    """Trains an assigner's own network, through what the assigner put into the extras."""

    weight: float = 0.1

    def __call__(self, predictions: DensePredictions, targets: DenseTargets) -> Tensor:
        extras = targets.extras
        loss = F.cross_entropy(extras["level_logits"], extras["levels"], reduction="sum")
        return self.weight * loss / extras["normalizer"]


class ScoreWeighted(nn.Module):
    """GFL and SALT: boxes are weighted by the detached score that selection uses."""

    def __init__(self, *, host: nn.Module, score: Callable[[DensePredictions], Tensor]) -> None:
        super().__init__()
        self.host, self.score = host, score

    @torch.no_grad()
    def forward(
        self, features: Sequence[Tensor], predictions: DensePredictions, gt_instances: Any
    ) -> DenseTargets:
        targets = self.host(features, predictions, gt_instances)
        positive = foreground(targets.labels, predictions.logits.shape[-1])
        weights = self.score(predictions).amax(-1) * positive
        return targets._replace(box_weights=weights, box_normalizer=loss_normalizer(weights.sum()))


class PerClassWeights(nn.Module):
    """SAPD's ``ignore_class``: a class costs nothing at some locations, the others do."""

    def __init__(self, *, host: nn.Module, ignored: int) -> None:
        super().__init__()
        self.host, self.ignored = host, ignored

    def forward(
        self, features: Sequence[Tensor], predictions: DensePredictions, gt_instances: Any
    ) -> DenseTargets:
        targets = self.host(features, predictions, gt_instances)
        weights = torch.ones_like(predictions.logits)
        weights[..., self.ignored] = 0
        return targets._replace(cls_weights=weights)


class PaddingIgnored(nn.Module):
    """ATSS, SALT, PDNet: cells in an image's own batch padding are ignored."""

    def __init__(self, *, host: nn.Module) -> None:
        super().__init__()
        self.host = host

    @torch.no_grad()
    def forward(
        self, features: Sequence[Tensor], predictions: DensePredictions, gt_instances: Any
    ) -> DenseTargets:
        targets = self.host(features, predictions, gt_instances)
        sizes = predictions.locations.new_tensor([x.image_size for x in gt_instances])
        padded = (sizes / 32).ceil() * 32
        strides = predictions.strides[:, None]
        corner = (predictions.locations / strides).floor() * strides
        inside = (corner < padded.flip(-1)[:, None]).all(-1)
        return targets._replace(labels=torch.where(inside, targets.labels, -1))
