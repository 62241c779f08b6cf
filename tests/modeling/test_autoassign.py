# SPDX-License-Identifier: Apache-2.0
"""AutoAssign as a host: by hand, against plain loops, and on batches of every kind."""

import math

import pytest
import torch
from detectron2.config import instantiate
from test_fcos_assigner import instances
from util import excite, loss_sum, random_input, tiny, tiny_model, without_gradient

from d2_decouple.config import get_config
from d2_decouple.layers.points import make_grid, squares
from d2_decouple.modeling.autoassign import (
    AutoAssignAssigner,
    AutoAssignPredictor,
    CenterPriorTerm,
    NegativeTerm,
    PositiveTerm,
)
from d2_decouple.structures import DensePredictions

K = 3
STRIDES = [8, 16]
SIZES = [(8, 8), (4, 4)]
RECIPES = ("autoassign_R_50_FPN_1x", "autoassign_R_18_FPN_bccd")
TERMS = (PositiveTerm(), NegativeTerm(), CenterPriorTerm())
BATCHES = {
    "ordinary": [((64, 96), 3), ((120, 160), 5)],
    "half empty": [((64, 96), 3), ((64, 96), 0)],
    "odd sizes": [((33, 47), 0), ((101, 67), 4), ((1, 1), 0)],
    "no objects": [((64, 64), 0), ((40, 64), 0)],
}


def predict(images, *, sizes=SIZES, strides=STRIDES, dtype=torch.float32, classes=K):
    """Predictions whose boxes are squares of two strides, and whose logits are all 0."""
    grid = make_grid(sizes, strides, 0.0, device=torch.device("cpu"), dtype=dtype)
    boxes = squares(grid.locations, 2 * grid.strides)
    count = len(grid.locations)
    return DensePredictions(
        logits=torch.zeros(images, count, classes, dtype=dtype),
        boxes=boxes.repeat(images, 1, 1),
        quality=torch.zeros(images, count, dtype=dtype),
        locations=grid.locations,
        strides=grid.strides,
        priors=boxes,
        level_sizes=grid.level_sizes,
        extras={},
    )


def assign(predictions, truth, **options):
    classes = predictions.logits.shape[-1]
    assigner = AutoAssignAssigner(num_classes=classes, **options).to(predictions.boxes.dtype)
    return assigner, assigner([], predictions, truth)


def test_hand_worked_image():
    """One level of 4x4 cells of 8 pixels at 0, 8, 16, 24; an object of class 2 around (14, 8).

    Inside (4, 20) x (2, 14) lie x = 8, 16 and y = 8: rows 5 and 6. Their steps from the middle are
    -6 / 8 and 2 / 8 strides in x and none in y, so the prior is exp(-0.75**2 / 2) = 0.755 and
    exp(-0.25**2 / 2) = 0.969.
    """
    predictions = predict(1, sizes=[(4, 4)], strides=[8])
    box = [8.0, 2.0, 20.0, 14.0]
    box[0] = 4.0
    box[2] = 24.0
    _, targets = assign(predictions, [instances([box], [2])])
    prior = [math.exp(-(0.75**2) / 2), math.exp(-(0.25**2) / 2)]
    inside = targets.extras["inside"]
    best = inside.exists[0].nonzero().flatten()
    assert inside.location[0, best].tolist() == [6, 5]  # the better one first
    torch.testing.assert_close(inside.prior()[0, best], torch.tensor(prior[::-1]))
    assert inside.prior()[0, ~inside.exists[0]].eq(0).all()
    torch.testing.assert_close(targets.cls_normalizer, torch.tensor(sum(prior)))
    assert targets.box_normalizer == 1
    assert targets.labels[0].tolist() == [2 if row in (5, 6) else K for row in range(16)]
    assert targets.extras["gt_index"][0].tolist() == [
        0 if row in (5, 6) else -1 for row in range(16)
    ]
    torch.testing.assert_close(targets.box_weights[0, [5, 6]], torch.tensor(prior))
    assert targets.box_weights.count_nonzero() == 2


def test_weights_as_negatives_by_hand():
    """Three locations of an object of 24 x 8 pixels, whose boxes overlap it by 0, 1/2 and 3/4.

    One over one minus these is 1, 2 and 4. In shares of their range that is 0, 1/3 and 1, so as
    negatives of the object's class the three count 1, 2/3 and 0, and for others fully.
    """
    predictions = predict(1, sizes=[(4, 4)], strides=[8])
    box = [4.0, 4.0, 28.0, 12.0]  # rows 5, 6, 7: x = 8, 16, 24 and y = 8
    boxes = predictions.boxes.clone()
    boxes[0, 5] = torch.tensor([100.0, 4.0, 124.0, 12.0])
    boxes[0, 6] = torch.tensor([4.0, 4.0, 16.0, 12.0])
    boxes[0, 7] = torch.tensor([10.0, 4.0, 28.0, 12.0])
    predictions = predictions._replace(boxes=boxes)
    _, targets = assign(predictions, [instances([box], [1])])
    expected = torch.ones(16, K)
    expected[5:8, 1] = torch.tensor([1, 2 / 3, 0])
    torch.testing.assert_close(targets.cls_weights[0], expected)
    # A second object of the class around row 7 alone has one location, which is its best.
    boxes[0, 7] = torch.tensor([100.0, 4.0, 124.0, 12.0])
    predictions = predictions._replace(boxes=boxes)
    pair = [instances([box, [22.0, 4.0, 26.0, 12.0]], [1, 1])]
    _, targets = assign(predictions, pair)
    expected[5:8, 1] = torch.tensor([1, 0, 0])
    torch.testing.assert_close(targets.cls_weights[0], expected)
    # One of another class leaves the first one's weights alone.
    pair = [instances([box, [22.0, 4.0, 26.0, 12.0]], [1, 0])]
    _, targets = assign(predictions, pair)
    expected[5:8, 1] = torch.tensor([1, 0, 1])
    expected[7, 0] = 0
    torch.testing.assert_close(targets.cls_weights[0], expected)


def test_terms_by_hand():
    """The object of the first test, with perfect boxes: the confidence is class times objectness.

    All sigmoids are 1/2, so both confidences are 1/4, and so is any weighted mean of them: the
    positive loss is log 4 times 0.25. The other 14 locations, and these for the other classes,
    cost (1/4)**2 * -log(3/4) as negatives; the two are the object's best, alike, and cost nothing
    for its class: 46 of 48 entries, over the prior's sum of 1.724. The prior's loss is one over
    that sum. The first and the last are 0.75 times.
    """
    predictions = predict(1, sizes=[(4, 4)], strides=[8])
    box = torch.tensor([4.0, 2.0, 24.0, 14.0])
    predictions = predictions._replace(boxes=box.expand(1, 16, 4))
    _, targets = assign(predictions, [instances(box, [2])])
    total = math.exp(-(0.75**2) / 2) + math.exp(-(0.25**2) / 2)
    values = [term(predictions, targets).item() for term in TERMS]
    negative = 46 / 16 * math.log(4 / 3) / total
    assert values == pytest.approx([0.25 * math.log(4), 0.75 * negative, 0.75 / total])


def test_confidence_decides_between_locations_by_hand():
    """Two locations with the same prior; the class is sure at one, and its box is half as good.

    Class probabilities 0.9 and 0.5, objectness 1. Boxes: perfect, and one with a GIoU of 1/2 as
    its hull is itself: the confidences are 0.9 * exp(-5 * 0.5) = 0.0739 and 0.5. Their weights are
    as exp(3 p): 1.248 and 4.482, so 0.218 and 0.782.
    """
    predictions = predict(1, sizes=[(2, 2)], strides=[8])
    box = torch.tensor([-4.0, 4.0, 12.0, 12.0])  # rows 2 and 3: x = 0 and 8, y = 8
    boxes = box.repeat(1, 4, 1)
    boxes[0, 2] = torch.tensor([-4.0, 0.0, 12.0, 16.0])
    logits = torch.zeros(1, 4, K)
    logits[0, 2, 1] = math.log(9)
    quality = torch.full((1, 4), 50.0)
    predictions = predictions._replace(boxes=boxes, logits=logits, quality=quality)
    _, targets = assign(predictions, [instances(box, [1])])
    confidence = [0.9 * math.exp(-2.5), 0.5]
    weights = [math.exp(3 * p) for p in confidence]
    joint = sum(w * p for w, p in zip(weights, confidence, strict=True)) / sum(weights)
    loss = PositiveTerm(weight=1.0)(predictions, targets)
    assert loss.item() == pytest.approx(-math.log(joint), rel=1e-5)


def test_object_without_a_location():
    """A box of two pixels between the cells: it costs nothing, but counts as an object."""
    predictions = predict(1)
    gap, box = [9.0, 9.0, 11.0, 11.0], [4.0, 2.0, 24.0, 14.0]
    _, alone = assign(predictions, [instances([gap], [1])])
    assert [term(predictions, alone).item() for term in TERMS][::2] == [0, 0]
    assert (alone.cls_weights == 1).all()
    assert not alone.extras["inside"].exists.any()
    _, one = assign(predictions, [instances([box], [1])])
    _, both = assign(predictions, [instances([box, gap], [1, 1])])
    first, second = (PositiveTerm()(predictions, x) for x in (one, both))
    torch.testing.assert_close(second, first / 2)


def test_predictor_is_fcos_with_larger_first_boxes():
    model = instantiate(tiny(get_config("autoassign_R_50_FPN_1x")).model)
    predictor = model.head.predictor
    assert isinstance(predictor, AutoAssignPredictor)
    assert (predictor.bbox_pred.bias == 4).all()
    predictor.bbox_pred.weight.data.zero_()
    predictions = model.predict([random_input((64, 64), 0)])[2]
    sides = predictions.boxes[0, :, 2:] - predictions.boxes[0, :, :2]
    torch.testing.assert_close(sides, 8 * predictions.strides[:, None].expand(-1, 2))
    assert {name for name, _ in model.head.named_parameters() if "predictor" in name} == {
        f"predictor.{part}.{kind}"
        for part in ("bbox_pred", "ctrness")
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_take_every_batch(name, batch):
    """Every parameter gets a gradient, the prior's too, also where there is no object."""
    model = tiny_model(name)
    for _ in range(2):
        model.zero_grad()
        losses = model([random_input(size, objects) for size, objects in BATCHES[batch]])
        assert list(losses) == ["loss_pos", "loss_neg", "loss_center"]
        assert all(torch.isfinite(loss) for loss in losses.values()), losses
        loss_sum(losses).backward()
        assert without_gradient(model) == []
        excite(model, gain=0.5)
    model.eval()
    with torch.no_grad():
        for size, _ in BATCHES[batch]:
            boxes = model([random_input(size, 0)])[0]["instances"].pred_boxes.tensor
            height, width = size
            assert ((boxes >= 0) & (boxes <= torch.tensor([width, height] * 2))).all()


def test_what_the_recipes_say():
    for name in RECIPES:
        model = get_config(name).model
        assert model.head.offset == 0.0
        assert model.head.prior_prob == 0.02
        assert model.backbone.top_block.in_feature == "res5"
    assert get_config(RECIPES[1]).model.num_classes == 3
    with torch.device("meta"):
        assigner = instantiate(get_config(RECIPES[0]).model).assigner
    shapes = {name: tuple(value.shape) for name, value in assigner.state_dict().items()}
    assert shapes == {"center_prior.mean": (80, 2), "center_prior.sigma": (80, 2)}


def test_float32_under_autocast():
    model = excite(tiny_model("autoassign_R_50_FPN_1x"), gain=0.5)
    inputs = [random_input((64, 96), 2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(inputs)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_extreme_outputs_keep_finite_gradients(logit):
    predictions = predict(1)
    logits = torch.full_like(predictions.logits, logit).requires_grad_()
    quality = torch.full_like(predictions.quality, logit).requires_grad_()
    boxes = (predictions.boxes * 1e4).requires_grad_()
    predictions = predictions._replace(logits=logits, quality=quality, boxes=boxes)
    assigner, targets = assign(predictions, [instances([[4.0, 2.0, 24.0, 14.0]], [1])])
    losses = [term(predictions, targets) for term in TERMS]
    assert all(torch.isfinite(loss) for loss in losses), losses
    sum(losses).backward()
    for tensor in (logits, quality, boxes, *assigner.parameters()):
        assert torch.isfinite(tensor.grad).all()


def test_bad_input():
    with pytest.raises(ValueError, match=r"assigner\.max_locations is 0; .*such as 2048"):
        AutoAssignAssigner(num_classes=3, max_locations=0)
    with pytest.raises(ValueError, match=r"PositiveTerm\.temperature is 0.*such as 1 / 3"):
        PositiveTerm(temperature=0)
    predictions = predict(1)
    _, targets = assign(predictions, [instances([], [])])
    for term in TERMS[::2]:
        with pytest.raises(ValueError, match=r"gives only \[\]; use AutoAssignAssigner"):
            term(predictions, targets._replace(extras={}))
    for term in TERMS[:2]:
        with pytest.raises(ValueError, match=r"objectness as quality.*AutoAssignPredictor"):
            term(predictions._replace(quality=None), targets)
