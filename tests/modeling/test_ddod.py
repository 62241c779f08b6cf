# SPDX-License-Identifier: Apache-2.0
"""DDOD as a host: two sets of positives, levels' factors, deformable towers."""

import statistics

import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from test_fcos_assigner_cost import Recorder
from util import excite, loss_sum, random_input, tiny, tiny_model, without_gradient

from d2_decouple.config import get_config
from d2_decouple.layers.deform import OffsetDeformConv
from d2_decouple.layers.losses import generalized_iou_loss, sigmoid_focal_loss
from d2_decouple.layers.points import make_grid, squares
from d2_decouple.modeling.ddod import (
    BoxQualityTerm,
    DDODAssigner,
    PredictionATSSAssigner,
    box_targets,
)
from d2_decouple.structures import DensePredictions

K = 3
RECIPES = ("ddod_R_50_FPN_1x", "ddod_R_18_FPN_bccd")
BATCHES = {
    "half empty": [((64, 96), 3), ((64, 96), 0)],
    "odd sizes": [((33, 47), 0), ((101, 67), 4), ((1, 1), 0)],
    "no objects": [((64, 64), 0), ((40, 64), 0)],
}


def logit(probability):
    return torch.tensor(probability).logit()


def predict(images=1, sizes=((4, 4),), strides=(8,)):
    """Every class at 0.1 everywhere, every box as the anchor of one stride around its cell."""
    grid = make_grid(sizes, strides, 0.0, device=torch.device("cpu"), dtype=torch.float32)
    boxes = squares(grid.locations, grid.strides)
    count = len(grid.locations)
    return DensePredictions(
        logits=logit(0.1).expand(images, count, K).clone(),
        boxes=boxes.repeat(images, 1, 1),
        quality=torch.zeros(images, count),
        locations=grid.locations,
        strides=grid.strides,
        priors=squares(grid.locations, 8 * grid.strides),
        level_sizes=grid.level_sizes,
        extras={},
    )


def instances(boxes, classes, size=(32, 32)):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Instances(size, gt_boxes=Boxes(boxes), gt_classes=torch.tensor(classes).long())


def features(sizes=((4, 4),), images=1):
    return [torch.zeros(images, 1, *size) for size in sizes]


BOX = [4.0, 4.0, 20.0, 20.0]  # its middle is (12, 12); inside lie x, y = 8, 16: rows 5, 6, 9, 10
NEAR = [0, 1, 2, 4, 5, 6, 8, 9, 10]  # the nine nearest to the middle, of two equal the first


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_candidates_are_measured_by_predictions(alpha):
    """Row 5 has the best class and half of the box, row 6 a perfect box and a poorer class.

    The nine nearest cells are candidates, and the threshold is the mean plus the standard
    deviation of ``score ** (1 - alpha) * IoU ** alpha``. With the class alone that is 0.9 at row 5,
    0.5 at row 6 and 0.1 elsewhere, with the box alone 0.5, 1 and what the others' boxes of 8
    pixels have in common with 16 x 16: all 64 of 256 inside, less at the border.
    """
    predictions = predict()
    predictions.logits[0, 5, 2], predictions.logits[0, 6, 2] = logit(0.9), logit(0.5)
    predictions.boxes[0, 5] = torch.tensor([4.0, 4.0, 20.0, 12.0])
    predictions.boxes[0, 6] = torch.tensor(BOX)
    assigner = PredictionATSSAssigner(num_classes=K, alpha=alpha)
    targets = assigner(features(), predictions, [instances([BOX], [2])])
    values = {}
    for row in NEAR:
        score = {5: 0.9, 6: 0.5}.get(row, 0.1)
        x, y = row % 4 * 8, row // 4 * 8
        sides = [min(c + 4, 20) - max(c - 4, 4) for c in (x, y)]
        common = max(sides[0], 0) * max(sides[1], 0)
        overlap = {5: 0.5, 6: 1.0}.get(row, common / (64 + 256 - common))
        values[row] = score ** (1 - alpha) * overlap**alpha
    threshold = statistics.mean(values.values()) + statistics.stdev(values.values())
    assert targets.extras["iou_thresholds"].tolist() == pytest.approx([threshold])
    positive = [row for row in (5, 6, 9, 10) if values[row] >= threshold]
    assert (targets.labels[0] == 2).nonzero().flatten().tolist() == positive
    assert positive == {0.0: [5], 0.5: [5, 6], 0.8: [5, 6], 1.0: [6]}[alpha]
    # Where the box learns, the quality is the predicted box's overlap; each counts the same.
    overlaps = {5: 0.5, 6: 1.0}
    assert targets.quality is not None
    for row in range(16):
        assert targets.quality[0, row].item() == (overlaps[row] if row in positive else 0)
        assert targets.box_weights[0, row].item() == float(row in positive)


def test_class_and_box_have_positives_of_their_own():
    """The class shall be learned where it is sure, the box where it is good."""
    predictions = predict()
    predictions.logits[0, 5, 2], predictions.logits[0, 6, 2] = logit(0.9), logit(0.5)
    predictions.boxes[0, 5] = torch.tensor([4.0, 4.0, 20.0, 12.0])
    predictions.boxes[0, 6] = torch.tensor(BOX)
    assigner = DDODAssigner(num_classes=K, num_levels=1, cls_alpha=0.0, box_alpha=1.0)
    targets = assigner(features(), predictions, [instances([BOX], [2])])
    assert (targets.labels[0] == 2).nonzero().tolist() == [[5]]
    box = box_targets(targets)
    assert (box.labels[0] == 2).nonzero().tolist() == [[6]]
    assert box.box_weights[0].nonzero().tolist() == [[6]]
    assert assigner.positives.tolist() == [[1], [1]]
    # Other shares, other cells: these are the two sets, and not one twice.
    turned = DDODAssigner(num_classes=K, num_levels=1, cls_alpha=1.0, box_alpha=0.0)
    targets = turned(features(), predictions, [instances([BOX], [2])])
    assert (targets.labels[0] == 2).nonzero().tolist() == [[6]]
    assert box_targets(targets).box_weights[0].nonzero().tolist() == [[5]]


SIZES, STRIDES = ((4, 4), (2, 2)), (8, 16)


def step(assigner, boxes, classes=None):
    predictions = predict(sizes=SIZES, strides=STRIDES)
    truth = [instances(boxes, classes or [0] * len(boxes))]
    return predictions, assigner(features(SIZES), predictions, truth)


def test_levels_factors_by_hand():
    """So far 7 and 3 positives of the class on two levels, and 2 and 2 of the box.

    This image has none: the factors are 1 and 2 for the class, and as there is no difference
    between the box's levels, 2 and 2 for it. With 10, 4, 0 and 1 positives, they are 1, 1.6, 2
    and 1.9.
    """
    assigner = DDODAssigner(num_classes=K, num_levels=2)
    assigner.positives.copy_(torch.tensor([[7.0, 3.0], [2.0, 2.0]]))
    _, targets = step(assigner, [])
    assert targets.extras["level_factors"].tolist() == [[1, 2], [2, 2]]
    assert targets.cls_weights[0, :, 0].tolist() == [1.0] * 16 + [2.0] * 4
    assert box_targets(targets).cls_weights[0, :, 0].tolist() == [2.0] * 20
    assert targets.cls_normalizer == box_targets(targets).box_normalizer == 1

    four = DDODAssigner(num_classes=K, num_levels=4)
    four.positives[0] = torch.tensor([10.0, 4.0, 0.0, 1.0])
    sizes = ((4, 4), (2, 2), (1, 1), (1, 1))
    predictions = predict(sizes=sizes, strides=(8, 16, 32, 64))
    targets = four(features(sizes), predictions, [instances([], [])])
    torch.testing.assert_close(
        targets.extras["level_factors"][0], torch.tensor([1.0, 1.6, 2.0, 1.9])
    )


def test_positives_are_counted_and_resumed():
    """What two steps count is the sum, is saved, and decides the third step as it would have."""
    assigner = DDODAssigner(num_classes=K, num_levels=2)
    assert (assigner.positives == 0).all()
    counts = []
    for _ in range(2):
        _, targets = step(assigner, [BOX])
        both = (targets, box_targets(targets))
        counts.append(
            torch.tensor([[(x < K).sum() for x in t.labels.split([16, 4], 1)] for t in both])
        )
    assert (counts[0].sum(1) > 0).all()
    assert torch.equal(assigner.positives, (counts[0] + counts[1]).float())

    resumed = DDODAssigner(num_classes=K, num_levels=2)
    resumed.load_state_dict(assigner.state_dict())
    assert torch.equal(
        step(resumed, [BOX])[1].extras["level_factors"],
        step(assigner, [BOX])[1].extras["level_factors"],
    )


def test_evaluation_counts_nothing():
    model = excite(tiny_model(RECIPES[0]), gain=0.5)
    model([random_input((64, 96), 5)])
    before = model.assigner.positives.clone()
    assert before.sum() > 0
    model.eval()
    with torch.no_grad():
        model([random_input((64, 96), 5)])
    assert torch.equal(model.assigner.positives, before)
    assert "assigner.positives" in model.state_dict()


def test_losses_by_hand():
    """Factors weigh classes, boxes and qualities; each set is divided by its own normaliser."""
    model = excite(tiny_model(RECIPES[0]), gain=0.5)
    assigner = model.assigner
    assigner.for_class.alpha, assigner.for_box.alpha = 0.0, 1.0  # two sets that differ
    # As after some training, so that each level has a factor of its own.
    assigner.positives.copy_(torch.tensor([[500, 400, 300, 200, 100], [10, 30, 70, 50, 20]]))
    inputs = [random_input((128, 160), 6), random_input((128, 160), 0)]
    _, maps, predictions = model.predict(inputs)
    state = assigner.positives.clone()
    targets = assigner(maps[-5:], predictions, [x["instances"] for x in inputs])
    assigner.positives.copy_(state)
    losses = model(inputs)
    factors = [
        torch.cat([x.expand(n) for x, n in zip(of_set, predictions.level_sizes, strict=True)])
        for of_set in targets.extras["level_factors"]
    ]
    focal = sigmoid_focal_loss(predictions.logits, targets.labels, 0.25, 2.0)
    focal = focal * (targets.labels >= 0)[..., None] * factors[0][:, None]
    # The second image has no object and counts as one.
    positives = (targets.labels[0] < K).sum() - (targets.labels[0] < 0).sum() + 1
    assert targets.cls_normalizer == positives
    torch.testing.assert_close(losses["loss_cls"], focal.sum() / positives)

    box = box_targets(targets)
    learn = (box.labels >= 0) & (box.labels < K)
    giou = generalized_iou_loss(predictions.boxes, box.boxes)
    count = learn[0].sum() + 1
    torch.testing.assert_close(
        losses["loss_box_reg"], 2 * (giou * factors[1] * learn).sum() / count
    )
    quality = predictions.quality.sigmoid()
    entropy = -(box.quality * quality.log() + (1 - box.quality) * (1 - quality).log())
    torch.testing.assert_close(losses["loss_quality"], (entropy * factors[1] * learn).sum() / count)
    assert not torch.equal(factors[0], factors[1])
    assert not torch.equal(learn, (targets.labels >= 0) & (targets.labels < K))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_take_every_batch(name, batch):
    model = tiny_model(name)
    for _ in range(2):
        model.zero_grad()
        losses = model([random_input(size, objects) for size, objects in BATCHES[batch]])
        assert list(losses) == ["loss_cls", "loss_box_reg", "loss_quality"]
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
        cfg = get_config(name)
        assert cfg.model.head.offset == 0.0
        with torch.device("meta"):
            model = instantiate(cfg.model)
        assert (model.assigner.for_class.alpha, model.assigner.for_box.alpha) == (0.8, 0.5)
        for tower in (model.head.cls_subnet, model.head.bbox_subnet):
            convs = [part for part in tower if hasattr(part, "kernel_size")]
            assert [isinstance(part, OffsetDeformConv) for part in convs] == [True] + [False] * 3
            assert all(part.bias is None for part in convs)
            assert convs[0].conv_offset.weight.shape[0] == 18  # offsets alone, no factors
    # Beside ATSS's there are two convolutions from 256 channels to 18 offsets.
    with torch.device("meta"):
        host, model = (
            instantiate(get_config(x).model) for x in ("atss_R_50_FPN_1x", "ddod_R_50_FPN_1x")
        )
    host, model = (sum(x.numel() for x in each.parameters()) for each in (host, model))
    assert model - host == 2 * (9 * 256 * 18 + 18)


def test_atss_weights_load_into_the_towers():
    """All but the offsets have a place, so ATSS's class map is DDOD's before it learns."""
    host, model = excite(tiny_model("atss_R_50_FPN_1x")), tiny_model(RECIPES[0])
    missing = model.load_state_dict(host.state_dict(), strict=False)
    assert missing.unexpected_keys == []
    assert {name.rpartition(".")[0] for name in missing.missing_keys} == {
        "assigner",
        "head.cls_subnet.0.conv_offset",
        "head.bbox_subnet.0.conv_offset",
    }
    inputs = [random_input((64, 64), 0)]
    for name in ("logits", "boxes", "quality"):
        found, expected = (getattr(x.eval().predict(inputs)[2], name) for x in (model, host))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_asks_the_device_for_nothing():
    assigner = DDODAssigner(num_classes=K, num_levels=2)
    predictions = predict(2, SIZES, STRIDES)
    truth = [instances([BOX] * 20, [0] * 20), instances([], [])]
    with Recorder() as recorder:
        assigner(features(SIZES, 2), predictions, truth)
    assert len(recorder.names) > 20
    assert recorder.waits == []


def test_bad_input():
    with pytest.raises(ValueError, match=r"alpha is 1\.2; wanted is a share from 0 to 1"):
        PredictionATSSAssigner(num_classes=3, alpha=1.2)
    with pytest.raises(ValueError, match=r"predicts 2 levels.*of 5; .*assigner\.num_levels=2"):
        step(DDODAssigner(num_classes=K, num_levels=5), [])
    predictions, targets = step(DDODAssigner(num_classes=K, num_levels=2), [])
    with pytest.raises(ValueError, match=r"gives none, only \[\]; .*DDODAssigner"):
        box_targets(targets._replace(extras={}))
    with pytest.raises(ValueError, match=r"BoxQualityTerm wants a quality"):
        BoxQualityTerm()(predictions._replace(quality=None), targets)


def test_float32_under_autocast():
    model = excite(instantiate(tiny(get_config(RECIPES[0])).model), gain=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model([random_input((64, 96), 2)])
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
