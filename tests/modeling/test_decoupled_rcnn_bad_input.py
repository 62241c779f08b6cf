# SPDX-License-Identifier: Apache-2.0
"""Batches without objects, proposals or positives; weights that are no numbers; wrong settings."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoupled_rcnn_parts import (
    LEVELS,
    OBJECTS,
    SIZE,
    box_branches,
    fc_head,
    features_of,
    heads_of,
    near,
    pooler_of,
    proposals_of,
    scene,
    targets_of,
)
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from util import loss_sum, random_input, tiny_model, without_gradient

from d2_decouple.modeling import ClassBranch, DecoupledProposals, DecoupledROIHeads

NAME = "decoupled_rcnn_R_18_FPN_bccd"
NOTHING: Any = ([], [])
STAGES = [f"loss_box_reg_stage{stage}" for stage in range(3)]
KINDS = {
    "fc": lambda: box_branches(3),
    "shared": lambda: box_branches(3, kind="shared"),
    "convolutions": lambda: box_branches(3, kind="conv"),
    "one stage": lambda: box_branches(1),
}


def step(
    heads: DecoupledROIHeads, proposals: Any, objects: Any, features: Any = None
) -> tuple[dict[str, float], dict[str, float]]:
    """Losses and what was logged; every parameter must get a gradient that is finite."""
    features = features_of() if features is None else features
    with EventStorage() as storage:
        _, losses = heads(None, features, proposals, targets_of(objects))
        logged = {name: value for name, (value, _) in storage.latest().items()}
    loss_sum(losses).backward()
    assert without_gradient(heads) == []
    return {name: loss.item() for name, loss in losses.items()}, logged


def dense(*boxes: Any) -> DecoupledProposals:
    found = [proposals_of(x) for x in boxes]
    return DecoupledProposals(found, found)


# Nothing to learn.


@pytest.mark.parametrize("kind", KINDS)
def test_no_objects(kind: str) -> None:
    """The class branch learns background; the box branches have loss zero (9.5, test 5)."""
    losses, logged = step(heads_of(KINDS[kind]()), scene()[0], [NOTHING, NOTHING])
    assert losses.pop("loss_cls") > 0
    assert set(losses.values()) == {0}
    assert logged["roi_head/num_positives_stage0"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objects", [OBJECTS, (NOTHING, NOTHING)])
def test_no_proposals(kind: str, objects: Any) -> None:
    """With objects, these are all that the class branch gets. Without, it gets nothing either."""
    losses, _ = step(heads_of(KINDS[kind]()), dense([], []), objects)
    assert (losses.pop("loss_cls") > 0) == (objects is OBJECTS)
    assert set(losses.values()) == {0}


@pytest.mark.parametrize("kind", KINDS)
def test_no_proposals_at_test(kind: str) -> None:
    heads = heads_of(KINDS[kind]()).eval()
    found, losses = heads(None, features_of(), [proposals_of([]), proposals_of([])])
    assert losses == {}
    for detections in found:
        assert (len(detections), detections.image_size) == (0, SIZE)
        assert detections.pred_boxes.tensor.shape == (0, 4)
        assert detections.stage_boxes.shape == (0, len(heads.box_branches) + 1, 4)


def test_one_image_without_proposals() -> None:
    """Between two that have some: nothing slips to another image."""
    boxes, classes = OBJECTS[0]
    rows = near(boxes, 6, 0.05)
    objects = [(boxes, classes), NOTHING, (boxes, classes)]
    features = features_of(3)
    both = {name: x[[0, 2]] for name, x in features.items()}
    heads = heads_of(batch_size_per_image=512)
    with_gap, _ = step(heads, dense(rows, [], rows), objects, features)
    without, _ = step(heads, dense(rows, rows), [objects[0], objects[2]], both)
    assert with_gap == pytest.approx(without, rel=1e-5)
    heads.eval()
    proposals = dense(rows, [], rows)
    found, _ = heads(None, features, list(proposals))
    expected, _ = heads(None, both, [proposals[0], proposals[2]])
    assert [len(x) for x in found] == [len(expected[0]), 0, len(expected[1])]
    assert len(found[0]) > 0
    torch.testing.assert_close(found[2].pred_boxes.tensor, expected[1].pred_boxes.tensor)


def test_no_positives_from_the_second_stage_on() -> None:
    """Stage 0 moves all of them ten times their size away."""
    heads = heads_of()
    heads.box_branches[0].bbox_pred.bias.data.fill_(100.0)
    losses, logged = step(heads, scene()[0], OBJECTS)
    assert losses["loss_box_reg_stage0"] > 0
    assert (losses["loss_box_reg_stage1"], losses["loss_box_reg_stage2"]) == (0, 0)
    counts = [logged[f"roi_head/num_positives_stage{stage}"] for stage in range(3)]
    assert counts[0] > 0
    assert counts[1:] == [0, 0]


def test_proposals_without_area() -> None:
    """Flat in either direction or both, on the border or outside: in training and at test."""
    flat = [
        [20.0, 20, 20, 60],
        [20.0, 20, 60, 20],
        [30.0, 30, 30, 30],
        [128.0, 0, 128, 96],
        [0.0, 0, 0, 0],
        [200.0, 200, 210, 210],
    ]
    for kind in KINDS.values():
        heads = heads_of(kind())
        rows = torch.cat((torch.tensor(flat), near(OBJECTS[0][0], 4)))
        losses, _ = step(heads, dense(rows, flat), OBJECTS)
        assert all(0 < loss < float("inf") for loss in losses.values())
        heads.selection.test_score_thresh = 0.0
        found, _ = heads.eval()(None, features_of(), [proposals_of(rows), proposals_of(flat)])
        assert all(x.pred_boxes.tensor.isfinite().all() for x in found)
        assert all(x.scores.isfinite().all() for x in found)


def test_objects_without_area() -> None:
    """Nothing overlaps them, so the box branches learn as if there were none."""
    flat = [[20.0, 20, 20, 60], [30.0, 30, 30, 30]]
    proposals, features, heads = scene()[0], features_of(), heads_of()
    losses, _ = step(heads, proposals, [(flat, [0, 1]), OBJECTS[1]], features)
    expected, _ = step(heads, proposals, [NOTHING, OBJECTS[1]], features)
    assert losses[STAGES[2]] == pytest.approx(expected[STAGES[2]]) != 0
    assert losses[STAGES[1]] == pytest.approx(expected[STAGES[1]]) != 0
    assert losses["loss_cls"] < float("inf")  # it has them as regions, as Detectron2's


def test_ignored_regions_of_a_matcher() -> None:
    """A region of either branch may be neither positive nor negative."""
    matcher = Matcher([0.3, 0.5], [0, -1, 1])
    heads = heads_of(box_matcher=matcher, proposal_matcher=matcher)
    losses, _ = step(heads, scene()[0], OBJECTS)
    assert all(0 < loss < float("inf") for loss in losses.values())


# Weights and maps that are no numbers.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_weights_of_a_stage_that_are_no_numbers(stage: int, training: bool) -> None:
    heads, (proposals, targets) = heads_of().train(training), scene()
    heads.box_branches[stage].bbox_pred.weight.data[0, 0] = torch.nan
    message = rf"^regression stage {stage + 1} of 3 predicts NaN or infinity for \d+ of \d+ regions"
    with EventStorage(), pytest.raises(FloatingPointError, match=message) as raised:
        heads(None, features_of(), proposals, targets)
    assert "lower the learning rate or type train.max_grad_norm=10" in str(raised.value)


def test_maps_that_are_no_numbers() -> None:
    """Of one image of two: the message counts its regions."""
    features = features_of()
    for x in features.values():
        x[1] = torch.inf
    heads, (proposals, targets) = heads_of(), scene()
    with EventStorage(), pytest.raises(FloatingPointError, match="stage 1 of 3") as raised:
        heads(None, features, proposals, targets)
    bad, total = map(int, re.findall(r"(\d+) of (\d+) regions", str(raised.value))[0])
    assert 0 < bad < total


def test_rpn_that_has_diverged() -> None:
    model, inputs = tiny_model(NAME), [random_input((64, 64), 2)]
    model.proposal_generator.rpn_head.objectness_logits.bias.data.fill_(torch.nan)
    with EventStorage(), pytest.raises(FloatingPointError, match=r"RPN.*level 0.*learning rate"):
        model(inputs)
    with torch.no_grad():
        (result,) = model.eval()(inputs)
    assert len(result["instances"]) == 0


# Proposals of one density.


def precomputed(model: Any, inputs: list[dict[str, Any]]) -> Any:
    """As Detectron2's LOAD_PROPOSALS."""
    model.proposal_generator = None
    for item in inputs:
        size = item["image"].shape[1:]
        boxes = Boxes(torch.rand(30, 4) * 20 + torch.tensor([0.0, 0, 30, 30]))
        item["proposals"] = Instances(
            tuple(size), proposal_boxes=boxes, objectness_logits=torch.zeros(30)
        )
    return model


def test_precomputed_proposals_are_for_evaluation() -> None:
    model, inputs = tiny_model(NAME), [random_input((64, 64), 2), random_input((48, 64), 0)]
    precomputed(model, inputs)
    with EventStorage(), pytest.raises(TypeError, match="precomputed") as raised:
        model(inputs)
    for part in ("got a list of 2", "DecoupledRPN", "used for evaluation"):
        assert part in str(raised.value)
    with torch.no_grad():
        results = model.eval()(inputs)
    assert all(len(x["instances"]) > 0 for x in results)


def test_proposals_of_both_densities_serve_at_test() -> None:
    """The class branch's are taken."""
    heads, (proposals, _) = heads_of().eval(), scene()
    features = features_of()
    with torch.no_grad():
        found, _ = heads(None, features, proposals)
        expected, _ = heads(None, features, list(proposals))
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got.pred_boxes.tensor, want.pred_boxes.tensor)


def test_a_slice_has_lost_the_second_set() -> None:
    heads, (proposals, targets) = heads_of(), scene()
    with EventStorage(), pytest.raises(TypeError, match="a slice or a copy"):
        heads(None, features_of(1), proposals[:1], targets[:1])


def test_training_without_ground_truth() -> None:
    with EventStorage(), pytest.raises(AssertionError, match="ground truth in training"):
        heads_of()(None, features_of(), scene()[0])


# Settings.


def classes(count: int, stage: int) -> Callable[[], DecoupledROIHeads]:
    def build() -> DecoupledROIHeads:
        branches = box_branches(2)
        branches[stage].num_classes = count
        return heads_of(branches)

    return build


BAD: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "a weight too many": (
        lambda: heads_of(box_branches(2), stage_loss_weights=[1, 0.5, 0.25]),
        ["2 box_branches", "3 stage_loss_weights", "a weight for each"],
    ),
    "no stage": (lambda: heads_of([]), ["0 box_branches", "at least one stage"]),
    "classes of the classifier": (
        lambda: heads_of(class_branch=ClassBranch(head=fc_head(), num_classes=5)),
        ["num_classes is 3", "'class_branch': 5", '"${...num_classes}"'],
    ),
    "classes of a stage": (classes(80, 0), ["num_classes is 3", "'box_branches[0]': 80", "alike"]),
    "classes of a later stage": (classes(2, 1), ["num_classes is 3", "'box_branches[1]': 2"]),
    "more maps than scales": (
        lambda: heads_of(box_pooler=pooler_of([4, 8, 16])),
        [f"box_in_features names {LEVELS}", "3 scales", "1 / stride"],
    ),
    "fewer maps than scales": (
        lambda: heads_of(box_in_features=LEVELS[:2]),
        [f"box_in_features names {LEVELS[:2]}", "4 scales"],
    ),
    "no regions": (
        lambda: heads_of(box_batch_size_per_image=0),
        ["box_batch_size_per_image is 0", "such as 512"],
    ),
    "a negative weight": (
        lambda: heads_of(box_loss_weight=-0.5),
        ["box_loss_weight is -0.5", "from 0"],
    ),
    "a stage's weight that is no number": (
        lambda: heads_of(stage_loss_weights=[1, float("nan"), 0.25]),
        ["stage_loss_weights (1.0, nan, 0.25)", "from 0"],
    ),
    "masks on predicted boxes": (
        lambda: heads_of(train_on_pred_boxes=True),
        ["train_on_pred_boxes is on", "turn it off"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str) -> None:
    build, named = BAD[case]
    with pytest.raises(ValueError, match=r".") as raised:
        build()
    assert all(part in str(raised.value) for part in named), raised.value


def test_what_is_fine() -> None:
    """A change for all classes at the first stage, and a switch that is off."""
    branches = box_branches(2)[1:]
    assert branches[0].num_classes is None
    heads = heads_of(branches, train_on_pred_boxes=False, stage_loss_weights=(2,))
    losses, _ = step(heads, scene()[0], OBJECTS)
    assert list(losses) == ["loss_cls", STAGES[0]]
