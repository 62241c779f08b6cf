# SPDX-License-Identifier: Apache-2.0
"""The host FCOS (Tian et al., ICCV 2019; TPAMI version arXiv 2006.09214): predictor, assigner.

As the papers' baselines have it: centre sampling, distances in strides, centerness predicted
from the box tower, GIoU weighted by centerness. Detectron2's variant differs in configuration
only.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from torch import Tensor, nn

from ..layers.losses import loss_normalizer
from ..layers.points import (
    Grid,
    boxes_to_distances,
    centerness,
    distances_to_boxes,
    squares,
)
from ..layers.tower import init_conv
from ..structures import (
    DensePredictions,
    DenseTargets,
    GroundTruth,
    foreground,
    stack_ground_truth,
)
from .head import flatten_maps, map_size
from .matching import (
    central_cells,
    claimed_index,
    index_in_image,
    matched_truth,
    read_levels,
)

__all__ = ["FCOSAssigner", "FCOSPredictor", "unit_weight"]


class FCOSPredictor(nn.Module):
    """One box of four distances, one centerness and K class logits at each cell.

    Facts for the head: K class channels from a 3x3 convolution with bias.
    """

    class_kernel_size = 3
    class_bias = True

    def __init__(self, *, num_classes: int, in_channels: int) -> None:
        """
        Args:
            num_classes: K.
            in_channels: channels of the box tower.
        """
        super().__init__()
        self.num_classes = self.class_outputs = num_classes
        self.in_channels = in_channels
        self.bbox_pred = nn.Conv2d(in_channels, 4, 3, padding=1)
        self.ctrness = nn.Conv2d(in_channels, 1, 3, padding=1)
        init_conv(self)

    def forward(
        self, class_maps: list[Tensor], box_features: list[Tensor], grid: Grid
    ) -> DensePredictions:
        """(N, K, H, W) and (N, C, H, W) maps of each level -> predictions.

        Distances are the ReLU of the outputs, times the stride (normalised targets). There is no
        learnable scale per level, as there is in some implementations: the parameter counts of
        the papers' baseline are without it.
        """
        distances = flatten_maps([self.bbox_pred(x) for x in box_features], 4).relu()
        boxes = distances_to_boxes(grid.locations, distances * grid.strides[:, None])
        quality = flatten_maps([self.ctrness(x) for x in box_features], 1)
        return DensePredictions(
            logits=flatten_maps(class_maps, self.num_classes),
            boxes=boxes,
            quality=quality.squeeze(-1),
            locations=grid.locations,
            strides=grid.strides,
            priors=squares(grid.locations, grid.strides),
            level_sizes=grid.level_sizes,
            extras={},
        )


def unit_weight(distances: Tensor) -> Tensor:
    """Every positive's box counts the same (Detectron2's FCOS); compare :func:`centerness`."""
    return torch.ones_like(distances[..., 0])


class FCOSAssigner(nn.Module):
    """Cells near the middle of a box, on the level of its size, learn it.

    A cell is positive for a box if it lies inside the box, less than ``radius`` strides from its
    middle in x and in y, and if the largest of its four distances lies in its level's range. A
    cell that several boxes claim learns the smallest.

    Only the few cells around each middle are looked at, all boxes of the batch at once: time and
    memory grow with the number of boxes, not with boxes times cells, nothing asks the device for
    a number, and there is no loop over boxes, images or levels.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        radius: float = 1.5,
        size_ranges: Sequence[tuple[float, float]] | None = None,
        box_weight: Callable[[Tensor], Tensor] = centerness,
    ) -> None:
        """
        Args:
            num_classes: K, the label of background.
            radius: of the central region, in strides.
            size_ranges: lowest and highest largest-distance of each level in pixels, both
                inclusive. By default 4 to 8 strides, open below at the finest level and above at
                the coarsest.
            box_weight: weight of a positive's box loss from its (..., 4) distances in pixels.
        """
        super().__init__()
        if not callable(box_weight):
            raise TypeError(f"box_weight must be callable, such as centerness, not {box_weight!r}")
        if not 0 < radius < math.inf:
            raise ValueError(f"assigner.radius must be positive and finite (strides), got {radius}")
        self.num_classes = num_classes
        self.radius = float(radius)
        self.size_ranges = None if size_ranges is None else [tuple(pair) for pair in size_ranges]
        self.box_weight = box_weight

    @torch.no_grad()
    def forward(
        self,
        features: Sequence[Tensor],
        predictions: DensePredictions,
        gt_instances: Sequence[Instances],
    ) -> DenseTargets:
        """Targets of all predictions; ``features`` only tells the levels' sizes.

        ``quality`` is the centerness of positives. ``extras["gt_index"]`` (N, R) is the index of
        the matched box in its own image, -1 without one.
        """
        truth = stack_ground_truth(gt_instances)
        sizes = [map_size(x) for x in features]
        matched = self._match(truth, predictions, sizes, len(gt_instances))
        labels, boxes = matched_truth(matched, truth, self.num_classes, predictions.boxes.dtype)
        distances = boxes_to_distances(predictions.locations, boxes)
        positive = foreground(labels, self.num_classes)
        box_weights = torch.where(positive, self.box_weight(distances), 0)
        return DenseTargets(
            labels=labels,
            boxes=boxes,
            cls_weights=torch.ones_like(box_weights)[..., None],
            box_weights=box_weights,
            quality=torch.where(positive, centerness(distances), 0),
            cls_normalizer=loss_normalizer(positive.sum().to(boxes.dtype)),
            box_normalizer=loss_normalizer(box_weights.sum()),
            extras={"gt_index": index_in_image(matched, truth)},
        )

    def _match(
        self,
        truth: GroundTruth,
        predictions: DensePredictions,
        sizes: Sequence[tuple[int, int]],
        num_images: int,
    ) -> Tensor:
        """(N, R) index of each location's box among all G of the batch, G where there is none."""
        levels = read_levels(predictions, sizes)
        boxes = truth.boxes.to(predictions.locations.dtype)
        cells, locations, near = central_cells(boxes, levels, self.radius)
        boxes = boxes[:, None, None, :]  # (G, 1, 1, 4)
        distances = boxes_to_distances(locations, boxes)
        reach = distances.amax(-1)
        low, high = self._size_limits(levels.stride)
        claim = near & (distances.amin(-1) > 0) & (reach >= low) & (reach <= high)

        shape = (num_images, sum(predictions.level_sizes))
        index = claimed_index(cells, claim, levels, truth.image_index, shape)
        return _smallest_claim(index, truth.boxes, math.prod(shape)).view(shape)

    def _size_limits(self, strides: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest reach in pixels of each level, (L, 1) each."""
        if self.size_ranges is not None:
            if len(self.size_ranges) != len(strides):
                raise ValueError(
                    f"assigner.size_ranges has {len(self.size_ranges)} entries, the head predicts "
                    f"{len(strides)} levels; give one (low, high) in pixels for each"
                )
            limits = torch.tensor(self.size_ranges, dtype=strides.dtype)
            low, high = limits.to(strides.device, non_blocking=True).split(1, dim=-1)
            return low, high
        low, high = strides * 4, strides * 8
        low[0], high[-1] = 0, math.inf
        return low, high


def _smallest_claim(index: Tensor, boxes: Tensor, total: int) -> Tensor:
    """(total,) the smallest of the G boxes that claim each location, G where none does.

    ``index`` (G, ...) are the locations that a box claims; ``total`` stands for no claim. Of
    boxes of one area the first wins.
    """
    count = len(boxes)
    by_area = (boxes[:, 2:] - boxes[:, :2]).prod(-1).argsort(stable=True)
    rank = by_area.argsort()
    claims = rank.view(-1, *[1] * (index.dim() - 1)).expand_as(index)
    best = index.new_full((total + 1,), count)
    best.scatter_reduce_(0, index.flatten(), claims.flatten(), "amin")
    return F.pad(by_area, (0, 1), value=count)[best[:total]]
