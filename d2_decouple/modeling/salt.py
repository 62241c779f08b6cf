# SPDX-License-Identifier: Apache-2.0
"""SALT-Net (Yang et al., "Rethinking the Misalignment Problem in Dense Object Detection", ECML-PKDD
2022): each task reads its features at points of its own.

A coarse box is predicted at each cell. The final box is predicted from what is read at points on
and inside of it, the class from what is read at those points moved, and coarse boxes learn from
final ones (SDR). Details that the paper leaves open are those of the authors' code, which has no
SDR.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layers.boxes import paired_overlaps
from ..layers.losses import generalized_iou_loss
from ..layers.points import Grid, distances_to_boxes
from ..layers.tower import conv_tower, init_conv
from ..structures import DensePredictions, DenseTargets, foreground
from .dynamic_points import SIDES
from .point_alignment import (
    Norm,
    PointAlignment,
    check_channels,
    float32_rows,
    points_in_pixels,
)
from .selection import coarse_boxes
from .soft_weights import positive_weights

__all__ = [
    "SALT",
    "AlignedPoints",
    "SALTOptions",
    "SelfDistillationTerm",
    "boundary_aware_points",
]

# Of the logarithm of a class point's distance over its box point's. Only a box point nearer to its
# cell than rounding can tell, 1e-12 cells, would come back into a map from beyond this.
_LARGEST_VECTOR = 32.0


def _scaled(vectors: Tensor, points: Tensor) -> Tensor:
    return vectors.clamp(max=_LARGEST_VECTOR).exp() * points


_STRATEGIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": _scaled,
    "sum": torch.add,
    "free": lambda vectors, points: vectors,
}


@dataclass(frozen=True, kw_only=True)
class SALTOptions:
    """What the paper compares (Tables 1 and 2), and one way to begin.

    Attributes:
        class_points: where classes are read, from vectors D that the class branch predicts and the
            points r of the box branch: "product", exp(D) * r (Eq. 5); "sum", D + r (Eq. 6);
            "free", D alone; or "box", r itself, and no D is predicted.
        use_skip: P_l is added to the class tower's output.
        coarse_bias: cells that the sides of coarse boxes begin with. The authors' 0 leaves about
            half of them without a gradient, under the ReLU.
    """

    class_points: str = "product"
    use_skip: bool = True
    coarse_bias: float = 0.0

    def __post_init__(self) -> None:
        kinds = (*_STRATEGIES, "box")
        if self.class_points not in kinds:
            raise ValueError(
                f"SALTOptions.class_points is {self.class_points!r}; wanted is one of {kinds}"
            )
        if not 0 <= self.coarse_bias < math.inf:
            raise ValueError(
                f"SALTOptions.coarse_bias is {self.coarse_bias}; wanted are cells, from 0"
            )


class AlignedPoints(NamedTuple):
    """What one level's alignment was made from; coordinates in cells, relative to each cell.

    Attributes:
        distances: (N, H, W, 4) of the coarse box's left, top, right and bottom side.
        fractions: (N, H, W, 2P - 4) that place the points on it.
        box_points: (N, H, W, P, 2) where boxes are read, (x, y).
        class_points: (N, H, W, P, 2) where classes are read, (x, y).
    """

    distances: Tensor
    fractions: Tensor
    box_points: Tensor
    class_points: Tensor


def boundary_aware_points(distances: Tensor, fractions: Tensor) -> Tensor:
    """Points on and inside the box of some distances (Sec. 3.1, Eqs. 2 and 3).

    The first four lie on the left, top, right and bottom side, so one fraction of each is known:
    0 or 1. The others lie anywhere inside. The authors' order of points and axes is another one.

    Args:
        distances: (..., 4) left, top, right, bottom, in cells.
        fractions: (..., 2P - 4) in [0, 1]: left's y, top's x, right's y, bottom's x, then (x, y) of
            each other point.

    Returns:
        (..., P, 2) points (x, y) in cells, relative to where the distances are measured from.
    """
    corner, size = -distances[..., :2], distances[..., :2] + distances[..., 2:]
    left_y, top_x, right_y, bottom_x = fractions[..., :SIDES].unbind(-1)
    low, high = torch.zeros_like(left_y), torch.ones_like(left_y)
    extremes = torch.stack((low, left_y, top_x, low, high, right_y, bottom_x, high), dim=-1)
    shares = torch.cat((extremes, fractions[..., SIDES:]), dim=-1).unflatten(-1, (-1, 2))
    return corner[..., None, :] + size[..., None, :] * shares


class SALT(nn.Module):
    """The aligner that lets boxes and classes be read at points of their own (Sec. 3.1 to 3.3).

    Coordinates are float32 from the coarse distances on, whatever autocast says.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_levels: int,
        num_points: int = 9,
        norm: Norm = "GN",
        options: SALTOptions = SALTOptions(),
    ) -> None:
        """
        Args:
            channels: C of the pyramid, and of the ends of both towers.
            num_levels: L; each level has a learned factor on its coarse distances.
            num_points: P of each task: four extremes, and any number inside the coarse box.
            norm: normalisation behind each convolution.
            options: variants that the paper compares.
        """
        super().__init__()
        if type(num_points) is not int or num_points < SIDES:
            raise ValueError(
                f"aligner.num_points is {num_points}; wanted are {SIDES} or more, one on each side "
                "of a box at least, such as 9"
            )
        self.channels, self.num_points, self.options = channels, num_points, options
        self.coarse_subnet = conv_tower(in_channels=channels, conv_dims=[channels], norm=norm)
        self.coarse_pred = nn.Conv2d(channels, SIDES, 3, padding=1)
        self.fraction_pred = nn.Conv2d(channels, 2 * num_points - SIDES, 3, padding=1)
        init_conv(self.coarse_pred, bias=options.coarse_bias)
        init_conv(self.fraction_pred)
        self.scales = nn.Parameter(torch.ones(num_levels))
        self.box_align = PointAlignment(channels=channels, num_points=num_points, norm=norm)
        if options.class_points != "box":
            self.vector_subnet = conv_tower(in_channels=channels, conv_dims=[channels], norm=norm)
            self.vector_pred = nn.Conv2d(channels, 2 * num_points, 3, padding=1)
            init_conv(self.vector_pred)
        self.cls_align = PointAlignment(channels=channels, num_points=num_points, norm=norm)

    def forward(
        self, feature: Tensor, cls_feature: Tensor, box_feature: Tensor, level: int
    ) -> tuple[Tensor, Tensor, AlignedPoints]:
        """A level's P_l and tower outputs (N, C, H, W) -> class feature, box feature, points."""
        check_channels(self, self.channels, class_tower=cls_feature, box_tower=box_feature)
        if self.options.use_skip:
            check_channels(self, self.channels, pyramid=feature)
            cls_feature = cls_feature + feature
        distances, fractions = self._coarse_box(box_feature, level)
        box_points = boundary_aware_points(distances, fractions)
        class_points = self._class_points(cls_feature, box_points.detach())
        return (
            self.cls_align(cls_feature, class_points),
            self.box_align(box_feature, box_points),
            AlignedPoints(distances, fractions, box_points, class_points),
        )

    def _coarse_box(self, box_feature: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """(N, H, W, 4) distances in cells and (N, H, W, 2P - 4) fractions (Eq. 1)."""
        if level >= len(self.scales):
            raise self._misfit("more")
        hidden = self.coarse_subnet(box_feature)
        distances = float32_rows(self.coarse_pred, hidden).relu() * self.scales[level]
        return distances, float32_rows(self.fraction_pred, hidden).sigmoid()

    def _class_points(self, cls_feature: Tensor, box_points: Tensor) -> Tensor:
        """(N, H, W, P, 2) from box points without gradient (Eqs. 4 to 6; no ReLU on D)."""
        if self.options.class_points == "box":
            return box_points
        vectors = float32_rows(self.vector_pred, self.vector_subnet(cls_feature))
        strategy = _STRATEGIES[self.options.class_points]
        return strategy(vectors.unflatten(-1, (self.num_points, 2)), box_points)

    def decode(self, extras: Sequence[AlignedPoints], grid: Grid) -> dict[str, Tensor]:
        """Levels' points -> ``coarse_boxes`` (N, R, 4), ``box_points`` and ``class_points``
        (N, R, P, 2) in pixels of the padded input; the points for pictures, without gradient.
        """
        if len(extras) != len(self.scales):
            raise self._misfit(str(len(extras)))
        distances = torch.cat([level.distances.flatten(1, 2) for level in extras], dim=1)
        return {
            "coarse_boxes": distances_to_boxes(grid.locations, distances * grid.strides[:, None]),
            "box_points": points_in_pixels([level.box_points for level in extras], grid),
            "class_points": points_in_pixels([level.class_points for level in extras], grid),
        }

    def _misfit(self, found: str) -> ValueError:
        return ValueError(
            f"SALT has scales for {len(self.scales)} levels, the head predicts {found}; set "
            "model.head.aligner.num_levels to the number of model.head.strides"
        )


@dataclass(frozen=True, kw_only=True)
class SelfDistillationTerm:
    """Coarse boxes R1 learn from the final boxes R2 where these are better (SDR; Sec. 3.4, Eq. 9).

    ``y IoU(R2, G) (1 - GIoU(R1, R2))`` of each positive with ``IoU(R2, G) > IoU(R1, G)``, over
    ``box_normalizer``. All but R1 is without gradient. (The paper writes "GIoU" where it means the
    loss.) Of which class the score y is, the paper does not say, and it divides all losses by the
    number of positives; the defaults do as the authors' code does with the losses it has. Where an
    assigner weighs classes (:class:`.soft_weights.SoftWeights`, the levels of
    :class:`.ddod.DDODAssigner`), a positive's part is weighed as its class is. AutoAssign's class
    weights are those of negatives; there the prior of its location weighs it.

    Attributes:
        score: (N, R, K) scores of the predictions, those of the selection.
        weight: factor on the whole term.
        of_gt_class: y is the score of the object's class, not the best of all classes.
        per_positive: divide by ``cls_normalizer``, the number of positives (Eq. 10).
    """

    score: Callable[[DensePredictions], Tensor]
    weight: float = 1.0
    of_gt_class: bool = False
    per_positive: bool = False

    def __post_init__(self) -> None:
        if not callable(self.score):
            raise TypeError(
                f"SelfDistillationTerm.score must be callable, such as product_score, got "
                f"{self.score!r}; a callable cannot be set on the command line: set it in a config "
                "file"
            )

    def __call__(self, predictions: DensePredictions, targets: DenseTargets) -> Tensor:
        """The scalar that is added to the loss."""
        coarse, refined = coarse_boxes(predictions), predictions.boxes.detach()
        losses = generalized_iou_loss(coarse, refined)
        weights = self._confidence(predictions, targets, coarse.detach(), refined)
        total = targets.cls_normalizer if self.per_positive else targets.box_normalizer
        return self.weight * (losses * weights).sum() / total

    @torch.no_grad()
    def _confidence(
        self, predictions: DensePredictions, targets: DenseTargets, coarse: Tensor, refined: Tensor
    ) -> Tensor:
        """(N, R) y IoU(R2, G) of positives whose refined box is the better one, weighed, else 0."""
        overlaps = paired_overlaps(refined, targets.boxes)
        better = overlaps > paired_overlaps(coarse, targets.boxes)
        scores = self.score(predictions)
        positive = foreground(targets.labels, scores.shape[-1])
        if self.of_gt_class:
            labels = torch.where(positive, targets.labels, 0)
            best = scores.gather(-1, labels[..., None]).squeeze(-1)
        else:
            best = scores.amax(-1)
        weights = targets.box_weights
        if "inside" not in targets.extras:
            weights = positive_weights(targets, scores.shape[-1])
        return torch.where(positive & better, best * overlaps * weights, 0)
