# SPDX-License-Identifier: Apache-2.0
"""PDNet's three losses: the fact sheet's golden numbers, and against plain loops."""

from typing import Any, NamedTuple

import pytest
import torch
from pdnet_loops import cells_of, coarse_matches, final_matches, focal_cost, giou_cost
from pdnet_parts import STRIDES
from pdnet_scenes import K, Size, instances, level_sizes, predictions_of
from torch import Tensor

from d2_decouple.layers.losses import generalized_iou_loss
from d2_decouple.modeling import (
    FocalTerm,
    GIoUTerm,
    PDNetAssigner,
    coarse_boxes,
    coarse_targets,
)
from d2_decouple.structures import DensePredictions, DenseTargets, foreground

TERMS: dict[str, Any] = {
    "loss_cls": FocalTerm(),
    "loss_box_coarse": GIoUTerm(
        weight=0.5, smoothing=1.0, boxes=coarse_boxes, targets=coarse_targets
    ),
    "loss_box_reg": GIoUTerm(weight=2.0, smoothing=1.0),
}


class Golden(NamedTuple):
    """A row of the fact sheet's table 9.3."""

    box: list[float]  # legacy xyxy
    coarse: int  # positives of the coarse boxes
    final: int  # positives of the final boxes
    losses: list[float]  # class, coarse, final
    size: Size = (800, 1333)
    ignored: int = 0


# The authors' code on one object: every predicted box is its prior, every logit -4.595, one image
# in 800x1344. The first row by hand: the object is 64x64 with legacy counting, so P4, and its
# middle 131.5 is 8.2 cells. The prior of cell (8, 8), (96, 96, 160, 160), is 65x65 and shares
# 61 * 61 = 3721 of 65^2 + 64^2 - 3721 = 4600: 0.81. The priors of (9, 8) and (8, 9) share
# 52 * 61 of 5149, 0.62; that of (9, 9) shares 52 * 52 of 5617, 0.48. So one coarse positive and
# three final ones. Its coarse loss: without the +1, areas are 63^2 and 64^2, 60^2 is shared; so
# 3601 / 4466 is the overlap, (67^2 - 4465) / 67^2 of the hull is empty; half of
# 1 - 0.8063 + 0.0053 = 0.1990 is 0.0995.
TABLE = [
    Golden([100, 100, 163, 163], 1, 3, [1.5788, 0.0995, 0.6735]),
    Golden([100, 100, 131, 131], 1, 3, [1.5788, 0.1833, 0.7899]),
    Golden([101, 103, 151, 203], 1, 2, [1.8040, 0.2680, 1.0719]),
    Golden([100, 100, 500, 420], 1, 2, [1.8040, 0.2440, 0.9760]),
    Golden([1310, 780, 1330, 798], 1, 2, [1.8040, 0.3239, 1.2956]),
    Golden([100, 100, 107, 107], 1, 9, [1.2785, 0.4756, 1.9024]),
    Golden([1332, 799, 1332, 799], 0, 6, [1.3536, 0.0, 1.9980]),
    Golden([100, 100, 163, 163], 1, 3, [1.3322, 0.0995, 0.6735], (608, 800), 12260),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.box} in {row.size}")
def test_golden_table(row: Golden, dtype: torch.dtype) -> None:
    padded, classes = (800, 1344), 80
    predictions = predictions_of(padded, dtype=dtype)
    count = predictions.logits.shape[1]
    assert count == 22400
    logits = torch.full((1, count, classes), -4.595, dtype=dtype)
    predictions = predictions._replace(logits=logits)
    assigner = PDNetAssigner(num_classes=classes, side_offset=1.0)
    features = [torch.zeros(1, 0, *size) for size in level_sizes(padded)]
    targets = assigner(features, predictions, [instances(row.size, [row.box], [0])])
    coarse = coarse_targets(targets)
    assert foreground(coarse.labels, classes).sum() == row.coarse
    assert foreground(targets.labels, classes).sum() == row.final
    assert (targets.labels == -1).sum() == (coarse.labels == -1).sum() == row.ignored
    losses = [term(predictions, targets).item() for term in TERMS.values()]
    assert losses == pytest.approx(row.losses, rel=0, abs=0.6e-4)


def random_scene(dtype: torch.dtype) -> tuple[DensePredictions, list[Any], list[Any]]:
    """Two images with boxes near the priors and logits of all sizes, ready for gradients."""
    padded, truth = (128, 160), []
    objects = [[[10.5, 8.25, 75, 70], [60, 50, 110, 100], [90, 20, 95, 30]], [[20, 30, 100, 90]]]
    sizes = [(128, 160), (90, 130)]
    for size, boxes in zip(sizes, objects, strict=True):
        truth.append(instances(size, boxes, [index % K for index in range(len(boxes))]))
    priors = predictions_of(padded, images=2, dtype=dtype).boxes
    coarse, final = (
        (priors + 6 * torch.randn(priors.shape).to(dtype)).requires_grad_() for _ in range(2)
    )
    predictions = predictions_of(padded, coarse, 2, dtype)._replace(boxes=final)
    logits = (3 * torch.randn(predictions.logits.shape).to(dtype)).requires_grad_()
    return predictions._replace(logits=logits), truth, objects


def assigned(predictions: DensePredictions, truth: list[Any], **settings: Any) -> DenseTargets:
    features = [torch.zeros(len(truth), 0, *size) for size in level_sizes((128, 160))]
    return PDNetAssigner(num_classes=K, **settings)(features, predictions, truth)


@pytest.mark.parametrize("side", [0.0, 1.0])
def test_losses_equal_plain_loops(side: float) -> None:
    predictions, truth, objects = random_scene(torch.float64)
    targets = assigned(predictions, truth, side_offset=side)
    cells = cells_of(level_sizes((128, 160)), STRIDES)
    cls, costs = 0.0, {"coarse": [], "final": []}
    for image, boxes in enumerate(objects):
        size = truth[image].image_size
        coarse = predictions.extras["coarse_boxes"][image].tolist()
        final = predictions.boxes[image].tolist()
        logits = predictions.logits[image].tolist()
        nearest = coarse_matches(cells, boxes, size, side)
        costs["coarse"] += [
            giou_cost(coarse[row], boxes[index]) for row, index in enumerate(nearest) if index >= 0
        ]
        for row, index in enumerate(final_matches(cells, coarse, boxes, size, side=side)):
            if index >= 0:
                costs["final"].append(giou_cost(final[row], boxes[index]))
            if index >= -1:
                cls += focal_cost(logits[row], index % K if index >= 0 else K)
    assert len(costs["coarse"]) >= 3
    assert len(costs["final"]) >= 4
    wanted = {
        "loss_cls": cls / len(costs["final"]),
        "loss_box_coarse": 0.5 * sum(costs["coarse"]) / len(costs["coarse"]),
        "loss_box_reg": 2.0 * sum(costs["final"]) / len(costs["final"]),
    }
    for name, term in TERMS.items():
        assert term(predictions, targets).item() == pytest.approx(wanted[name], rel=1e-12), name


def test_each_loss_teaches_its_own_output() -> None:
    predictions, truth, _ = random_scene(torch.float32)
    targets = assigned(predictions, truth)
    leaves = [predictions.logits, predictions.extras["coarse_boxes"], predictions.boxes]
    masks = [
        targets.labels >= 0,
        foreground(coarse_targets(targets).labels, K),
        foreground(targets.labels, K),
    ]
    for number, term in enumerate(TERMS.values()):
        gradients = torch.autograd.grad(
            term(predictions, targets), leaves, retain_graph=True, materialize_grads=True
        )
        for other, gradient in enumerate(gradients):
            learns = gradient.abs().sum(-1) > 0
            if other == number:
                assert torch.equal(learns, masks[number])
            else:
                assert not learns.any()


def test_inverted_boxes_cost_one_and_learn_nothing() -> None:
    target = torch.tensor([[8.0, 8.0, 24.0, 24.0]]).repeat(4, 1)
    boxes = torch.tensor(
        [
            [24.0, 8.0, 8.0, 24.0],
            [8.0, 24.0, 24.0, 8.0],
            [24.0, 24.0, 8.0, 8.0],
            [8.0, 8.0, 23.0, 24.0],
        ],
        requires_grad=True,
    )
    losses = generalized_iou_loss(boxes, target, smoothing=1.0)
    assert losses[:3].tolist() == [1, 1, 1]
    gradient = torch.autograd.grad(losses.sum(), boxes)[0]
    assert gradient[:3].eq(0).all()
    assert gradient[3].any()


def test_smoothed_overlap_by_hand() -> None:
    """15x16 of 16x16: (240 + 1) / (256 + 1), and the hull is full. Two points at one place have
    (0 + 1) / (0 + 1); two points 3 and 4 pixels apart have the same, and a hull of 12 that is
    empty.
    """

    def cost(box: list[float], target: list[float]) -> float:
        pair = (torch.tensor([x], dtype=torch.float64) for x in (box, target))
        return generalized_iou_loss(*pair, smoothing=1.0).item()

    assert cost([8, 8, 23, 24], [8, 8, 24, 24]) == pytest.approx(1 - 241 / 257, abs=1e-9)
    assert cost([5, 5, 5, 5], [5, 5, 5, 5]) == pytest.approx(1, abs=1e-9)
    assert cost([5, 5, 5, 5], [8, 9, 8, 9]) == pytest.approx(1, abs=1e-7)
    for box, target in (([3, 4, 9, 12], [5, 5, 8, 20]), ([0, 0, 1, 1], [50, 0, 60, 7])):
        assert cost(box, target) == pytest.approx(giou_cost(box, target), rel=1e-12)


def test_nothing_to_learn_is_zero_with_a_gradient() -> None:
    predictions, _, _ = random_scene(torch.float32)
    truth = [instances((128, 160), []), instances((90, 130), [])]
    targets = assigned(predictions, truth)
    losses = {name: term(predictions, targets) for name, term in TERMS.items()}
    assert losses["loss_box_reg"].item() == losses["loss_box_coarse"].item() == 0
    assert losses["loss_cls"] > 0
    torch.stack(list(losses.values())).sum().backward()
    grads: list[Tensor | None] = [
        predictions.boxes.grad,
        predictions.extras["coarse_boxes"].grad,
        predictions.logits.grad,
    ]
    assert all(grad is not None and torch.isfinite(grad).all() for grad in grads)


def test_float64_is_not_rounded() -> None:
    """Ground truth is float32 in Detectron2; what is computed from it with float64 boxes is not.
    Its area has more digits than float32.
    """
    padded = (128, 160)
    box = [float(x) for x in torch.tensor([20.1, 30.3, 77.7, 88.9])]
    predictions = predictions_of(padded, dtype=torch.float64)
    targets = assigned(predictions, [instances(padded, [box], [0])])
    expected = 2.0 * sum(
        giou_cost(predictions.boxes[0, row].tolist(), box)
        for row in foreground(targets.labels[0], K).nonzero()[:, 0].tolist()
    )
    count = foreground(targets.labels, K).sum().item()
    got = TERMS["loss_box_reg"](predictions, targets)
    assert got.dtype == torch.float64
    assert got.item() == pytest.approx(expected / count, rel=1e-13)


def test_parts_that_do_not_fit_are_named() -> None:
    """Another predictor has no coarse boxes, and another assigner no targets for them."""
    predictions, _, _ = random_scene(torch.float32)
    truth = [instances((128, 160), []), instances((90, 130), [])]
    targets = assigned(predictions, truth)
    plain = predictions._replace(extras={"class_points": torch.zeros(0)})
    for wants_coarse_boxes in (
        lambda: TERMS["loss_box_coarse"](plain, targets),
        lambda: assigned(plain, truth),
    ):
        with pytest.raises(ValueError, match=r"only \['class_points'\].*PDNetPredictor"):
            wants_coarse_boxes()
    with pytest.raises(ValueError, match=r"only \['gt_index'\].*PDNetAssigner"):
        TERMS["loss_box_coarse"](predictions, targets.extras["coarse"])
