# SPDX-License-Identifier: Apache-2.0
"""Which cells learn which object: by hand, with scripted assigners, and in the image's frame."""

import math

import numpy as np
import pytest
import torch
from assignment_scenes import (
    EDGE,
    PREDICTIVE,
    RULES,
    SAPD,
    SMALL,
    WHOLE,
    build,
    listed,
    picture,
    shared,
    truth_of,
)
from detectron2.data import transforms as T
from torch import nn
from util import tiny_model

from d2_decouple.config import ConfigError
from d2_decouple.engine.predictor import Predictor
from d2_decouple.structures import DenseTargets
from d2_decouple.visualization import draw_assignment


@pytest.fixture(scope="module")
def fcos():
    return shared(RULES[0])


def test_cells_of_fcos_by_hand(fcos):
    """Seen, the box is (40, 24, 80, 56) with its middle at (60, 40).

    Of P3's locations 8 i + 4, less than 1.5 * 8 = 12 from it are x = 52, 60, 68 and y = 36, 44.
    At x = 60 the sides are 20 and 20 away, at 52 and 68 12 and 28; in y always 12 and 20.
    """
    seen = fcos.assignment(picture(), truth_of(SMALL))
    (labels,) = seen.sets
    middle, beside = math.sqrt(12 / 20), math.sqrt(12 / 28 * 12 / 20)
    # A location is the middle of its cell, which has 8 pixels seen and 4 of the image.
    expected = {
        (0, x, y, x + 4, y + 4, 0): (1.0, pytest.approx(middle if x == 28 else beside))
        for x in (24, 28, 32)
        for y in (16, 20)
    }
    assert listed(labels) == expected
    assert labels.learns == "class and box"
    assert labels.predictions.tolist() == [1] * 6
    assert labels.strengths.tolist() == [1] * 6
    assert not len(labels.ignored)
    assert (seen.assigner, seen.by_predictions) == ("FCOSAssigner", False)
    assert seen.level_names == ("p3", "p4", "p5", "p6", "p7")
    assert seen.strides == (8, 16, 32, 64, 128)
    assert seen.gt_boxes.tolist() == [list(SMALL)]
    assert seen.gt_classes.tolist() == [0]


def test_levels_and_objects_by_hand(fcos):
    """The whole image has its middle there, too: P4's 16 i + 8 are less than 24 away at x = 40,
    56, 72 and y = 24, 40, 56. At P3 no side may be more than 64 away, so x = 60 alone is left,
    and these two cells the smaller object has. In the other order they are the same.
    """
    of_small = {(0, x, y, x + 4, y + 4) for x in (24, 28, 32) for y in (16, 20)}
    of_whole = {(1, x, y, x + 8, y + 8) for x in (16, 24, 32) for y in (8, 16, 24)}
    for order in ((SMALL, WHOLE), (WHOLE, SMALL)):
        (labels,) = fcos.assignment(picture(), truth_of(*order)).sets
        expected = {(*cell, order.index(SMALL)) for cell in of_small}
        expected |= {(*cell, order.index(WHOLE)) for cell in of_whole}
        assert set(listed(labels)) == expected
    (alone,) = fcos.assignment(picture(), truth_of(WHOLE)).sets
    at_p3 = {(0, 28, y, 32, y + 4, 0) for y in (16, 20)}
    assert set(listed(alone)) == {(*cell, 0) for cell in of_whole} | at_p3


@pytest.mark.parametrize("name", [*RULES, *PREDICTIVE, *SAPD])
def test_whether_predictions_count(name):
    seen = shared(name).assignment(picture(), truth_of(SMALL, WHOLE, EDGE))
    assert seen.by_predictions == (name not in RULES)


@pytest.mark.parametrize("name", SAPD)
def test_sapd_is_shown_as_at_the_end_of_a_training(name):
    """There an object has several levels; in the first half of a training it has one."""
    (labels,) = shared(name).assignment(picture(), truth_of(SMALL)).sets
    assert len(labels.levels.unique()) > 1
    assert float(labels.cls_weights.max()) < 1


class Scripted(nn.Module):
    """Answers with given targets."""

    def __init__(self, write):
        super().__init__()
        self.write = write

    def forward(self, features, predictions, gt_instances):
        assert self.training
        assert all(x.dtype == torch.float32 for x in features)
        assert not torch.is_autocast_enabled("cpu")
        count = len(predictions.locations)
        one = torch.ones(())
        targets = DenseTargets(
            labels=torch.full((1, count), 3),
            boxes=torch.zeros(1, count, 4),
            cls_weights=torch.zeros(1, count, 3),
            box_weights=torch.zeros(1, count),
            quality=None,
            cls_normalizer=one,
            box_normalizer=one,
            extras={},
        )
        return self.write(targets, gt_instances[0])


def scripted(write, **options):
    predictor = build(RULES[0], **options)
    predictor.model.assigner = Scripted(write)
    return predictor


def test_weights_of_the_objects_class_faint_cells_and_unknown_sets():
    """P3 has 16 x 12 cells of 4 pixels, as 80 x 120 is padded to 96 x 128."""

    def write(targets, known):
        # Two objects of one class and one of another, told apart by their boxes alone.
        for row, index, weight in ((17, 2, 1.0), (18, 2, 0.011), (19, 2, 0.009), (33, 1, 0.02)):
            targets.labels[0, row] = known.gt_classes[index]
            targets.boxes[0, row] = known.gt_boxes.tensor[index] + 0.01
            targets.cls_weights[0, row] = 7.0
            targets.cls_weights[0, row, known.gt_classes[index]] = weight
        targets.labels[0, 14:16] = -1  # from x = 56 and 60: the second is padding
        second = targets._replace(cls_weights=targets.cls_weights * 2, extras={})
        return targets._replace(extras={"later": second})

    truth = truth_of(WHOLE, SMALL, EDGE, classes=[0, 1, 1])
    predictor = scripted(write)
    seen = predictor.assignment(picture(), truth)
    first, second = seen.sets
    assert [first.learns, second.learns] == ["class and box", "later"]
    assert first.gt_index.tolist() == [2, 2, 1]
    assert first.cells.tolist() == [[4, 4, 8, 8], [8, 4, 12, 8], [4, 8, 8, 12]]
    assert first.cls_weights.tolist() == pytest.approx([1.0, 0.011, 0.02])
    assert second.box_weights.tolist() == [0] * 3
    assert second.cls_weights.tolist() == pytest.approx([2.0, 0.022, 0.04])
    assert first.ignored.tolist() == [[56, 0, 60, 4]]
    assert first.ignored_levels.tolist() == [0]


def test_precisions_give_the_same_cells(fcos):
    half = build(RULES[0], precision="bfloat16").assignment(picture(), truth_of(SMALL, WHOLE))
    full = fcos.assignment(picture(), truth_of(SMALL, WHOLE))
    assert listed(half.sets[0]) == listed(full.sets[0])
    assert half.sets[0].cells.dtype == torch.float32
    strict = scripted(lambda targets, known: targets, precision="bfloat16")
    assert not len(strict.assignment(picture(), truth_of(SMALL)).sets[0].cells)


@pytest.mark.parametrize("name", [*RULES, *PREDICTIVE, *SAPD])
def test_an_image_without_objects(name):
    seen = shared(name).assignment(picture(), truth_of())
    for labels in seen.sets:
        assert labels.cells.shape == (0, 4)
        assert len(labels.gt_index) == len(labels.strengths) == 0
    assert seen.gt_boxes.shape == (0, 4)
    assert seen.as_records() == []
    assert draw_assignment(picture(), [(name, seen)], ()).dtype == np.uint8


def test_boxes_are_cut_and_those_outside_are_learned_by_nobody(fcos):
    beyond = (-500, 12, 40, 28)
    truth = truth_of((70, 5, 90, 30), beyond, (30, 30, 30, 35), SMALL, classes=[0, 0, 0, 1])
    (labels,) = fcos.assignment(picture(), truth).sets
    (cut,) = fcos.assignment(picture(), truth_of((0, 12, 40, 28), SMALL)).sets
    assert set(labels.gt_index.tolist()) == {1, 3}
    names = {0: 1, 1: 3}
    assert listed(labels) == {(*k[:-1], names[k[-1]]): v for k, v in listed(cut).items()}
    assert fcos.assignment(picture(), truth).gt_boxes[1].tolist() == list(beyond)


def test_cells_lie_on_their_objects_whatever_the_size():
    """A size that no factor brings to another: 61 x 30 is seen as 130 x 64."""
    predictor = build(RULES[0], short=64)
    box = torch.tensor([31.0, 4, 55, 27])
    truth = truth_of(tuple(box.tolist()), size=(30, 61))
    (labels,) = predictor.assignment(picture((30, 61)), truth).sets
    middles = (labels.cells[:, :2] + labels.cells[:, 2:]) / 2
    assert len(middles) >= 4
    assert bool(((middles > box[:2]) & (middles < box[2:])).all())
    sides = labels.cells[:, 2:] - labels.cells[:, :2]
    strides = torch.tensor([8.0, 16, 32, 64, 128])[labels.levels, None]
    torch.testing.assert_close(sides, strides * torch.tensor([61 / 130, 30 / 64]))


def test_the_model_is_not_changed_and_detections_are_the_same():
    """DDOD counts the positives of a training; asking is none."""
    predictor = build("ddod_R_18_FPN_bccd")
    before = {name: x.clone() for name, x in predictor.model.state_dict().items()}
    first = predictor.assignment(picture(), truth_of(SMALL, WHOLE))
    second = predictor.assignment(picture(), truth_of(SMALL, WHOLE))
    assert listed(first.sets[0]) == listed(second.sets[0])
    for name, x in predictor.model.state_dict().items():
        assert torch.equal(x, before[name]), name
    assert not any(x.training for x in predictor.model.modules())
    found = predictor(picture())
    assert torch.equal(first.instances.pred_boxes.tensor, found.pred_boxes.tensor)
    assert torch.equal(first.instances.scores, found.scores)
    first.sets[0].cells.add_(1)  # no tensors of inference mode


def test_records(fcos):
    record = fcos.assignment(picture(), truth_of(SMALL, WHOLE)).as_records()
    weights = 2 * math.sqrt(12 / 20) + 4 * math.sqrt(12 / 28 * 12 / 20)
    p3 = {"cells": 6, "predictions": 6, "class_weight": 6, "box_weight": round(weights, 4)}
    assert record[0] == {
        "class_id": 0,
        "bbox": [20, 12, 40, 28],
        "learned_by": {"class and box": {"p3": p3}},
    }
    assert record[1]["class_id"] == 1
    assert [*record[1]["learned_by"]["class and box"]] == ["p4"]
    pdnet = shared("pdnet_R_18_FPN_bccd").assignment(picture(), truth_of(SMALL))
    (learned,) = (x["learned_by"] for x in pdnet.as_records())
    (level,) = learned["coarse box"].values()
    # The middle, seen at (60, 40), is halfway between two of P3's locations in y.
    assert level == {"cells": 2, "predictions": 2, "box_weight": 2}


def test_the_picture_is_that_of_the_function(fcos):
    seen = fcos.assignment(picture(), truth_of(SMALL))
    named = Predictor(fcos.model, augmentations=[T.ResizeShortestEdge(80, 200)], classes="abc")
    drawn = named.draw_assignment(picture(), truth_of(SMALL))
    assert np.array_equal(drawn, draw_assignment(picture()[..., ::-1], [("", seen)], "abc"))


def test_what_has_no_dense_assigner_is_refused():
    torch.manual_seed(0)
    model = tiny_model("faster_rcnn_R_18_FPN_bccd_d2")
    resize = [T.ResizeShortestEdge(64, 96)]
    two = Predictor(model, augmentations=resize, device="cpu")
    with pytest.raises(ConfigError, match="is not a OneStageDetector") as error:
        two.assignment(picture(), truth_of(SMALL))
    assert "recipes with assignment are atss_R_18_FPN_bccd, " in str(error.value)
    several = build(RULES[0], tta=True)
    with pytest.raises(ConfigError, match="leave tta out to see assignment"):
        several.assignment(picture(), truth_of(SMALL))


def test_objects_that_cannot_be_are_named(fcos):
    for truth, message in (
        (truth_of(SMALL, size=(41, 60)), r"width \(41, 60\), the image has \(40, 60\); give the"),
        (truth_of((1, 2, float("nan"), 9)), "gt_boxes are not all finite; wanted is"),
        (truth_of(SMALL, classes=[3]), "gt_classes has 3, and the model knows the classes 0 to 2"),
        (truth_of(SMALL, classes=[-1]), "gt_classes has -1, and the model knows"),
    ):
        with pytest.raises(ConfigError, match=message):
            fcos.assignment(picture(), truth)
