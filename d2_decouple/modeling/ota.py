# SPDX-License-Identifier: Apache-2.0
"""The host OTA (Ge et al., CVPR 2021): which location learns which object is a transport problem.

Objects and the background supply labels, locations each want one, and a label costs what the
location would lose by it. The cheapest plan is looked for over all objects of an image together.
The network is FCOS's, whose ``quality`` learns the predicted boxes' IoU here. Details that the
paper leaves open are those of the authors' code; so is the place of a location: a cell stands for
its corner, and the recipe's ``offset`` is 0.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from torch import Tensor, nn

from ..layers.boxes import paired_overlaps
from ..layers.losses import loss_normalizer, sigmoid_focal_loss
from ..layers.points import boxes_to_distances, valid_locations
from ..structures import (
    DensePredictions,
    DenseTargets,
    GroundTruth,
    foreground,
    stack_ground_truth,
)
from .atss import best_claim
from .head import map_size
from .matching import (
    central_cells,
    claimed_index,
    index_in_image,
    matched_truth,
    read_levels,
)

__all__ = ["OTAAssigner", "Transport", "claimed_by_plan", "dynamic_k", "transport_plan"]

_MIN_DISTANCE = 0.01  # pixels that a candidate lies inside its object
_MIN_IOU = torch.finfo(torch.float32).eps  # in the logarithm of the box's cost


class Transport(NamedTuple):
    """The transport problems of a batch's N images, with G objects and S candidates of each.

    Only candidates are held, at most 49 of each level: everywhere else an object's cost is
    infinite, so the plan is that of all objects, the background and all R locations.

    Attributes:
        candidates: (G, S) indices among all N * R predictions, N * R where there is none.
        costs: (G, S) of a label from an object; not looked at where there is no candidate.
        supplies: (G,) labels that each object gives; 0 without a candidate.
        image_index: (G,) image of each object.
        background: (N, R) cost of a label from the background.
        valid: (N, R) locations that want a label.
    """

    candidates: Tensor
    costs: Tensor
    supplies: Tensor
    image_index: Tensor
    background: Tensor
    valid: Tensor

    def exists(self) -> Tensor:
        """(G, S) whether there is a candidate."""
        return self.candidates < self.valid.numel()


def dynamic_k(overlaps: Tensor, exists: Tensor, topk: int) -> Tensor:
    """(G,) labels each object supplies: the sum of its best IoUs, rounded down ("Dynamic k").

    One at least, but none without a candidate (section 3.3).

    Args:
        overlaps: (G, S) IoU of the predicted boxes with the object.
        exists: (G, S) whether there is such a candidate.
        topk: how many are summed at most.
    """
    best = torch.where(exists, overlaps, 0).topk(min(topk, overlaps.shape[1]), dim=1).values
    return best.sum(1).floor().clamp(min=1) * exists.any(1)


def transport_plan(problem: Transport, *, eps: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Logarithms of the plan's (G, S) labels from objects and (N, R) from the background.

    Sinkhorn's iteration in logarithms (section 3.1): first every location gets its one
    label, then every object, and the background, gives what it has. Minus infinity stands where
    there is no candidate, and where a location is not valid. Where objects have more than an image
    can take, the background still gives one label.

    Args:
        problem: of the batch.
        eps: what the plan's entropy counts, in the costs' unit.
        iterations: how many; a fixed number, as nothing shall be asked from the device.
    """
    index, exists = problem.candidates, problem.exists()
    gains = torch.where(exists, -problem.costs / eps, -torch.inf)
    rest = -problem.background / eps
    valid_rest = torch.where(problem.valid, rest, -torch.inf)
    given = gains.new_zeros(len(rest)).index_add_(0, problem.image_index, problem.supplies)
    log_rest = (problem.valid.sum(1) - given).clamp(min=1).log()[:, None]
    log_supplies = problem.supplies.log()[:, None]
    has_any = exists.any(1, keepdim=True)
    rows, rest_row = torch.zeros_like(log_supplies), torch.zeros_like(log_rest)
    columns, at_candidates, at_rest = rest, gains, valid_rest
    for _ in range(iterations):
        sums = _log_sums(F.pad((rest_row + rest).flatten(), (0, 1)), rows + gains, index)
        columns = -sums
        at_candidates = gains + columns[index]
        at_rest = valid_rest + columns[:-1].view_as(rest)
        rows = log_supplies - at_candidates.logsumexp(1, keepdim=True)
        rows = torch.where(has_any, rows, 0)
        rest_row = log_rest - at_rest.logsumexp(1, keepdim=True)
    return rows + at_candidates, rest_row + at_rest


def _log_sums(first: Tensor, others: Tensor, index: Tensor) -> Tensor:
    """(T,) logarithm of the sum of the exponentials of ``first`` (T,) and of those of ``others``
    (G, S) that ``index`` (G, S) sends to each place.
    """
    index, others = index.flatten(), others.flatten()
    top = first.scatter_reduce(0, index, others, "amax")
    sums = (first - top).exp().index_add(0, index, (others - top[index]).exp())
    return top + sums.log()


def claimed_by_plan(problem: Transport, labels: Tensor, background: Tensor) -> Tensor:
    """(N, R) object among all G of the batch that each location learns, G for the background.

    The plan is measured in shares of the most that an object, or an image's background, gives to
    any one location, as in the authors' code: what an object likes best it gets, unless another
    object likes it as much. The paper compares the plan itself. Of equal shares the first
    object's counts, and the background's last.

    Args:
        problem: of the batch.
        labels: (G, S) logarithms of the plan (:func:`transport_plan`).
        background: (N, R) the same of the background.
    """
    total, exists = background.numel(), problem.exists()
    shares = labels - labels.amax(1, keepdim=True)
    rest = background - background.amax(1, keepdim=True)
    greatest = F.pad(rest.flatten(), (0, 1))
    values = torch.where(exists, shares, -torch.inf)
    greatest = greatest.scatter_reduce(0, problem.candidates.flatten(), values.flatten(), "amax")
    claim = exists & (values == greatest[problem.candidates])
    return best_claim(problem.candidates, claim.to(labels.dtype), claim, total).view_as(background)


class OTAAssigner(nn.Module):
    """Locations near the middle of an object, of all levels, learn what the cheapest plan says.

    Candidates of an object lie inside it, less than ``radius`` strides from its middle in x and in
    y. What is no candidate has an infinite cost; in the authors' code a million is added, so that
    an object that no location lies in is learned somewhere outside, and here it is not learned.
    The cost is the focal loss of all classes plus ``box_cost`` times ``-log IoU`` (section
    3.2); the background's is the focal loss without any class.

    All boxes of a batch are matched at once. Time and memory grow with the number of boxes, not
    with boxes times cells, and nothing asks the device for a number. Cells in an image's own
    padding are ignored, want no label and are never candidates.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        radius: float = 2.5,
        box_cost: float = 1.5,
        topk: int = 20,
        eps: float = 0.1,
        iterations: int = 50,
        alpha: float = 0.25,
        gamma: float = 2.0,
        size_divisor: int = 32,
    ) -> None:
        """
        Args:
            num_classes: K, the label of background.
            radius: of the central region, in strides.
            box_cost: factor on the box's share of the cost.
            topk: IoUs that are summed for the number of an object's labels.
            eps: what the plan's entropy counts, in the costs' unit.
            iterations: of Sinkhorn's.
            alpha: of the focal loss, as in the class's loss term.
            gamma: the same.
            size_divisor: images are padded to multiples of it, in pixels.
        """
        super().__init__()
        _check_positive(radius=(radius, 2.5), box_cost=(box_cost, 1.5), eps=(eps, 0.1))
        _check_whole(topk=(topk, 20), iterations=(iterations, 50), size_divisor=(size_divisor, 32))
        self.num_classes, self.size_divisor = num_classes, size_divisor
        self.radius, self.box_cost, self.topk = float(radius), float(box_cost), topk
        self.eps, self.iterations = float(eps), iterations
        self.alpha, self.gamma = alpha, gamma

    @torch.no_grad()
    def forward(
        self,
        features: Sequence[Tensor],
        predictions: DensePredictions,
        gt_instances: Sequence[Instances],
    ) -> DenseTargets:
        """Targets of all predictions; ``features`` only tells the levels' sizes.

        ``quality`` is the IoU of the predicted box with its object. Every positive's box counts
        the same; in the authors' code it counts by that IoU. ``extras`` has ``gt_index`` (N, R),
        the matched box in its own image, -1 without one, and ``supplies`` (G,), how many labels
        each of the batch's boxes had to give.
        """
        truth = stack_ground_truth(gt_instances)
        truth = truth._replace(boxes=truth.boxes.to(predictions.boxes.dtype))
        image_sizes = [x.image_size for x in gt_instances]
        valid = valid_locations(
            predictions.locations, predictions.strides, image_sizes, self.size_divisor
        )
        index = self._candidates(predictions, truth, [map_size(x) for x in features], valid)
        problem = self._problem(predictions, truth, index, valid)
        plan = transport_plan(problem, eps=self.eps, iterations=self.iterations)
        matched = claimed_by_plan(problem, *plan)
        labels, boxes = matched_truth(matched, truth, self.num_classes, truth.boxes.dtype)
        labels = torch.where(valid, labels, -1)
        positive = foreground(labels, self.num_classes)
        weights = positive.to(boxes.dtype)
        normalizer = loss_normalizer(weights.sum())
        return DenseTargets(
            labels=labels,
            boxes=boxes,
            cls_weights=torch.ones_like(weights)[..., None],
            box_weights=weights,
            quality=weights * paired_overlaps(predictions.boxes, boxes),
            cls_normalizer=normalizer,
            box_normalizer=normalizer,
            extras={"gt_index": index_in_image(matched, truth), "supplies": problem.supplies},
        )

    def _candidates(
        self,
        predictions: DensePredictions,
        truth: GroundTruth,
        sizes: Sequence[tuple[int, int]],
        valid: Tensor,
    ) -> Tensor:
        """(G, S) indices among all N * R predictions, N * R where there is none."""
        levels = read_levels(predictions, sizes)
        boxes = truth.boxes[:, None, None]  # (G, 1, 1, 4)
        cells, locations, near = central_cells(truth.boxes, levels, self.radius)
        claim = near & (boxes_to_distances(locations, boxes).amin(-1) > _MIN_DISTANCE)
        shape = (valid.shape[0], valid.shape[1])
        index = claimed_index(cells, claim, levels, truth.image_index, shape).flatten(1)
        return torch.where(F.pad(valid.flatten(), (0, 1))[index], index, valid.numel())

    def _problem(
        self, predictions: DensePredictions, truth: GroundTruth, index: Tensor, valid: Tensor
    ) -> Transport:
        """What each label costs, and how many each object supplies."""
        logits, boxes = predictions.logits, predictions.boxes.flatten(0, 1)
        none = torch.full_like(logits[..., 0], -1, dtype=torch.long)
        background = sigmoid_focal_loss(logits, none, self.alpha, self.gamma).sum(-1)
        exists = index < valid.numel()
        known = index.clamp(max=valid.numel() - 1)
        own = logits.flatten(0, 1)[known, truth.classes[:, None]][..., None]  # (G, S, 1)
        with_class, without = (
            sigmoid_focal_loss(own, torch.full_like(known, label), self.alpha, self.gamma)[..., 0]
            for label in (0, -1)
        )
        overlaps = paired_overlaps(boxes[known], truth.boxes[:, None])
        costs = background.flatten()[known] - without + with_class
        return Transport(
            candidates=index,
            costs=costs - self.box_cost * overlaps.clamp(min=_MIN_IOU).log(),
            supplies=dynamic_k(overlaps, exists, self.topk),
            image_index=truth.image_index,
            background=background,
            valid=valid,
        )


def _check_positive(**numbers: tuple[float, float]) -> None:
    for name, (value, like) in numbers.items():
        if not 0 < value < math.inf:
            raise ValueError(
                f"assigner.{name} is {value}; wanted is a positive number, such as {like}"
            )


def _check_whole(**numbers: tuple[int, int]) -> None:
    for name, (value, like) in numbers.items():
        if value < 1:
            raise ValueError(
                f"assigner.{name} is {value}; wanted is a whole number from 1, such as {like}"
            )
