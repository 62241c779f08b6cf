# SPDX-License-Identifier: Apache-2.0
"""What SAPD adds to the arithmetic: generalised centerness, -ln IoU, terms; its first losses."""

import math

import pytest
import torch
from test_fcos_assigner import instances
from test_sapd import make_assigner, planted, predict

from d2_decouple.layers.losses import generalized_iou_loss, iou_loss, linear_iou_loss
from d2_decouple.layers.points import centerness, soft_centerness
from d2_decouple.modeling import FocalTerm, IoUTerm, LevelSelectionTerm, coarse_targets
from d2_decouple.structures import DenseTargets


@pytest.mark.parametrize(
    ("distances", "value"),
    [
        # Point (36, 36) of (0, 0, 80, 80), in units of 32 pixels.
        ([1.125, 1.125, 1.375, 1.375], (36 / 44) ** 2),
        ([2.0, 1.5, 3.0, 2.25], 4 / 9),  # a corner of the region of a fifth
        ([68.0, 60.0, 92.0, 60.0], 68 / 92),
        ([5.0, 5.0, 5.0, 5.0], 1.0),
        ([1.0, 4.0, 3.0, 1.0], 1 / 12),  # left / right times bottom / top
        ([0.0, 4.0, 3.0, 4.0], 0.0),
        ([-1.0, -1.0, 3.0, 3.0], 0.0),
        ([0.0, 0.0, 0.0, 0.0], 0.0),
    ],
)
def test_soft_centerness_by_hand(distances, value):
    distances = torch.tensor(distances, dtype=torch.float64)
    assert soft_centerness(distances).item() == pytest.approx(value)
    for exponent in (0.1, 0.5, 2.0):
        assert soft_centerness(distances, exponent).item() == pytest.approx(value**exponent)


def test_soft_centerness_is_symmetric_and_fcos_s_at_a_half():
    torch.manual_seed(0)
    distances = torch.randn(50, 4, dtype=torch.float64)
    torch.testing.assert_close(soft_centerness(distances, 0.5), centerness(distances))
    turned = distances[:, [2, 1, 0, 3]], distances[:, [0, 3, 2, 1]], distances[:, [1, 0, 3, 2]]
    for other in turned:
        torch.testing.assert_close(soft_centerness(other), soft_centerness(distances))
    inside = soft_centerness(distances.abs() + 0.1)
    assert ((inside > 0) & (inside <= 1)).all()
    assert soft_centerness(torch.rand(3, 4)).dtype == torch.float32


def test_iou_losses_by_hand():
    """(0, 0, 4, 2) and (2, 0, 6, 2) have 4 of 12 in common."""
    boxes = torch.tensor([[0.0, 0.0, 4.0, 2.0], [2.0, 0.0, 6.0, 2.0], [9.0, 9.0, 10.0, 10.0]])
    gt = torch.tensor([2.0, 0.0, 6.0, 2.0]).expand(3, 4)
    torch.testing.assert_close(iou_loss(boxes, gt), torch.tensor([math.log(3), 0.0, 13.815511]))
    torch.testing.assert_close(linear_iou_loss(boxes, gt), torch.tensor([2 / 3, 0.0, 1.0]))


def random_boxes(count):
    corner = torch.rand(count, 2, dtype=torch.float64) * 4
    return torch.cat((corner, corner + 3 + torch.rand(count, 2, dtype=torch.float64)), dim=1)


@pytest.mark.parametrize("loss", [iou_loss, linear_iou_loss])
def test_iou_losses_have_right_gradients(loss):
    torch.manual_seed(0)
    boxes, gt = random_boxes(20).requires_grad_(), random_boxes(20)
    assert torch.autograd.gradcheck(lambda x: loss(x, gt), boxes)


def test_iou_loss_of_what_has_no_area():
    """It costs the most there is, and its gradient is finite: none."""
    boxes = torch.tensor(
        [[5.0, 5.0, 5.0, 5.0], [6.0, 2.0, 3.0, 4.0], [0, 0, 1, 1], [0, 0, 0, 0]],
        requires_grad=True,
    )
    gt = torch.tensor([[4.0, 4.0, 6.0, 6.0]] * 2 + [[0.0] * 4] * 2)
    losses = iou_loss(boxes, gt)
    assert losses.tolist() == pytest.approx([13.815511] * 4)
    losses.sum().backward()
    assert (boxes.grad == 0).all()
    assert iou_loss(torch.full((1, 4), math.nan), gt[:1]).isnan().all()


def small_targets():
    """Two locations: one learns a third of an overlap with weight 0.5; one learns nothing."""
    boxes = torch.tensor([[[2.0, 0.0, 6.0, 2.0], [0.0, 0.0, 0.0, 0.0]]])
    return DenseTargets(
        labels=torch.tensor([[0, 3]]),
        boxes=boxes,
        cls_weights=torch.ones(1, 2, 1),
        box_weights=torch.tensor([[0.5, 0.0]]),
        quality=None,
        cls_normalizer=torch.tensor(7.0),
        box_normalizer=torch.tensor(2.0),
        extras={},
    )


def test_iou_term_by_hand():
    predictions = predict()._replace(
        boxes=torch.tensor([[[0.0, 0.0, 4.0, 2.0], [0.0, 0.0, 4.0, 2.0]]])
    )
    targets = small_targets()
    assert IoUTerm()(predictions, targets).item() == pytest.approx(math.log(3) / 4)
    assert IoUTerm(weight=3.0)(predictions, targets).item() == pytest.approx(0.75 * math.log(3))
    term = IoUTerm(loss=linear_iou_loss, targets=coarse_targets, boxes=lambda x: x.boxes + 0.0)
    other = targets._replace(extras={"coarse": targets}, box_normalizer=torch.tensor(90.0))
    assert term(predictions, other).item() == pytest.approx(1 / 6)
    value = IoUTerm(loss=generalized_iou_loss)(predictions, targets)
    assert value.item() == pytest.approx((1 - 4 / 12) / 4)  # the hull is the union


@pytest.mark.parametrize("name", ["loss", "boxes", "targets"])
def test_iou_term_wants_callables(name):
    with pytest.raises(TypeError, match=rf"IoUTerm\.{name} must be callable, got 'giou'; a call"):
        IoUTerm(**{name: "giou"})


def test_level_term_by_hand():
    """Logits (0, ln 3) for levels 0 and 1: -ln(1/4) and -ln(3/4), over two objects, times 0.1."""
    logits = torch.tensor([[0.0, math.log(3)]] * 2)
    extras = {
        "level_logits": logits,
        "best_levels": torch.tensor([0, 1]),
        "select_normalizer": torch.tensor(2.0),
    }
    targets = small_targets()._replace(extras=extras)
    wanted = (math.log(4) + math.log(4 / 3)) / 2
    assert LevelSelectionTerm()(predict(), targets).item() == pytest.approx(0.1 * wanted)
    assert LevelSelectionTerm(weight=2.0)(predict(), targets).item() == pytest.approx(2 * wanted)


SIZES = [(-(-800 // s), -(-1280 // s)) for s in (8, 16, 32, 64, 128)]


def test_values_of_a_new_network():
    """The fact sheet's: an empty image of 800 x 1280, and a network that knows no level.

    All probabilities are 0.01: a background entry costs 7.5378e-7, of which there are 80 at each of
    21,330 cells, divided by 1; an object's entry costs 1.12838.
    """
    predictions = predict(sizes=SIZES, classes=80)
    predictions = predictions._replace(logits=predictions.logits - math.log(99))
    features = [torch.zeros(1, 2, *x) for x in SIZES]
    assigner = make_assigner(classes=80)
    targets = assigner(features, predictions, [instances([], [])])
    assert FocalTerm()(predictions, targets).item() == pytest.approx(1.2862, abs=1e-4)
    assert LevelSelectionTerm()(predictions, targets) == 0
    box = [100.0, 60.0, 260.0, 180.0]
    predictions = planted(predictions, box, 0.2, 1.0, 0.5, 0.5, 0.5)
    for parameter in assigner.parameters():
        parameter.data.zero_()
    targets = assigner(features, predictions, [instances([box], [7])])
    assert LevelSelectionTerm()(predictions, targets).item() == pytest.approx(0.1 * math.log(5))
    total = (68 / 92 + 76 / 84) / max(68 / 92 + 76 / 84, 1)
    loss = FocalTerm()(predictions, targets).item()
    assert loss == pytest.approx(1.12838 * total + 1.2862 / (68 / 92 + 76 / 84), rel=1e-3)


def test_less_weight_than_one_is_divided_by_one():
    """An object of one cell that counts 4/9: S is 1, and the loss 4/9 of the whole one.

    Box (0, 0, 40, 40) on P3: the region (16, 16)-(24, 24) has the point (20, 20) alone, in the
    middle. Moved by 4 pixels the region is (20, 20)-(28, 28) with (20, 20) and (28, 28) and two
    more in its corners.
    """
    assigner = make_assigner()
    for shift, number, weight in ((0.0, 1, 1.0), (4.0, 4, 4 / 9)):
        box = [shift, shift, 40.0 + shift, 40.0 + shift]
        predictions = planted(predict(), box, 0.5, 0.1, 0.1, 0.1, 0.1)
        targets = assigner(
            [torch.zeros(1, 2, *x) for x in ((32, 40), (16, 20), (8, 10), (4, 5), (2, 3))],
            predictions,
            [instances([box], [0])],
        )
        weights = targets.box_weights[targets.box_weights > 0]
        torch.testing.assert_close(weights, torch.full((number,), weight))
        assert targets.cls_normalizer.item() == pytest.approx(max(number * weight, 1))
    box = [152.0, 152.0, 168.0, 168.0]  # (158.4, 158.4)-(161.6, 161.6) holds no point of any level
    predictions = planted(predict(), box, 0.5, 0.1, 0.1, 0.1, 0.1)
    targets = assigner(
        [torch.zeros(1, 2, *x) for x in ((32, 40), (16, 20), (8, 10), (4, 5), (2, 3))],
        predictions,
        [instances([box], [0])],
    )
    # The middle, 160, lies in cell 20, whose point is 164: 12 and 4 pixels from the sides.
    assert (targets.labels[0] == 0).nonzero().flatten().tolist() == [20 * 40 + 20]
    assert targets.box_weights.sum().item() == pytest.approx((4 / 12) ** 2)
    assert targets.cls_normalizer == targets.box_normalizer == 1
    assert IoUTerm()(predictions, targets).item() == pytest.approx(math.log(2) / 9, rel=1e-5)
