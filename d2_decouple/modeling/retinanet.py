# SPDX-License-Identifier: Apache-2.0
"""The host RetinaNet (Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017).

Several anchors a cell, told apart by their overlap with objects. Anchors, matching and decoding
are those of Detectron2, whose weights load by name. The loss differs from Detectron2's in its
normaliser: the exact number of positives of the whole batch, not a moving average of it.

Detectron2's anchors are centred on the corner of their cell, ``index * stride``, so the recipe's
``offset`` is 0; the paper does not say.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from torch import Tensor, nn

from ..layers.boxes import box_changes, changed_boxes
from ..layers.losses import loss_normalizer
from ..layers.points import Grid
from ..layers.tower import init_conv
from ..structures import (
    DensePredictions,
    DenseTargets,
    GroundTruth,
    foreground,
    stack_ground_truth,
)
from .head import flatten_maps, map_size
from .matching import best_overlaps, index_in_batch, index_in_image, matched_truth

__all__ = ["DeltaL1Term", "RetinaNetAssigner", "RetinaNetPredictor"]

_SIZES = tuple(4 * 2 ** (third / 3) for third in range(3))
_RATIOS = (0.5, 1.0, 2.0)


class RetinaNetPredictor(nn.Module):
    """A anchors at each cell, and for each of them a change of its box and K class logits (4).

    Facts for the head: A * K class channels from a 3x3 convolution with bias, anchor by anchor.
    """

    class_kernel_size = 3
    class_bias = True
    half_sides: Tensor  # (A, 2) half width and height of the anchors, in strides

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        sizes: Sequence[float] = _SIZES,
        aspect_ratios: Sequence[float] = _RATIOS,
    ) -> None:
        """
        Args:
            num_classes: K.
            in_channels: channels of the box tower.
            sizes: square roots of the anchors' areas, in strides.
            aspect_ratios: heights over widths. All of them in one size come first, then all in
                the next.
        """
        super().__init__()
        for name, numbers in (("sizes", sizes), ("aspect_ratios", aspect_ratios)):
            if not len(numbers) or not all(0 < number < math.inf for number in numbers):
                raise ValueError(
                    f"predictor.{name} is {list(numbers)}; wanted is at least one positive number, "
                    "such as [0.5, 1.0, 2.0]"
                )
        shapes = [
            (math.sqrt(size**2 / ratio), ratio * math.sqrt(size**2 / ratio))
            for size in sizes
            for ratio in aspect_ratios
        ]
        self.anchors_per_cell = len(shapes)
        # Not among the weights: they follow from the arguments.
        self.register_buffer("half_sides", torch.tensor(shapes) / 2, persistent=False)
        self.num_classes, self.in_channels = num_classes, in_channels
        self.class_outputs = len(shapes) * num_classes
        self.bbox_pred = nn.Conv2d(in_channels, len(shapes) * 4, 3, padding=1)
        init_conv(self)

    def forward(
        self, class_maps: list[Tensor], box_features: list[Tensor], grid: Grid
    ) -> DensePredictions:
        """(N, A * K, H, W) and (N, C, H, W) maps of each level -> predictions, R = A * cells.

        ``priors`` are the anchors; ``extras["deltas"]`` (N, R, 4) are the predicted changes (dx,
        dy, dw, dh) of them. A side may shrink no more than it may grow, by a factor of 62.5;
        Detectron2 limits growth alone.
        """
        deltas = flatten_maps([self.bbox_pred(x) for x in box_features], 4)
        locations, strides = (
            x[:, None].expand(-1, self.anchors_per_cell, *x.shape[1:]).flatten(0, 1)
            for x in (grid.locations, grid.strides)
        )
        half = self.half_sides.to(locations.dtype).repeat(grid.cells.shape[0], 1)
        reach = half * strides[:, None]
        priors = torch.cat((locations - reach, locations + reach), dim=-1)
        return DensePredictions(
            logits=flatten_maps(class_maps, self.num_classes),
            boxes=changed_boxes(deltas, priors),
            quality=None,
            locations=locations,
            strides=strides,
            priors=priors,
            level_sizes=tuple(self.anchors_per_cell * cells for cells in grid.level_sizes),
            extras={"deltas": deltas},
        )


class RetinaNetAssigner(nn.Module):
    """Anchors that overlap an object enough learn it; those that overlap it a little are ignored.

    Each anchor is matched with the object that it overlaps most (section 4.1). It is positive from
    the second threshold on, background below the first, and ignored between them. Beside these,
    an anchor is positive if some object is overlapped by none more than by it, however little;
    it still learns the object that it overlaps most itself (Detectron2's low-quality matches).
    An object that no anchor overlaps, since it has no area, has none; with Detectron2's matcher it
    makes every anchor positive.

    Time and memory grow with the boxes of an image; nothing asks the device for a number.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        anchors_per_cell: int = len(_SIZES) * len(_RATIOS),
        iou_thresholds: Sequence[float] = (0.4, 0.5),
    ) -> None:
        """
        Args:
            num_classes: K, the label of background.
            anchors_per_cell: A of the predictor.
            iou_thresholds: overlap from which an anchor is no background, and from which it is
                positive.
        """
        super().__init__()
        thresholds = tuple(iou_thresholds)
        if len(thresholds) != 2 or not 0 < thresholds[0] <= thresholds[1] <= 1:
            raise ValueError(
                f"assigner.iou_thresholds is {list(iou_thresholds)}; wanted are two overlaps above "
                "0, at most 1, the smaller first, such as [0.4, 0.5]"
            )
        self.num_classes, self.anchors_per_cell = num_classes, anchors_per_cell
        self.iou_thresholds = thresholds

    @torch.no_grad()
    def forward(
        self,
        features: Sequence[Tensor],
        predictions: DensePredictions,
        gt_instances: Sequence[Instances],
    ) -> DenseTargets:
        """Targets of all predictions; ``features`` only tells the levels' sizes.

        Both normalisers are the number of positives. ``extras["gt_index"]`` (N, R) is the index of
        the matched box in its own image, -1 without one.
        """
        self._check_anchors([map_size(x) for x in features], predictions.level_sizes)
        truth = stack_ground_truth(gt_instances)
        truth = truth._replace(boxes=truth.boxes.to(predictions.priors.dtype))
        matched, ignored = self._match(truth, predictions.priors)
        labels, boxes = matched_truth(matched, truth, self.num_classes, truth.boxes.dtype)
        labels = torch.where(ignored, -1, labels)
        positive = foreground(labels, self.num_classes).to(boxes.dtype)
        total = loss_normalizer(positive.sum())
        return DenseTargets(
            labels=labels,
            boxes=boxes,
            cls_weights=torch.ones_like(positive)[..., None],
            box_weights=positive,
            quality=None,
            cls_normalizer=total,
            box_normalizer=total,
            extras={"gt_index": index_in_image(matched, truth)},
        )

    def _check_anchors(self, sizes: list[tuple[int, int]], level_sizes: Sequence[int]) -> None:
        cells = [height * width for height, width in sizes]
        if [count * self.anchors_per_cell for count in cells] != list(level_sizes):
            found = sum(level_sizes) / max(sum(cells), 1)
            raise ValueError(
                f"the head predicts {tuple(level_sizes)} boxes on levels of {cells} cells, "
                f"{found:g} a cell; the assigner wants {self.anchors_per_cell} a cell: set "
                f"model.assigner.anchors_per_cell={found:g}, or take another model.head.predictor"
            )

    def _match(self, truth: GroundTruth, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """(N, R) index among all G boxes of the batch, G without one; (N, R) what is ignored."""
        low, high = self.iou_thresholds
        matched, ignored = [], []
        for gt_boxes in truth.boxes.split(truth.counts):
            best = best_overlaps(anchors, gt_boxes)
            positive = (best.overlap >= high) | (best.top_overlap > 0)
            matched.append(torch.where(positive, best.matched, -1))
            ignored.append(~positive & (best.overlap >= low))
        return index_in_batch(torch.stack(matched), truth), torch.stack(ignored)


@dataclass(frozen=True, kw_only=True)
class DeltaL1Term:
    """Weighted smooth L1 loss of the predicted changes of the priors, over ``box_normalizer``.

    Attributes:
        weight: factor on the whole term.
        beta: deviation up to which the loss is quadratic; 0 is L1 (Detectron2's default).
    """

    weight: float = 1.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"DeltaL1Term.beta is {self.beta}; wanted is a number from 0, as 0.1")

    def __call__(self, predictions: DensePredictions, targets: DenseTargets) -> Tensor:
        """The scalar that is added to the loss."""
        if "deltas" not in predictions.extras:
            raise ValueError(
                "DeltaL1Term wants the changes of anchors, and the predictor gives none, only "
                f"{sorted(predictions.extras)}; use one that does, such as RetinaNetPredictor"
            )
        weights = targets.box_weights[..., None]
        # Without an object the anchor itself: there is no logarithm of zeros.
        boxes = torch.where(weights > 0, targets.boxes, predictions.priors)
        losses = F.smooth_l1_loss(
            predictions.extras["deltas"],
            box_changes(predictions.priors, boxes),
            beta=self.beta,
            reduction="none",
        )
        return self.weight * (losses * weights).sum() / targets.box_normalizer
