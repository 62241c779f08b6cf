# SPDX-License-Identifier: Apache-2.0
"""PDNet (Yang et al., "Toward Better One-Stage Object Detection With Prediction Decoupling", TIP
2022): each side of a box, and the class, are predicted at points of their own and collected.

A coarse box is predicted at each cell. Four points on its edges say where the final box's sides
are read, and points spread over it say where the class is read. Both kinds move by offsets that
the losses behind them train. Details that the paper leaves open are those of the authors' code.
"""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from ..layers.losses import loss_normalizer
from ..layers.point_gather import dynamic_point_gather
from ..layers.points import Grid, grid_cells, squares, valid_locations
from ..layers.tower import init_conv
from ..structures import (
    DensePredictions,
    DenseTargets,
    GroundTruth,
    foreground,
    stack_ground_truth,
)
from .dynamic_points import SIDES, Points
from .head import flatten_maps, map_size, prior_bias
from .matching import (
    Levels,
    best_overlaps,
    claimed_index,
    index_in_batch,
    index_in_image,
    matched_truth,
    read_levels,
)
from .selection import coarse_boxes

__all__ = ["PDNetAssigner", "PDNetPredictor"]

_PRIOR_REACH = 2  # cells from a cell to each side of its prior box
_MIN_SIDE = 1e-6  # floor of an object's sides, in pixels


class CollectedScores(nn.Module):
    """Logits that are votes of several points, each from its own class map (Eq. 5)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((num_classes,), prior_bias()))

    def forward(self, class_maps: list[Tensor], points: list[Tensor]) -> Tensor:
        """(N, P * K, H, W) maps and (N, H * W, P, 2) points of each level -> (N, R, K)."""
        collected = [
            dynamic_point_gather(maps, _as_map(where, maps), "sum")
            for maps, where in zip(class_maps, points, strict=True)
        ]
        return flatten_maps(collected, len(self.bias)) + self.bias


class PDNetPredictor(nn.Module):
    """One box and K class logits at each cell, collected at dynamic points (sections III-B, C).

    Facts for the head: P * K class channels from a 1x1 convolution without bias, point by point.

    The final box is the coarse one plus what is read at its four points, whatever their kind. The
    coarse box learns from its own loss alone: what is built on it sees it without gradient.
    """

    class_kernel_size = 1
    class_bias = False

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        class_points: Points,
        box_points: Points,
        box_levels: Sequence[int] = (-1, 0),
    ) -> None:
        """
        Args:
            num_classes: K.
            in_channels: channels of the box tower.
            class_points: where the class is read.
            box_points: where the left, top, right and bottom side are read.
            box_levels: pyramid levels on which a side is read, relative to the cell's own: -1 is
                the next finer one. Several are mixed by predicted weights (Eq. 4); one that does
                not exist is left out, and if none does, the own level is read.
        """
        super().__init__()
        for name, points in (("class_points", class_points), ("box_points", box_points)):
            if isinstance(points, type) or not callable(points):
                raise TypeError(
                    f"predictor.{name} must be an object, such as SemanticPoints(num_points=9), "
                    f"got {points!r}"
                )
        if box_points.num_points != SIDES:
            raise ValueError(
                f"predictor.box_points has {box_points.num_points} points; wanted are {SIDES}, "
                "one for each side of a box"
            )
        levels = list(box_levels) if isinstance(box_levels, Sequence) else []
        if not levels or len(set(levels)) < len(levels) or {type(x) for x in levels} != {int}:
            raise ValueError(
                f"predictor.box_levels is {box_levels}; wanted is a list of at least one level, "
                "each a whole number and there once, such as [-1, 0]"
            )
        self.num_classes, self.in_channels = num_classes, in_channels
        self.class_outputs = class_points.num_points * num_classes
        self.class_points, self.box_points = class_points, box_points
        self.box_levels = tuple(levels)
        mixing = SIDES * len(levels) if len(levels) > 1 else 0
        self._fields = (SIDES, box_points.outputs, class_points.outputs, mixing)
        self.point_pred = nn.Conv2d(in_channels, sum(self._fields), 3, padding=1)
        self.bbox_pred = nn.Conv2d(in_channels, SIDES, 1, bias=False)
        self.cls_score = CollectedScores(num_classes)
        init_conv(self)

    def reset_class_bias(self, value: float) -> None:
        """Let every class start at this bias."""
        nn.init.constant_(self.cls_score.bias, value)

    def forward(
        self, class_maps: list[Tensor], box_features: list[Tensor], grid: Grid
    ) -> DensePredictions:
        """(N, P * K, H, W) and (N, C, H, W) maps of each level -> predictions.

        ``extras`` has ``coarse_boxes`` (N, R, 4), ``boundary_points`` (N, R, 4, 2) of the left,
        top, right and bottom side, and ``class_points`` (N, R, P, 2), all in pixels of the padded
        input, and ``box_level_weights`` (N, R, 4, L), the weight that each pyramid level has in
        what was read for a side.
        """
        fields = flatten_maps([self.point_pred(x) for x in box_features], sum(self._fields))
        residuals, slides, shifts, mixing = fields.split(self._fields, dim=-1)
        priors = torch.cat((grid.cells - _PRIOR_REACH, grid.cells + _PRIOR_REACH), dim=-1)
        coarse = priors + residuals
        base = coarse.detach()
        box_points = self.box_points(grid.cells, base, slides)
        class_points = self.class_points(grid.cells, base, shifts)
        to_pixels = _PixelFrame(grid)
        edges, level_weights = self._collect_edges(
            [self.bbox_pred(x) for x in box_features], box_points, mixing, grid, to_pixels
        )
        return DensePredictions(
            logits=self.cls_score(class_maps, list(class_points.split(grid.level_sizes, 1))),
            boxes=to_pixels(base + edges),
            quality=None,
            locations=grid.locations,
            strides=grid.strides,
            priors=squares(grid.locations, 2 * _PRIOR_REACH * grid.strides),
            level_sizes=grid.level_sizes,
            extras={
                "coarse_boxes": to_pixels(coarse),
                "boundary_points": to_pixels(box_points.detach()),
                "class_points": to_pixels(class_points.detach()),
                "box_level_weights": level_weights,
            },
        )

    def _collect_edges(
        self,
        maps: list[Tensor],
        points: Tensor,
        mixing: Tensor,
        grid: Grid,
        frame: "_PixelFrame",
    ) -> tuple[Tensor, Tensor]:
        """(N, R, 4) values in cells that are added to the base, and their levels' weights."""
        values, weights = [], []
        for level, (where, logits) in enumerate(
            zip(points.split(grid.level_sizes, 1), mixing.split(grid.level_sizes, 1), strict=True)
        ):
            wanted = [i for i, step in enumerate(self.box_levels) if 0 <= level + step < len(maps)]
            sources = [level + self.box_levels[i] for i in wanted] or [level]
            read = torch.stack(
                [self._read(maps, where, level, source, frame) for source in sources], dim=-1
            )
            weight = torch.ones_like(read)
            if len(sources) > 1:
                offered = logits.unflatten(-1, (SIDES, -1)).unbind(-1)
                weight = torch.stack([offered[i] for i in wanted], dim=-1).softmax(-1)
            values.append((weight * read).sum(-1))
            of_source = dict(zip(sources, weight.detach().unbind(-1), strict=True))
            nothing = torch.zeros_like(values[-1])
            weights.append(torch.stack([of_source.get(i, nothing) for i in range(len(maps))], -1))
        return torch.cat(values, 1), torch.cat(weights, 1)

    @staticmethod
    def _read(
        maps: list[Tensor], where: Tensor, level: int, source: int, frame: "_PixelFrame"
    ) -> Tensor:
        """(N, H * W, 4) values of another level's map at a level's points, in the latter's cells.

        On the next finer level coordinates are twice as large, and so are values in its cells.
        """
        ratio = frame.ratio(level, source)
        points = _as_map((where + frame.offset) * ratio - frame.offset, maps[level])
        return flatten_maps([dynamic_point_gather(maps[source], points)], SIDES) / ratio


class PDNetAssigner(nn.Module):
    """Coarse boxes learn the object in their cell; what overlaps an object enough is positive.

    *Coarse* (section III-E, Eq. 7): the cell nearest to an object's middle, on the level of its
    size, learns it. *Final*: every prediction of every level whose coarse box overlaps an object
    by ``iou_threshold`` or more learns the one that it overlaps most; beside them each object gets
    the predictions that overlap it most of all, however little (the authors' code; not in the
    paper). An object that no coarse box touches has none.

    Cells in an image's own padding are ignored. They take part before that, as in the authors'
    code, so they may hold an object's best box.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        iou_threshold: float = 0.6,
        size_divisor: int = 32,
        side_offset: float = 0.0,
    ) -> None:
        """
        Args:
            num_classes: K, the label of background.
            iou_threshold: least overlap of a coarse box with an object.
            size_divisor: images are padded to multiples of it, in pixels.
            side_offset: what a side of a box has beside x2 - x1: 0 pixels, or 1 where x2 and y2
                are the last pixels inside (the authors' weights).
        """
        super().__init__()
        if not 0 < iou_threshold <= 1:
            raise ValueError(
                f"assigner.iou_threshold is {iou_threshold}; wanted is an overlap above 0, at most "
                "1, such as 0.6"
            )
        if size_divisor < 1:
            raise ValueError(f"assigner.size_divisor is {size_divisor}; wanted are pixels, from 1")
        self.num_classes, self.iou_threshold = num_classes, iou_threshold
        self.size_divisor, self.side_offset = size_divisor, side_offset

    @torch.no_grad()
    def forward(
        self,
        features: Sequence[Tensor],
        predictions: DensePredictions,
        gt_instances: Sequence[Instances],
    ) -> DenseTargets:
        """Targets of all predictions; ``features`` only tells the levels' sizes.

        ``extras["coarse"]`` are the targets of ``predictions.extras["coarse_boxes"]``. Both have
        ``extras["gt_index"]`` (N, R), the matched box in its own image, -1 without one.
        """
        truth = stack_ground_truth(gt_instances)
        truth = truth._replace(boxes=truth.boxes.to(predictions.boxes.dtype))
        sizes = [map_size(x) for x in features]
        valid = valid_locations(
            predictions.locations,
            predictions.strides,
            [x.image_size for x in gt_instances],
            self.size_divisor,
        )
        coarse = self._targets(
            self._nearest_cells(truth, predictions, sizes, len(gt_instances)), truth, valid
        )
        final = self._targets(self._overlapping(truth, predictions), truth, valid)
        return final._replace(extras={**final.extras, "coarse": coarse})

    def _targets(self, matched: Tensor, truth: GroundTruth, valid: Tensor) -> DenseTargets:
        """Targets from (N, R) indices among all G boxes, G where there is none."""
        matched = torch.where(valid, matched, len(truth.boxes))
        labels, boxes = matched_truth(matched, truth, self.num_classes, truth.boxes.dtype)
        labels = torch.where(valid, labels, -1)
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

    def _nearest_cells(
        self,
        truth: GroundTruth,
        predictions: DensePredictions,
        sizes: Sequence[tuple[int, int]],
        num_images: int,
    ) -> Tensor:
        """(N, R) index of the object whose middle is nearest, on the level of its size, else G."""
        levels = read_levels(predictions, sizes)
        shape = (num_images, sum(predictions.level_sizes))
        count, total = len(truth.boxes), math.prod(shape)
        middle, sides = (truth.boxes[:, :2] + truth.boxes[:, 2:]) / 2, self._sides(truth.boxes)
        limits = (8 * levels.stride[:-1, 0]).square()
        level = (sides.prod(-1)[:, None] >= limits).sum(1)  # an object has 4 to 8 strides
        own = Levels(*(x[level] for x in levels))
        stride = own.stride[:, None]
        at = (middle - own.origin)[:, None] / stride  # (G, 1, 2) cells
        # A middle halfway between two cells has both: two candidates in x, and two in y.
        steps = grid_cells((2, 2), device=at.device, dtype=at.dtype)
        cells = (at - 0.5).ceil() + steps  # (G, 4, 2)
        claim = ((cells - at).abs() <= 0.5).all(-1)
        index = claimed_index(cells, claim, own, truth.image_index, shape)
        # Of several objects the one whose middle is nearest, in shares of its sides, has the cell.
        shares = (cells - at) * stride / sides.clamp(min=_MIN_SIDE)[:, None]
        distance = shares.norm(dim=-1)
        nearest = distance.new_full((total + 1,), torch.inf)
        nearest.scatter_reduce_(0, index.flatten(), distance.flatten(), "amin")
        index = torch.where(distance == nearest[index], index, total)
        objects = torch.arange(count, device=index.device)[:, None].expand_as(index)
        matched = index.new_full((total + 1,), count)
        matched.scatter_reduce_(0, index.flatten(), objects.flatten(), "amin")
        return matched[:total].view(shape)

    def _overlapping(self, truth: GroundTruth, predictions: DensePredictions) -> Tensor:
        """(N, R) index of the object that each prediction learns, G where there is none."""
        coarse = coarse_boxes(predictions).detach()
        rows = [
            self._best_object(boxes, gt_boxes)
            for boxes, gt_boxes in zip(coarse, truth.boxes.split(truth.counts), strict=True)
        ]
        return index_in_batch(torch.stack(rows), truth)

    def _best_object(self, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
        """(R,) index among the (M, 4) objects of one image, -1 where there is none."""
        best = best_overlaps(boxes, gt_boxes, self.side_offset)
        index = torch.where(best.overlap >= self.iou_threshold, best.matched, -1)
        # Above zero, or an object that nothing overlaps would have every prediction.
        return torch.where(best.top_overlap > 0, best.top_matched, index)

    def _sides(self, boxes: Tensor) -> Tensor:
        """(..., 2) width and height of (..., 4) boxes."""
        return boxes[..., 2:] - boxes[..., :2] + self.side_offset


class _PixelFrame:
    """Cells of a grid's levels <-> pixels of the padded input."""

    def __init__(self, grid: Grid) -> None:
        self._strides = grid.strides
        self._firsts = [0, *accumulate(grid.level_sizes)]
        self.offset = grid.locations[0] / grid.strides[0] - grid.cells[0]  # (2,) cells

    def __call__(self, cells: Tensor) -> Tensor:
        """(N, R, ..., 2 or 4) cells of each prediction's own level -> pixels."""
        strides = self._strides.view(-1, *[1] * (cells.dim() - 2))
        return (cells + self.offset.repeat(cells.shape[-1] // 2)) * strides

    def ratio(self, level: int, source: int) -> Tensor:
        """Cells of level ``source`` per cell of ``level``."""
        return self._strides[self._firsts[level]] / self._strides[self._firsts[source]]


def _as_map(points: Tensor, like: Tensor) -> Tensor:
    """(N, H * W, P, 2) -> (N, P, 2, H, W) of the size of a map, without a copy."""
    return points.unflatten(1, map_size(like)).permute(0, 3, 4, 1, 2)
