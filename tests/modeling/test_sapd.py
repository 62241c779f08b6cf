# SPDX-License-Identifier: Apache-2.0
"""SAPD's predictor, options and assigner: by hand, phases, and what is refused."""

import math

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from test_fcos_assigner import instances

from d2_decouple.layers.losses import linear_iou_loss
from d2_decouple.layers.points import make_grid, squares
from d2_decouple.modeling import (
    FeatureSelectionNet,
    FocalTerm,
    IoUTerm,
    LevelSelectionTerm,
    SAPDAssigner,
    SAPDOptions,
    SAPDPredictor,
)
from d2_decouple.structures import DensePredictions, stack_ground_truth

K = 3
STRIDES = [8, 16, 32, 64, 128]
SIZES = [(32, 40), (16, 20), (8, 10), (4, 5), (2, 3)]  # of an image of 256 x 320
STARTS = [0, 1280, 1600, 1680, 1700]
BASELINE = {"use_soft_weights": False, "use_soft_levels": False}


def predict(images=1, *, sizes=SIZES, strides=STRIDES, offset=0.5, classes=K):
    """Logits of 0, and boxes that overlap nothing."""
    grid = make_grid(sizes, strides, offset, device=torch.device("cpu"), dtype=torch.float32)
    count = len(grid.locations)
    return DensePredictions(
        logits=torch.zeros(images, count, classes),
        boxes=torch.full((images, count, 4), -900.0),
        quality=None,
        locations=grid.locations,
        strides=grid.strides,
        priors=squares(grid.locations, 4 * grid.strides),
        level_sizes=grid.level_sizes,
        extras={},
    )


def make_assigner(*, max_iter=10, channels=2, num_levels=5, classes=K, **options):
    return SAPDAssigner(
        num_classes=classes,
        channels=channels,
        num_levels=num_levels,
        max_iter=max_iter,
        hidden_channels=4,
        options=SAPDOptions(**options),
    )


def assign(assigner, predictions, truth, sizes=SIZES):
    return assigner([torch.zeros(len(truth), 2, *x) for x in sizes], predictions, truth)


def planted(predictions, box, *shares):
    """The same, but level after level predicts a box that covers a share of ``box``."""
    boxes = predictions.boxes.clone()
    starts = [sum(predictions.level_sizes[:i]) for i in range(len(shares))]
    for start, count, share in zip(starts, predictions.level_sizes, shares, strict=True):
        part = torch.tensor(box)
        part[2] = part[0] + (part[2] - part[0]) * share
        boxes[:, start : start + count] = part
    return predictions._replace(boxes=boxes)


def maps(predictor, outputs):
    """Class maps of zeros and box features that make ``bbox_pred`` give ``outputs`` everywhere."""
    predictor.bbox_pred.weight.data.zero_()
    predictor.bbox_pred.bias.data = torch.tensor(outputs)
    sizes = ((4, 6), (2, 3))
    return [torch.zeros(1, K, *x) for x in sizes], [torch.zeros(1, 2, *x) for x in sizes]


def test_predictor_by_hand():
    """Outputs (0.5, -1, 0.25, 1) are 16, 0, 8 and 32 pixels at stride 8, and twice that at 16."""
    predictor = SAPDPredictor(num_classes=K, in_channels=2)
    class_maps, features = maps(predictor, [0.5, -1.0, 0.25, 1.0])
    grid = make_grid(
        [(4, 6), (2, 3)], [8, 16], 0.5, device=torch.device("cpu"), dtype=torch.float32
    )
    got = predictor(class_maps, features, grid)
    assert got.boxes[0, 7].tolist() == [12 - 16, 12 - 0, 12 + 8, 12 + 32]  # cell (1, 1)
    assert got.boxes[0, 24].tolist() == [8 - 32, 8 - 0, 8 + 16, 8 + 64]
    assert got.priors[0, :].tolist() == [4 - 16, 4 - 16, 4 + 16, 4 + 16]
    assert got.quality is None
    assert got.logits.shape == (1, 30, K)
    assert got.level_sizes == (24, 6)


def test_distances_are_detectron2s_with_anchors_of_four_strides():
    """Eq. 1: of a box's distances over 4 strides its predictor makes the box again."""
    grid = make_grid([(4, 6)], [8], 0.5, device=torch.device("cpu"), dtype=torch.float32)
    coder = Box2BoxTransformLinear(normalize_by_size=True)
    anchors = squares(grid.locations, 4 * grid.strides)
    box = torch.tensor([0.0, 0.0, 80.0, 80.0]).expand(24, 4)
    deltas = coder.get_deltas(anchors, box)
    # Cell (4, 4) of P3 would lie at (36, 36): here (5, 3) at (44, 28).
    torch.testing.assert_close(deltas[23], torch.tensor([44.0, 28.0, 36.0, 52.0]) / 32)
    predictor = SAPDPredictor(num_classes=K, in_channels=2)
    class_maps, features = maps(predictor, deltas[23].tolist())
    got = predictor(class_maps[:1], features[:1], grid).boxes[0]
    torch.testing.assert_close(got[23], box[23])
    torch.testing.assert_close(got, coder.apply_deltas(deltas[23].expand(24, 4), anchors))


def test_predictor_begins_as_the_paper_says():
    torch.manual_seed(0)
    predictor = SAPDPredictor(num_classes=K, in_channels=64)
    assert predictor.bbox_pred.bias.tolist() == pytest.approx([0.1] * 4)
    assert predictor.bbox_pred.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert (predictor.class_kernel_size, predictor.class_bias, predictor.unit) == (3, True, 4.0)
    net = FeatureSelectionNet(channels=32, num_levels=5, hidden_channels=32)
    for name, value in net.named_parameters():
        if name.endswith("bias"):
            assert (value == 0).all()
        else:
            assert value.std().item() == pytest.approx(0.01, rel=0.15), name


@pytest.mark.parametrize(
    ("box", "rule", "counts"),
    [
        # Of (100, 60)-(260, 180) the region is (164, 108)-(196, 132). Points of P3 at 8 i + 4: x
        # from 164 to 196 is 5 of them, both ends included, y 108, ..., 132 is 4. Of P4: 168 and 184
        # times 120. From P5 on: 176 and 208 miss, so the cell at the middle alone.
        ([100, 60, 260, 180], "center", [20, 2, 1, 1, 1]),
        # Squares: P4 x from 160 to 208, y from 96 to 144: 3 x 3. P5 160-224, 96-160: 2 x 2. P6
        # 128-256, 64-192: 2 x 2. P7 128-256, 0-256: 1 x 2.
        ([100, 60, 260, 180], "cell", [20, 9, 4, 4, 2]),
        ([0, 0, 80, 80], "center", [4, 1, 1, 1, 1]),
        ([0, 0, 80, 80], "cell", [4, 1, 1, 1, 1]),
    ],
)
def test_positives_of_each_level_by_hand(box, rule, counts):
    """Each level in its turn predicts the box."""
    for level, count in enumerate(counts):
        shares = [1.0 if x == level else 0.1 for x in range(5)]
        predictions = planted(predict(), [float(x) for x in box], *shares)
        truth = [instances([[float(x) for x in box]], [1])]
        targets = assign(make_assigner(positive_rule=rule, **BASELINE), predictions, truth)
        found = (targets.labels[0] == 1).nonzero().flatten()
        assert targets.extras["best_levels"].tolist() == [level]
        assert len(found) == count
        end = [*STARTS, sum(predictions.level_sizes)][level + 1]
        assert ((found >= STARTS[level]) & (found < end)).all()


def test_weights_by_hand():
    """Box (0, 0, 80, 80) on P3: points (36, 36) to (44, 44), all 36 and 44 from the sides.

    So f = (36 / 44)^2 = 0.669421 four times, and both normalisers are their sum, 2.677686. The
    box (100, 60, 260, 180) on P4: (168, 120) is 68 and 92 from left and right, 60 from top and
    bottom: 68 / 92 = 0.739130; (184, 120) is 84 and 76: 76 / 84 = 0.904762.
    """
    box = [0.0, 0.0, 80.0, 80.0]
    predictions = planted(predict(), box, 1.0, 0.5, 0.5, 0.5, 0.5)
    targets = assign(make_assigner(), predictions, [instances([box], [2])])
    rows = [4 + 4 * 40, 5 + 4 * 40, 4 + 5 * 40, 5 + 5 * 40]
    assert (targets.labels[0] == 2).nonzero().flatten().tolist() == rows
    torch.testing.assert_close(targets.box_weights[0, rows], torch.full((4,), 0.669421))
    torch.testing.assert_close(targets.cls_weights[0, rows, 0], targets.box_weights[0, rows])
    assert targets.cls_weights.shape == (1, 1706, 1)
    assert (targets.cls_weights[0, targets.labels[0] == K] == 1).all()
    assert targets.box_weights.count_nonzero() == 4
    assert targets.cls_normalizer.item() == pytest.approx(4 * 81 / 121)
    assert targets.box_normalizer.item() == pytest.approx(4 * 81 / 121)
    assert targets.quality is None
    assert targets.boxes[0, rows].tolist() == [box] * 4
    assert targets.extras["gt_index"][0, rows].tolist() == [0] * 4

    box = [100.0, 60.0, 260.0, 180.0]
    predictions = planted(predict(), box, 0.5, 1.0, 0.5, 0.5, 0.5)
    targets = assign(make_assigner(), predictions, [instances([box], [2])])
    rows = [1280 + 7 * 20 + 10, 1280 + 7 * 20 + 11]
    torch.testing.assert_close(targets.box_weights[0, rows], torch.tensor([0.739130, 0.904762]))
    assert targets.box_weights.count_nonzero() == 2


def test_losses_by_hand():
    """The first box of the last test, of four positives; P3 predicts half of it everywhere.

    IoU 1/2 costs ln 2 = 0.693147 at each positive: weighted and divided by the weights' sum, that
    is ln 2. All scores are 1/2: a background entry costs 0.75 / 4 * ln 2 = 0.129965, an object's
    0.25 / 4 * ln 2 = 0.043322. A positive has one of these and two of those, times 0.669421.
    """
    box = [0.0, 0.0, 80.0, 80.0]
    predictions = planted(predict(), box, 0.5, 0.1, 0.1, 0.1, 0.1)
    targets = assign(make_assigner(), predictions, [instances([box], [2])])
    assert IoUTerm()(predictions, targets).item() == pytest.approx(math.log(2), rel=1e-5)
    total, negative, positive = 4 * 81 / 121, 3 / 16 * math.log(2), math.log(2) / 16
    cls = (1702 * 3 * negative + total * (positive + 2 * negative)) / total
    assert FocalTerm()(predictions, targets).item() == pytest.approx(cls, rel=1e-5)


def test_order_of_levels_by_hand():
    """Shares 0.3, 0.9, 0.5, 0.7, 0.6 of the box: P4, P6, P7, P5, P3 is the order.

    In the soft phase with three levels these are P4, P6 and P7, each with the softmax of its
    logit; a network of zeros says 0.2 everywhere, and renormalised that is a third.
    """
    box = [100.0, 60.0, 260.0, 180.0]
    predictions = planted(predict(), box, 0.3, 0.9, 0.5, 0.7, 0.6)
    truth = [instances([box], [0])]
    for renormalize, weight in ((False, 0.2), (True, 1 / 3)):
        for top_k, kept in ((1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (5, [0, 1, 2, 3, 4])):
            assigner = make_assigner(
                soft_start=0.0, top_k=top_k, renormalize_levels=renormalize, use_soft_weights=False
            )
            for parameter in assigner.parameters():
                parameter.data.zero_()
            targets = assign(assigner, predictions, truth)
            value = 1 / top_k if renormalize else weight
            wanted = [value if level in kept else 0.0 for level in range(5)]
            assert targets.extras["level_weights"][0].tolist() == pytest.approx(wanted)
            assert targets.extras["best_levels"].tolist() == [1]
            found = targets.box_weights[0][targets.labels[0] == 0].unique()
            assert found.tolist() == pytest.approx([value])


def test_ties_and_nan():
    """Of equal levels the finer ones are best; one with a NaN comes last, whatever else it says."""
    box = [100.0, 60.0, 260.0, 180.0]
    truth = [instances([box], [0])]
    alike = planted(predict(), box, 0.5, 0.5, 0.5, 0.5, 0.5)
    options = {"soft_start": 0.0, "top_k": 2}
    targets = assign(make_assigner(**options), alike, truth)
    assert targets.extras["level_weights"][0].gt(0).tolist() == [True, True, False, False, False]
    for name in ("logits", "boxes"):
        broken = getattr(planted(predict(), box, 1.0, 0.5, 0.4, 0.3, 0.2), name).clone()
        broken[0, 18 * 40 + 22] = math.nan  # no: outside of the region
        broken[0, 14 * 40 + 22] = math.nan  # (180, 116), inside
        predictions = planted(predict(), box, 1.0, 0.5, 0.4, 0.3, 0.2)._replace(**{name: broken})
        targets = assign(make_assigner(**options), predictions, truth)
        assert targets.extras["best_levels"].tolist() == [1]
        assert targets.extras["level_weights"][0, 0] == 0
    everything = predict()._replace(logits=torch.full((1, 1706, K), math.nan))
    assert assign(make_assigner(), everything, truth).extras["best_levels"].tolist() == [0]


def test_smaller_objects_take_cells_but_not_losses():
    """A box in the middle of another, both on P3: shared cells are the small one's.

    (60, 60)-(100, 100) has the region (76, 76)-(84, 84): points at 76 and 84, four cells. The
    region of (0, 0)-(160, 160) is (64, 64)-(96, 96): 68, 76, 84 and 92, 16 cells, of which it keeps
    12. Of two equal boxes the first takes all. A smaller one on another level takes nothing.
    """
    small, large = [60.0, 60.0, 100.0, 100.0], [0.0, 0.0, 160.0, 160.0]
    predictions = planted(predict(), large, 1.0, 0.1, 0.1, 0.1, 0.1)
    assigner = make_assigner(**BASELINE)
    for boxes, order in (([large, small], (0, 1)), ([small, large], (1, 0))):
        targets = assign(assigner, predictions, [instances(boxes, [0, 1])])
        found = targets.extras["gt_index"][0].add(1).bincount(minlength=3)[1:]
        assert found[list(order)].tolist() == [12, 4]
    targets = assign(assigner, predictions, [instances([large, large], [0, 1])])
    assert targets.extras["gt_index"][0].add(1).bincount().tolist()[1:] == [16]
    assert (targets.labels == 0).sum() == 16
    boxes = predictions.boxes.clone()
    boxes[0, 1280:1600] = torch.tensor(small)
    targets = assign(
        assigner, predictions._replace(boxes=boxes), [instances([large, small], [0, 1])]
    )
    assert targets.extras["best_levels"].tolist() == [0, 1]
    assert targets.extras["gt_index"][0, :1280].add(1).bincount().tolist()[1:] == [16]


def test_other_offsets():
    """A head whose cells stand for their corners: x = 164 to 196 holds 168, ..., 192 of P3."""
    box = [100.0, 60.0, 260.0, 180.0]
    predictions = planted(predict(offset=0.0), box, 1.0, 0.1, 0.1, 0.1, 0.1)
    targets = assign(make_assigner(**BASELINE), predictions, [instances([box], [1])])
    places = predictions.locations[targets.labels[0] == 1]
    assert places[:, 0].unique().tolist() == [168, 176, 184, 192]
    assert places[:, 1].unique().tolist() == [112, 120, 128]


def test_levels_are_found_with_the_box_loss_that_is_asked_for():
    """P3 predicts an overlap of 0.02 at two cells and 1 at two others, P4 0.3 everywhere.

    Mean -ln IoU: 3.9 / 2 = 1.96 and 1.20, so P4. Mean 1 - IoU: 0.49 and 0.7, so P3.
    """
    box = [0.0, 0.0, 80.0, 80.0]
    predictions = planted(predict(), box, 1.0, 0.3, 0.1, 0.1, 0.1)
    predictions.boxes[0, [4 + 4 * 40, 5 + 4 * 40], 2] = 80 * 0.02
    truth = [instances([box], [1])]
    for loss, level in ((None, 1), (linear_iou_loss, 0)):
        extra = {} if loss is None else {"box_loss": loss}
        assigner = SAPDAssigner(num_classes=K, channels=2, num_levels=5, max_iter=9, **extra)
        assert assign(assigner, predictions, truth).extras["best_levels"].tolist() == [level]


def iterations(assigner, *numbers):
    found = []
    for number in numbers:
        with EventStorage(number):
            found.append(assigner.is_soft())
    return found


@pytest.mark.parametrize(
    ("share", "max_iter", "first"),
    [(0.5, 90000, 45000), (0.5, 5, 3), (0.07, 100, 7), (0.0, 8, 0), (0.5, 2, 1)],
)
def test_the_soft_phase_begins_at_one_iteration(share, max_iter, first):
    assigner = make_assigner(soft_start=share, max_iter=max_iter)
    assert iterations(assigner, first, first + 1, max_iter - 1)[:2] == [True, True]
    assert first == 0 or iterations(assigner, first - 1, 0) == [False, False]


def test_phases_that_never_come():
    """A share of 1, a training of one step, and methods without soft levels."""
    never = iterations(make_assigner(soft_start=1.0, max_iter=90), 0, 89, 90, 10**9)
    assert never == [False] * 4  # also when a trained model is looked at
    assert iterations(make_assigner(max_iter=1), 0) == [False]
    for options in (BASELINE, {"use_soft_levels": False, "select_train_only": True}):
        assert iterations(make_assigner(soft_start=0.0, **options), 0, 9) == [False, False]


def test_outside_of_a_trainer_it_is_the_first_iteration():
    assert not make_assigner(soft_start=0.5).is_soft()
    assert make_assigner(soft_start=0.0).is_soft()


def test_targets_change_at_the_phase_s_first_iteration():
    """A storage that begins there, as a resumed training's, is as good as one that got there."""
    box = [100.0, 60.0, 260.0, 180.0]
    predictions = planted(predict(), box, 0.3, 0.9, 0.5, 0.7, 0.6)
    assigner = make_assigner(max_iter=10)
    numbers = []
    for number in (0, 4, 5, 9):
        with EventStorage(number) as storage:
            targets = assign(assigner, predictions, [instances([box], [1])])
            numbers.append(int((targets.extras["level_weights"] > 0).sum()))
            assert storage.iter == number
    assert numbers == [1, 1, 3, 3]
    with EventStorage(0) as storage:
        for _ in range(20):  # calls do not count: steps of several batches have several
            assign(assigner, predictions, [instances([box], [1])])
        assert not assigner.is_soft()
        storage.iter = 5
        assert assigner.is_soft()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"exponent": 0}, r"exponent is 0; wanted is a positive number, such as 1"),
        ({"top_k": 0}, r"top_k is 0; wanted is a number of levels from 1"),
        ({"soft_start": 1.5}, r"soft_start is 1\.5; wanted is a share from 0 to 1"),
        ({"shrink": -0.2}, r"shrink is -0\.2; wanted is a positive number, such as 0\.2"),
        ({"positive_rule": "middle"}, r"'middle'; wanted is one of \('center', 'cell'\)"),
        ({"unselected": "x"}, r"'x'; wanted is one of \('negative', 'ignore_class', 'ignore_all'"),
        ({"ignore_scale": 0.1}, r"ignore_scale is 0\.1; .*more than shrink, 0\.2, such as 0\.5"),
        ({"select_train_only": True}, r"set assigner\.options\.use_soft_levels=False"),
    ],
)
def test_bad_options(values, message):
    with pytest.raises(ValueError, match=message):
        SAPDOptions(**values)


def test_bad_input():
    with pytest.raises(ValueError, match=r"top_k is 3, and there are 2 .*top_k=2 at most"):
        make_assigner(num_levels=2)
    with pytest.raises(ValueError, match=r"max_iter is 0; .*\$\{train\.max_iter\}"):
        make_assigner(max_iter=0)
    with pytest.raises(TypeError, match=r"box_loss must be callable, such as iou_loss: 'giou'"):
        SAPDAssigner(num_classes=K, channels=2, num_levels=5, max_iter=9, box_loss="giou")
    with pytest.raises(ValueError, match=r"predictor\.unit is 0; wanted is a positive number"):
        SAPDPredictor(num_classes=K, in_channels=2, unit=0)
    truth = stack_ground_truth([instances([], [])])
    with pytest.raises(ValueError, match=r"built for 2 levels of 4 channels, and gets \[4, 3\]"):
        FeatureSelectionNet(channels=4, num_levels=2, hidden_channels=4)(
            [torch.zeros(1, 4, 4, 4), torch.zeros(1, 3, 2, 2)], list(torch.ones(2)), truth
        )
    targets = assign(make_assigner(**BASELINE), predict(), [instances([], [])])
    assert "level_logits" not in targets.extras
    with pytest.raises(ValueError, match=r"gives only \[.*select_train_only=True, or remove"):
        LevelSelectionTerm()(predict(), targets)
    with pytest.raises(ValueError, match="exactly one prediction per cell"):
        assign(make_assigner(), predict(), [instances([], [])], sizes=[*SIZES[:4], (3, 3)])


def test_ground_truth_keeps_its_boxes():
    box = torch.tensor([[0.0, 0.0, 80.0, 80.0]])
    truth = [instances(box.clone(), [1])]
    assign(make_assigner(), predict(), truth)
    assert isinstance(truth[0].gt_boxes, Boxes)
    assert torch.equal(truth[0].gt_boxes.tensor, box)
