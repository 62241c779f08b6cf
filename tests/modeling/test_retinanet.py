# SPDX-License-Identifier: Apache-2.0
"""RetinaNet as a host: Detectron2's anchors, matching, weights and detections."""

import math

import pytest
import torch
from detectron2.config import instantiate
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import FPN, LastLevelP6P7
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from detectron2.structures import Boxes, pairwise_iou
from detectron2.utils.events import EventStorage
from test_fcos_assigner import instances
from util import (
    BOTTOM_UP_CHANNELS,
    WIDTH,
    excite,
    loss_sum,
    make_instances,
    random_input,
    tiny,
    tiny_model,
    tiny_resnet,
    without_gradient,
)

from d2_decouple.config import get_config
from d2_decouple.layers.points import make_grid
from d2_decouple.modeling.retinanet import DeltaL1Term, RetinaNetAssigner, RetinaNetPredictor

CLASSES = 3
STRIDES = [8, 16, 32, 64, 128]
BATCH = [((120, 160), 5), ((101, 67), 3), ((64, 64), 0)]


def detectron2_retinanet():
    """Its RetinaNet as its own recipe has it, small, with outputs of a trained one's size."""
    model = RetinaNet(
        backbone=FPN(
            tiny_resnet(),
            ["res3", "res4", "res5"],
            WIDTH,
            top_block=LastLevelP6P7(BOTTOM_UP_CHANNELS[-1], WIDTH),
        ),
        head=RetinaNetHead(
            input_shape=[ShapeSpec(channels=WIDTH)] * 5,
            num_classes=CLASSES,
            num_anchors=9,
            conv_dims=[WIDTH, WIDTH],
        ),
        anchor_generator=DefaultAnchorGenerator(
            sizes=[[4 * x * 2 ** (k / 3) for k in range(3)] for x in STRIDES],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=STRIDES,
            offset=0.0,
        ),
        box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        anchor_matcher=Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True),
        num_classes=CLASSES,
        head_in_features=["p3", "p4", "p5", "p6", "p7"],
        pixel_mean=[103.530, 116.280, 123.675],
        pixel_std=[1.0, 1.0, 1.0],
    )
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, FrozenBatchNorm2d):
                part.weight.uniform_(0.5, 1.5)
                part.running_mean.normal_(std=0.1)
        excite(model)
        images = model.preprocess_image([random_input((128, 128), 0)]).tensor
        maps = model.backbone(images)
        outputs = model.head([maps[name] for name in model.head_in_features])
        layers = zip((model.head.cls_score, model.head.bbox_pred), outputs, (1, 3), strict=True)
        for layer, found, smaller in layers:
            layer.weight /= smaller * torch.cat([x.flatten() for x in found]).std()
            layer.bias.fill_(-0.5 if smaller == 1 else 0.0)
    return model


def our_retinanet():
    return instantiate(tiny(get_config("retinanet_R_50_FPN_1x"), convs=2).model)


@pytest.fixture
def pair():
    """Detectron2's RetinaNet and ours with its state dict, in training mode."""
    theirs, ours = detectron2_retinanet(), our_retinanet()
    incompatible = ours.load_state_dict(theirs.state_dict())
    assert not incompatible.missing_keys
    assert not incompatible.unexpected_keys
    return theirs, ours


def inputs_of(batch):
    return [random_input(size, objects, CLASSES) for size, objects in batch]


@torch.no_grad()
def test_detectron2s_weights_give_detectron2s_predictions(pair):
    """In float64, where another order of summation cannot hide an error."""
    theirs, ours = (model.double().eval() for model in pair)
    inputs = inputs_of(BATCH)
    maps = theirs.backbone(theirs.preprocess_image(inputs).tensor)
    features = [maps[name] for name in theirs.head_in_features]
    logits, deltas = theirs._transpose_dense_predictions(theirs.head(features), [CLASSES, 4])
    predictions = ours.predict(inputs)[2]
    anchors = Boxes.cat(theirs.anchor_generator(features)).tensor
    assert torch.equal(predictions.priors.float(), anchors)
    assert torch.cat(logits, 1).std() > 0.5
    torch.testing.assert_close(predictions.logits, torch.cat(logits, 1), rtol=0, atol=1e-9)
    deltas = torch.cat(deltas, 1)
    torch.testing.assert_close(predictions.extras["deltas"], deltas, rtol=0, atol=1e-9)
    boxes = torch.stack([theirs.box2box_transform.apply_deltas(x, anchors) for x in deltas])
    torch.testing.assert_close(predictions.boxes, boxes.double(), rtol=1e-6, atol=1e-4)


@torch.no_grad()
def test_detectron2s_weights_give_detectron2s_detections(pair):
    theirs, ours = (model.eval() for model in pair)
    inputs = inputs_of(BATCH)
    for expected, found in zip(theirs(inputs), ours(inputs), strict=True):
        expected, found = expected["instances"], found["instances"]
        assert len(expected) >= 20
        assert torch.equal(found.pred_classes, expected.pred_classes)
        torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-5, atol=1e-3
        )


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_losses_are_detectron2s_but_for_the_normaliser(pair, beta):
    """Its moving average begins at 100 and so has a tenth of this batch's number in it."""
    theirs, ours = pair
    theirs.smooth_l1_beta, ours.losses["loss_box_reg"] = beta, DeltaL1Term(beta=beta)
    inputs = inputs_of(BATCH)
    with EventStorage():
        expected = theirs(inputs)
    _, features, predictions = ours.predict(inputs)
    targets = ours.assigner(features[-5:], predictions, [x["instances"] for x in inputs])
    positives = (targets.box_weights > 0).sum().item()
    assert positives > 9
    assert targets.cls_normalizer == targets.box_normalizer == positives
    losses = ours(inputs)
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(
            loss * positives / (0.9 * 100 + 0.1 * positives), expected[name], rtol=1e-4, atol=0
        )


def random_scene(generator):
    """Boxes of all sizes, most of them small, some beyond the image; some tiny ones twice."""
    count = int(torch.randint(0, 40, (), generator=generator))
    middle = torch.rand(count, 2, generator=generator) * torch.tensor([200.0, 150.0])
    sides = 0.01 + 300 * torch.rand(count, 2, generator=generator) ** 4
    boxes = torch.cat((middle - sides / 2, middle + sides / 2), dim=1)
    boxes = torch.cat((boxes, boxes[:3]))
    return instances(boxes, torch.randint(CLASSES, (len(boxes),), generator=generator))


def our_targets(truth, size, **options):
    """Targets on a padded image of ``size``, from anchors that nothing has moved."""
    sizes = [(math.ceil(size[0] / x), math.ceil(size[1] / x)) for x in STRIDES]
    grid = make_grid(sizes, STRIDES, 0.0, device=torch.device("cpu"), dtype=torch.float32)
    predictor = RetinaNetPredictor(num_classes=CLASSES, in_channels=1)
    maps = [torch.zeros(len(truth), 9 * CLASSES, *x) for x in sizes]
    features = [torch.zeros(len(truth), 1, *x) for x in sizes]
    predictions = predictor(maps, features, grid)
    assigner = RetinaNetAssigner(num_classes=CLASSES, **options)
    return predictions, assigner(features, predictions, truth)


@pytest.mark.parametrize("seed", range(6))
def test_labels_are_detectron2s(seed):
    generator = torch.Generator().manual_seed(seed)
    truth = [random_scene(generator) for _ in range(3)] + [instances([], [])]
    predictions, targets = our_targets(truth, (160, 224))
    levels = [Boxes(x) for x in predictions.priors.split(predictions.level_sizes)]
    labels, boxes = detectron2_retinanet().label_anchors(levels, truth)
    assert torch.equal(targets.labels, torch.stack(labels))
    positive = (targets.labels >= 0) & (targets.labels < CLASSES)
    assert torch.equal(targets.boxes[positive], torch.stack(boxes)[positive])
    assert not targets.boxes[~positive].any()
    assert torch.equal(targets.box_weights > 0, positive)
    assert torch.equal(targets.extras["gt_index"] >= 0, positive)
    assert set(targets.labels.unique().tolist()) == {-1, 0, 1, 2, CLASSES}


def test_hand_worked_image():
    """The only anchors of interest are those of cell (2, 3) of P4, around pixel (32, 48).

    Their first size is 64 pixels. A box as wide and 34 high in their middle lies in the square
    one: 34 / 64 = 0.53 of it. The wide one, 90.5 x 45.3, has 64 * 34 of 4096 in common:
    2176 / (4096 + 2176 - 2176) = 0.53 as well; so both are positive. The next size is 80.6:
    2176 / 6502 = 0.33, background, but for the wide one, which holds it too: 0.33.
    """
    size, box = (160, 224), [0.0, 31.0, 64.0, 65.0]
    predictions, targets = our_targets([instances([box], [1])], size)
    first = 9 * (20 * 28 + 3 * 14 + 2)
    assert predictions.locations[first].tolist() == [32, 48]
    anchors = predictions.priors[first : first + 3]
    expected = [[-13.25, 25.37, 77.25, 70.63], [0, 16, 64, 80], [9.37, 2.75, 54.63, 93.25]]
    torch.testing.assert_close(anchors, torch.tensor(expected), rtol=0, atol=0.01)
    # The high one has 45.3 * 34 of 4096 in common: 1539 / (4096 + 2176 - 1539) = 0.33.
    labels = [1, 1, CLASSES, *[CLASSES] * 6]
    assert targets.labels[0, first : first + 9].tolist() == labels
    assert targets.boxes[0, first].tolist() == box
    assert targets.extras["gt_index"][0, first : first + 3].tolist() == [0, 0, -1]
    # In the row above the square anchor lies 16 pixels higher and has 33 of the 34 in common:
    # 2112 / (4096 + 2176 - 2112) = 0.51. One cell to the left it lacks 16 columns of 64:
    # 1632 / (4096 + 2176 - 1632) = 0.35.
    above, left = first - 9 * 14, first - 9
    assert targets.labels[0, above + 1] == 1
    assert targets.labels[0, left + 1] == CLASSES


def test_ignored_between_the_thresholds():
    """A box of 64 x 28 around (32, 48) lies in the wide anchor of P3's third size, 71.8 x 35.9,
    and is 1792 / 2580 = 0.69 of it. Of P4's first size it is 1792 / 4096 = 0.44, in the wide and in
    the square shape: no positive, no background. In the high shape, 45.3 wide, it has 1267 in
    common: 1267 / (4096 + 1792 - 1267) = 0.27.
    """
    box = [0.0, 34.0, 64.0, 62.0]
    targets = our_targets([instances([box], [1])], (160, 224))[1]
    assert targets.labels[0, 9 * (6 * 28 + 4) + 6] == 1
    first = 9 * (20 * 28 + 3 * 14 + 2)
    assert targets.labels[0, first : first + 3].tolist() == [-1, -1, CLASSES]
    # Not matched, so without a box to learn.
    assert targets.extras["gt_index"][0, first] == -1
    assert targets.box_weights[0, first] == 0
    assert not targets.boxes[0, first].any()
    # Other thresholds, other labels.
    targets = our_targets([instances([box], [1])], (160, 224), iou_thresholds=[0.2, 0.43])[1]
    assert targets.labels[0, first : first + 3].tolist() == [1, 1, -1]


def test_best_anchors_of_an_object_learn_the_object_they_overlap_most():
    """A box of 10 pixels around (28, 44) lies in one of 70 around the same place.

    The small one overlaps no anchor by more than a tenth, so its best are positive for that
    alone. They all overlap the large one by a fifth and so learn that (Detectron2's rule).
    """
    large, small = [-7.0, 9.0, 63.0, 79.0], [23.0, 39.0, 33.0, 49.0]
    predictions, alone = our_targets([instances([small], [1])], (160, 224))
    best = alone.labels[0] == 1
    assert best.sum() >= 2
    predictions, targets = our_targets([instances([large, small], [0, 1])], (160, 224))
    assert (targets.labels[0, best] == 0).all()
    assert (targets.labels == 1).sum() == 0
    overlaps = pairwise_iou(Boxes(predictions.priors), Boxes(torch.tensor([large, small])))
    assert overlaps[:, 1].max() < 0.1
    assert overlaps[best, 0].min() < 0.5  # not positive for the large one's sake
    assert (targets.boxes[0, best] == torch.tensor(large)).all()


def test_object_without_area_has_no_anchor():
    """Detectron2's matcher calls every anchor of the image positive then."""
    flat = instances([[50.0, 50.0, 50.0, 80.0]], [1])
    targets = our_targets([flat], (160, 224))[1]
    assert (targets.labels == CLASSES).all()
    assert targets.cls_normalizer == 1


def test_term_by_hand():
    """One positive anchor of 10 x 20 around (5, 10) and an object of 20 x 20 around (7, 10).

    The change is (0.2, 0, log 2, 0); predicted is (0.5, 0, 0, -0.1). L1: 0.3 + 0.693 + 0.1. With
    beta 0.2: 0.3 - 0.1, 0.693 - 0.1 and 0.1**2 / 0.4. Half of it, since two are positive in all.
    """
    predictions, targets = our_targets([instances([], [])], (32, 32))
    priors, boxes = predictions.priors.clone(), targets.boxes.clone()
    deltas = torch.randn_like(predictions.boxes)
    weights = targets.box_weights.clone()
    priors[4] = torch.tensor([0.0, 0.0, 10.0, 20.0])
    boxes[0, 4] = torch.tensor([-3.0, 0.0, 17.0, 20.0])
    deltas[0, 4] = torch.tensor([0.5, 0.0, 0.0, -0.1])
    weights[0, 4] = 1
    predictions = predictions._replace(priors=priors, extras={"deltas": deltas.requires_grad_()})
    targets = targets._replace(boxes=boxes, box_weights=weights, box_normalizer=torch.tensor(2.0))
    loss = DeltaL1Term()(predictions, targets)
    assert loss.item() == pytest.approx((0.3 + math.log(2) + 0.1) / 2)
    smooth = DeltaL1Term(beta=0.2, weight=3)(predictions, targets)
    by_hand = 0.3 - 0.1 + math.log(2) - 0.1 + 0.01 / 0.4
    assert smooth.item() == pytest.approx(3 * by_hand / 2)
    smooth.backward()
    assert torch.isfinite(deltas.grad).all()
    assert deltas.grad.abs().sum(-1).nonzero().tolist() == [[0, 4]]


@pytest.mark.parametrize(
    "batch",
    [BATCH, [((33, 47), 0), ((101, 67), 4), ((1, 1), 0)], [((64, 64), 0), ((40, 64), 0)]],
)
@pytest.mark.parametrize("name", ["retinanet_R_50_FPN_1x", "retinanet_R_18_FPN_bccd"])
def test_recipes_take_every_batch(name, batch):
    model = tiny_model(name)
    for _ in range(2):
        model.zero_grad()
        losses = model(inputs_of(batch))
        assert all(torch.isfinite(loss) for loss in losses.values()), losses
        loss_sum(losses).backward()
        assert without_gradient(model) == []
        excite(model, gain=0.5)
    model.eval()
    with torch.no_grad():
        for item, result in zip(batch, model(inputs_of(batch)), strict=True):
            (height, width), boxes = item[0], result["instances"].pred_boxes.tensor
            assert ((boxes >= 0) & (boxes <= torch.tensor([width, height] * 2))).all()


def test_what_the_recipes_say():
    coco, small = (get_config(f"retinanet_{x}").model for x in ("R_50_FPN_1x", "R_18_FPN_bccd"))
    assert coco.head.offset == small.head.offset == 0.0
    assert (coco.head.norm, small.head.norm) == ("", "GN")
    assert coco.backbone.top_block.in_feature == small.backbone.top_block.in_feature == "res5"
    with torch.device("meta"):
        model = instantiate(coco)
    assert model.head.cls_score.weight.shape == (9 * 80, 256, 3, 3)
    assert model.head.predictor.bbox_pred.weight.shape == (36, 256, 3, 3)
    # Detectron2's own model of this recipe has as many.
    assert sum(x.numel() for x in model.parameters()) == 37_915_572


def test_coordinates_are_float32_under_autocast():
    model = excite(tiny_model("retinanet_R_50_FPN_1x"), gain=0.5)
    inputs = [random_input((64, 96), 2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, predictions = model(inputs), model.predict(inputs)[2]
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    tensors = [predictions.boxes, predictions.priors, predictions.extras["deltas"]]
    assert {x.dtype for x in tensors} == {torch.float32}


def test_other_number_of_anchors_is_named():
    model = tiny_model("retinanet_R_50_FPN_1x")
    model.assigner.anchors_per_cell = 3
    with pytest.raises(ValueError, match=r"9 a cell.*wants 3.*assigner\.anchors_per_cell=9"):
        model([random_input((64, 64), 1)])
    cfg = tiny(get_config("fcos_R_50_FPN_1x")).model
    cfg.assigner = get_config("retinanet_R_50_FPN_1x").model.assigner
    with pytest.raises(ValueError, match=r"1 a cell.*wants 9.*anchors_per_cell=1,"):
        instantiate(cfg)([random_input((64, 64), 1)])


def test_three_sizes_in_one_shape():
    """What may be told the predictor: other anchors, then the assigner is told how many."""
    cfg = tiny(get_config("retinanet_R_50_FPN_1x")).model
    cfg.head.predictor.update(sizes=[2.0, 4.0, 8.0], aspect_ratios=[1.0])
    cfg.assigner.anchors_per_cell = 3
    model = instantiate(cfg)
    predictions = model.predict([random_input((64, 64), 0)])[2]
    assert predictions.logits.shape[1] == 3 * (64 + 16 + 4 + 1 + 1)
    assert predictions.priors[3:6].tolist() == [
        [0, -8, 16, 8],
        [-8, -16, 24, 16],
        [-24, -32, 40, 32],
    ]
    assert torch.isfinite(loss_sum(model([random_input((64, 64), 2)])))


@pytest.mark.parametrize("thresholds", [[0.5, 0.4], [0.0, 0.5], [0.4], [0.4, 1.1], [0.4, 0.5, 0.6]])
def test_bad_thresholds(thresholds):
    with pytest.raises(ValueError, match=r"assigner\.iou_thresholds is .*such as \[0\.4, 0\.5\]"):
        RetinaNetAssigner(num_classes=3, iou_thresholds=thresholds)


@pytest.mark.parametrize("option", [{"sizes": []}, {"aspect_ratios": [1.0, 0.0]}])
def test_bad_anchors(option):
    with pytest.raises(ValueError, match=rf"predictor\.{next(iter(option))} is .*positive"):
        RetinaNetPredictor(num_classes=3, in_channels=4, **option)


def test_bad_term():
    with pytest.raises(ValueError, match=r"DeltaL1Term\.beta is -1"):
        DeltaL1Term(beta=-1)
    predictions, targets = our_targets([make_instances((32, 32), [], [])], (32, 32))
    with pytest.raises(ValueError, match=r"gives none, only \[\].*RetinaNetPredictor"):
        DeltaL1Term()(predictions._replace(extras={}), targets)
