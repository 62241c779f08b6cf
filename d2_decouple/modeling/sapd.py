# SPDX-License-Identifier: Apache-2.0
"""SAPD (Zhu et al., "Soft Anchor-Point Object Detection", ECCV 2020): how strongly each cell of
each level learns an object.

The network predicts at cells as FCOS does, without a quality. An object is learned at the cells
around its middle, on the level where they predict it best (FSAF). Cells count by how near they are
to the middle (soft-weighted points), and later on several levels count by what a feature-selection
network thinks of them (soft-selected levels).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..layers.boxes import enlarged
from ..layers.losses import iou_loss, loss_normalizer, sigmoid_focal_loss
from ..layers.points import (
    Grid,
    boxes_to_distances,
    distances_to_boxes,
    soft_centerness,
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
from .feature_selection import FeatureSelectionNet
from .head import flatten_maps, map_size
from .matching import Levels, index_in_image, matched_truth, read_levels
from .region_cells import (
    RegionPairs,
    Regions,
    cells_by_point,
    cells_touched,
    marked,
    smallest_claim,
    with_one,
)

__all__ = ["SAPDAssigner", "SAPDOptions", "SAPDPredictor"]

_BOX_BIAS = 0.1  # of the distances, before they are multiplied by the unit
_RULES = {"center": cells_by_point, "cell": cells_touched}
_UNSELECTED = ("negative", "ignore_class", "ignore_all")


@dataclass(frozen=True, kw_only=True)
class SAPDOptions:
    """What the paper compares (Tables 2 to 4), and what it leaves open.

    Attributes:
        use_soft_weights: a positive counts by its generalised centerness ("SW").
        exponent: of that, the paper's eta; 0.5 gives FCOS's centerness.
        use_soft_levels: from ``soft_start`` on, an object is learned on its ``top_k`` best levels,
            which count as the feature-selection network says ("SS").
        top_k: levels.
        soft_start: share of the training, from 0 (soft from the start) to 1 (never).
        select_train_only: the feature-selection network is trained, and its weights are not used.
        shrink: sides of the region of positives, in shares of the box's; the paper's epsilon.
        positive_rule: "center", a cell is positive if its point lies in that region; "cell", if its
            square touches the region (FSAF). A region without any takes the cell at its middle.
        ignore_scale: None, or sides of a larger region, in shares of the box's, of which what lies
            outside the region of positives costs nothing for the object's class, on its levels and
            those next to them (FSAF: 0.5). What holds inside is said by ``unselected``.
        unselected: what the region is on levels where the object is not learned: "negative", as the
            paper has it; "ignore_class", no loss of the object's class; "ignore_all", no loss.
        detach_level_weights: the weights of levels pass no gradient to the network. If they do, the
            normaliser still is a constant.
        renormalize_levels: an object's weights add up to 1.
    """

    use_soft_weights: bool = True
    exponent: float = 1.0
    use_soft_levels: bool = True
    top_k: int = 3
    soft_start: float = 0.5
    select_train_only: bool = False
    shrink: float = 0.2
    positive_rule: str = "center"
    ignore_scale: float | None = None
    unselected: str = "negative"
    detach_level_weights: bool = True
    renormalize_levels: bool = False

    def __post_init__(self) -> None:
        self._check("exponent", 0 < self.exponent < math.inf, "a positive number, such as 1")
        self._check("top_k", self.top_k >= 1, "a number of levels from 1, such as 3")
        self._check("soft_start", 0 <= self.soft_start <= 1, "a share from 0 to 1, such as 0.5")
        self._check("shrink", 0 < self.shrink < math.inf, "a positive number, such as 0.2")
        self._check("positive_rule", self.positive_rule in _RULES, f"one of {tuple(_RULES)}")
        self._check("unselected", self.unselected in _UNSELECTED, f"one of {_UNSELECTED}")
        larger = self.ignore_scale is None or self.shrink < self.ignore_scale < math.inf
        self._check(
            "ignore_scale", larger, f"None, or more than shrink, {self.shrink}, such as 0.5"
        )
        if self.use_soft_levels and self.select_train_only:
            raise ValueError(
                "SAPDOptions has use_soft_levels, which uses the levels' weights, and "
                "select_train_only, which does not; set assigner.options.use_soft_levels=False"
            )

    def _check(self, name: str, valid: bool, wanted: str) -> None:
        if not valid:
            raise ValueError(f"SAPDOptions.{name} is {getattr(self, name)!r}; wanted is {wanted}")

    @property
    def has_selection(self) -> bool:
        """Whether there is a feature-selection network."""
        return self.use_soft_levels or self.select_train_only


class SAPDPredictor(nn.Module):
    """One box of four distances, and K class logits, at each cell (section 3.1).

    Facts for the head: K class channels from a 3x3 convolution with bias. There is no quality.
    """

    class_kernel_size = 3
    class_bias = True

    def __init__(self, *, num_classes: int, in_channels: int, unit: float = 4.0) -> None:
        """
        Args:
            num_classes: K.
            in_channels: channels of the box tower.
            unit: strides that an output of 1 means, the paper's z (Eq. 1).
        """
        super().__init__()
        if not 0 < unit < math.inf:
            raise ValueError(
                f"predictor.unit is {unit}; wanted is a positive number of strides, such as 4"
            )
        self.num_classes = self.class_outputs = num_classes
        self.in_channels, self.unit = in_channels, float(unit)
        self.bbox_pred = nn.Conv2d(in_channels, 4, 3, padding=1)
        init_conv(self, bias=_BOX_BIAS)

    def forward(
        self, class_maps: list[Tensor], box_features: list[Tensor], grid: Grid
    ) -> DensePredictions:
        """(N, K, H, W) and (N, C, H, W) maps of each level -> predictions.

        Distances are the ReLU of the outputs, times ``unit`` strides; the ReLU is FSAF's.
        """
        sides = grid.strides * self.unit
        distances = flatten_maps([self.bbox_pred(x) for x in box_features], 4).relu()
        return DensePredictions(
            logits=flatten_maps(class_maps, self.num_classes),
            boxes=distances_to_boxes(grid.locations, distances * sides[:, None]),
            quality=None,
            locations=grid.locations,
            strides=grid.strides,
            priors=squares(grid.locations, sides),
            level_sizes=grid.level_sizes,
            extras={},
        )


class SAPDAssigner(nn.Module):
    """Cells around an object's middle learn it, on the levels that predict it best.

    What a level is worth for an object is the mean, over the region's cells there, of the focal
    loss of all classes plus the box's loss (section 3.1). The best level, and the ``top_k`` best
    ones, are found in that; a level whose loss is not a number comes last, and of equal ones the
    finer is better. What several objects claim learns the smallest. Where no cell lies in a region,
    the one at its middle stands for it; soft centerness makes it count nothing where its point is
    not in the object.

    All boxes of a batch are matched at once, in pieces of bounded memory. The number of pairs of
    an object and a cell is asked from the device, once a batch, or twice with ``ignore_scale``.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int,
        num_levels: int,
        max_iter: int,
        options: SAPDOptions | None = None,
        hidden_channels: int = 256,
        box_loss: Callable[[Tensor, Tensor], Tensor] = iou_loss,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        """
        Args:
            num_classes: K, the label of background.
            channels: C of the levels.
            num_levels: L.
            max_iter: iterations of the training, of which ``soft_start`` is a share.
            options: by default the paper's method.
            hidden_channels: of the feature-selection network.
            box_loss: ``(boxes, gt_boxes) -> losses``, as in the box's loss term.
            alpha: of the focal loss, as in the class's loss term.
            gamma: the same.
        """
        super().__init__()
        if not callable(box_loss):
            raise TypeError(f"assigner.box_loss must be callable, such as iou_loss: {box_loss!r}")
        if max_iter < 1:
            raise ValueError(
                f"assigner.max_iter is {max_iter}; wanted are the iterations of the training, as "
                "${train.max_iter}"
            )
        self.options = options = options or SAPDOptions()
        if options.top_k > num_levels:
            raise ValueError(
                f"SAPDOptions.top_k is {options.top_k}, and there are {num_levels} levels; set "
                f"assigner.options.top_k={num_levels} at most"
            )
        self.num_classes, self.max_iter = num_classes, max_iter
        self.box_loss, self.alpha, self.gamma = box_loss, float(alpha), float(gamma)
        self.feature_selection = (
            FeatureSelectionNet(
                channels=channels, num_levels=num_levels, hidden_channels=hidden_channels
            )
            if options.has_selection
            else None
        )

    def is_soft(self) -> bool:
        """Whether levels are selected softly now (section 3.3: in the second half).

        By the iteration that Detectron2's event storage tells, which counts steps, not batches, and
        goes on where a resumed training does. Without a storage, outside of a trainer, it is the
        first one. With a length of 90,000 and ``soft_start`` 0.5, 45,000 is the first soft one.
        """
        if not self.options.use_soft_levels or self.options.soft_start >= 1:
            return False
        try:
            iteration = get_event_storage().iter
        except AssertionError:  # as Detectron2 says that there is none
            iteration = 0
        # Rounded, for 0.07 * 100 is more than 7.
        return iteration >= math.ceil(round(self.options.soft_start * self.max_iter, 6))

    def forward(
        self,
        features: Sequence[Tensor],
        predictions: DensePredictions,
        gt_instances: Sequence[Instances],
    ) -> DenseTargets:
        """Targets of all predictions (section 3.4, Eqs. 3 to 6).

        A positive's weight, of all its classes and its box, is the soft centerness times its
        level's weight; both normalisers are the sum of these. ``cls_weights`` are (N, R, K) where
        options ignore single classes. ``extras`` has ``gt_index`` (N, R), the matched box in its
        own image, -1 without one; ``level_weights`` (G, L), 0 where an object is not learned;
        ``best_levels`` (G,); and with a feature-selection network ``level_logits`` (G, L) and
        ``select_normalizer``. Of these only the logits have a gradient, if not otherwise said.
        """
        truth = stack_ground_truth(gt_instances)
        truth = truth._replace(boxes=truth.boxes.to(predictions.boxes.dtype))
        levels = read_levels(predictions, [map_size(x) for x in features])
        extras: dict[str, Any] = {}
        logits = None
        if self.feature_selection is not None:
            logits = self.feature_selection(features, list(levels.stride[:, 0]), truth)
            number = loss_normalizer(logits.new_full((), len(logits)))
            extras.update(level_logits=logits, select_normalizer=number)
        regions = self._regions(predictions, truth, levels)
        best, chosen = self._choose(predictions, truth, regions)
        level_weights = self._level_weights(logits, chosen, truth.boxes.dtype)

        shape = (len(gt_instances), len(predictions.locations))
        matched = smallest_claim(regions.pairs, chosen, truth.boxes, math.prod(shape)).view(shape)
        labels, boxes = matched_truth(matched, truth, self.num_classes, truth.boxes.dtype)
        positive = foreground(labels, self.num_classes)
        weights = self._weights(predictions, boxes, matched, level_weights)
        cls_weights = torch.where(positive, weights, 1)[..., None]
        box_weights = torch.where(positive, weights, 0)
        normalizer = loss_normalizer(box_weights.sum())
        if self.options.unselected == "ignore_all":
            unused = marked(regions.pairs, ~chosen, 0, 1, math.prod(shape))
            labels = torch.where(unused.view(shape) & ~positive, -1, labels)
        if regions.ring is not None or self.options.unselected == "ignore_class":
            cost_nothing = self._ignored_classes(regions, chosen, truth.classes, labels)
            cls_weights = torch.where(cost_nothing, 0, cls_weights)
        extras.update(
            gt_index=index_in_image(matched, truth), level_weights=level_weights, best_levels=best
        )
        return DenseTargets(
            labels=labels,
            boxes=boxes,
            cls_weights=cls_weights,
            box_weights=box_weights,
            quality=None,
            cls_normalizer=normalizer,
            box_normalizer=normalizer,
            extras=extras,
        )

    def _regions(
        self, predictions: DensePredictions, truth: GroundTruth, levels: Levels
    ) -> Regions:
        options, cells_in = self.options, _RULES[self.options.positive_rule]
        count, image_index = len(predictions.locations), truth.image_index
        cells = cells_in(enlarged(truth.boxes, options.shrink), levels)
        cells = with_one(cells, truth.boxes, levels)
        pairs, ring = RegionPairs(cells, levels, image_index, count), None
        if options.ignore_scale is not None:
            larger = cells_in(enlarged(truth.boxes, options.ignore_scale), levels)
            ring = RegionPairs(larger, levels, image_index, count)
        return Regions(cells, pairs, ring)

    @torch.no_grad()
    def _choose(
        self, predictions: DensePredictions, truth: GroundTruth, regions: Regions
    ) -> tuple[Tensor, Tensor]:
        """(G,) best level of each object, (G, L) on which levels it is learned."""
        losses = self._instance_losses(predictions, truth, regions)
        order = losses.argsort(dim=1, stable=True)
        kept = order[:, : self.options.top_k if self.is_soft() else 1]
        chosen = torch.zeros_like(order, dtype=torch.bool).scatter_(1, kept, True)
        return order[:, 0], chosen

    def _instance_losses(
        self, predictions: DensePredictions, truth: GroundTruth, regions: Regions
    ) -> Tensor:
        """(G, L) mean loss of each object's cells on each level; infinite where it is NaN."""
        logits, boxes = predictions.logits, predictions.boxes.flatten(0, 1)
        none = torch.full_like(logits[..., 0], -1, dtype=torch.long)
        background = sigmoid_focal_loss(logits, none, self.alpha, self.gamma).sum(-1).flatten()
        counts = regions.cells.numbers()
        sums = boxes.new_zeros(counts.numel())
        for pairs in regions.pairs:
            # All classes as background, but the object's own as what it is.
            own = logits.flatten(0, 1)[pairs.location, truth.classes[pairs.box]][:, None]
            with_class, without = (
                sigmoid_focal_loss(
                    own, torch.full_like(pairs.location, label), self.alpha, self.gamma
                )[:, 0]
                for label in (0, -1)
            )
            losses = background[pairs.location] - without + with_class
            losses = losses + self.box_loss(boxes[pairs.location], truth.boxes[pairs.box])
            sums.index_add_(0, pairs.group, losses)
        means = sums.view_as(counts) / counts
        return torch.where(means.isnan(), torch.inf, means)

    def _level_weights(self, logits: Tensor | None, chosen: Tensor, dtype: torch.dtype) -> Tensor:
        """(G, L) what each object's levels count; 1 for the only one while selection is hard."""
        if logits is None or not self.is_soft():
            return chosen.to(dtype)
        if self.options.detach_level_weights:
            logits = logits.detach()
        weights = torch.where(chosen, logits.softmax(1).to(dtype), 0)
        if self.options.renormalize_levels:
            weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
        return weights

    def _weights(
        self,
        predictions: DensePredictions,
        boxes: Tensor,
        matched: Tensor,
        level_weights: Tensor,
    ) -> Tensor:
        """(N, R) what each location counts if it is a positive (Eqs. 4 and 5)."""
        sizes = predictions.level_sizes
        level = [torch.full_like(matched[0, :n], index) for index, n in enumerate(sizes)]
        weights = F.pad(level_weights, (0, 0, 0, 1))[matched, torch.cat(level)]
        if not self.options.use_soft_weights:
            return weights
        distances = boxes_to_distances(predictions.locations, boxes)
        return weights * soft_centerness(distances, self.options.exponent)

    def _ignored_classes(
        self, regions: Regions, chosen: Tensor, classes: Tensor, labels: Tensor
    ) -> Tensor:
        """(N, R, K) whether a class costs nothing; the class that a location learns never does."""
        shape = (*labels.shape, self.num_classes)
        ignored = torch.zeros(shape, dtype=torch.bool, device=labels.device)
        if self.options.unselected == "ignore_class":
            size = (self.num_classes, math.prod(shape))
            ignored |= marked(regions.pairs, ~chosen, classes, *size).view(shape)
        if regions.ring is not None:
            near = chosen.clone()
            near[:, 1:] |= chosen[:, :-1]
            near[:, :-1] |= chosen[:, 1:]
            size = (self.num_classes, math.prod(shape))
            ignored |= marked(regions.ring, near, classes, *size, regions.cells).view(shape)
        own = labels[..., None] == torch.arange(self.num_classes, device=labels.device)
        return ignored & ~own
