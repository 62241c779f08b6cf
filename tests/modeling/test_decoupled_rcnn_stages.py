# SPDX-License-Identifier: Apache-2.0
"""The stages: worked by hand, who learns from whom, and that leaving regions out changes nothing.

Numbers in parentheses are those of the fact sheet's list of tests, 9.5.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from decoupled_rcnn_parts import (
    OBJECTS,
    SIZE,
    anywhere,
    box_branches,
    features_of,
    heads_of,
    near,
    proposals_of,
    scene,
    targets_of,
)
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from d2_decouple.modeling import DecoupledProposals, DecoupledROIHeads, HardNMS, RegionSelection
from d2_decouple.modeling.regions import Regions

Rows = Sequence[Sequence[float]]


def losses_of(
    heads: DecoupledROIHeads,
    cls: Sequence[Rows | Tensor],
    reg: Sequence[Rows | Tensor],
    objects: Any,
    features: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """A step of training with these proposals of each image."""
    proposals = DecoupledProposals(*([proposals_of(x) for x in kind] for kind in (cls, reg)))
    features = features_of(len(objects)) if features is None else features
    with EventStorage():
        return heads(None, features, proposals, targets_of(objects))[1]


# By hand. Weights of the last layers are zero, so biases alone tell what is predicted.


def constant_heads(biases: Sequence[Sequence[float]], **changes: Any) -> DecoupledROIHeads:
    """Stage k predicts ``biases[k]`` for each region; a class is as likely as any other."""
    heads = heads_of(box_branches(len(biases)), **changes)
    for layer, bias in zip(heads.box_branches, biases, strict=True):
        nn.init.zeros_(layer.bbox_pred.weight)
        layer.bbox_pred.bias.data.copy_(torch.tensor(bias))
    nn.init.zeros_(heads.class_branch.cls_score.weight)
    return heads


TRUTH = [42.0, 40, 62, 60]  # 20x20
NEAR, FAR, CLS = [40.0, 40, 60, 60], [0.0, 0, 20, 20], [40.0, 38, 60, 58]
OF_CLASS_1 = [9.0] * 4 + [0.5, 0.25, 0.1, 0] + [9.0] * 4
FURTHER = [0.5, 0, 0, 0.25], [1.0, 0, 0, 0]


def test_losses_and_boxes_by_hand() -> None:
    """(7, 9) One object of class 1, two proposals for boxes, three for classes and one object.

    Stage 0, weights 10, 10, 5, 5: from x = 50 to 52 by 20 pixels wide is 10 * 2 / 20 = 1; so
    |0.5 - 1| + 0.25 + 0.1 = 0.85. The class branch has 3 + 1 regions, the box branch 2: it is
    divided by (4 + 2) / 2 = 3. Its change moves the box by 0.05 * 20 = 1 to 51 and by 0.5 to
    50.5, and makes it exp(0.02) times as wide.
    Stage 1, weights 20, 20, 10, 10, divided by 2 regions, of which FAR is one.
    """
    heads = constant_heads([OF_CLASS_1, *FURTHER], box_loss_weight=0.8)
    objects = [([TRUTH], [1])]
    losses = losses_of(heads, [[NEAR, FAR, CLS]], [[NEAR, FAR]], objects)
    width = 20 * math.exp(0.1 / 5)
    stage1 = [20 * 1 / width, 20 * -0.5 / 20, 10 * math.log(20 / width), 0]
    second = sum(abs(a - b) for a, b in zip(FURTHER[0], stage1, strict=True))
    # Moved on by 0.5 / 20 * width, and exp(0.025) times as high.
    x, height = 51 + 0.025 * width, 20 * math.exp(0.025)
    factors = [1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067]
    parts = [(52 - x) / width, -0.5 / height, math.log(20 / width), math.log(20 / height)]
    stage2 = [factor * part for factor, part in zip(factors, parts, strict=True)]
    third = sum(abs(a - b) for a, b in zip(FURTHER[1], stage2, strict=True))
    wanted = {
        "loss_cls": math.log(4),  # of K + 1 = 4 classes, each as likely
        "loss_box_reg_stage0": 0.8 * 0.85 / 3,
        "loss_box_reg_stage1": 0.8 * 0.5 * second / 2,
        "loss_box_reg_stage2": 0.8 * 0.25 * third / 2,
    }
    assert losses.keys() == wanted.keys()
    for name, value in wanted.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-5), name


def test_what_a_stage_hands_on() -> None:
    """Positives moved and cut to the image, others as they were, positives first. The third,
    moved too far, becomes one of the others; it is not moved again, and cannot come back.
    """
    heads = constant_heads([[0.0] * 4 + [10.0, 0, 0, 0] + [0.0] * 4, [0.0] * 4, [0.0] * 4])
    truth, beyond = [60.0, 40, 90, 70], [128 - 25.0, 0, 128, 25]
    targets = targets_of([([truth, beyond], [1, 1])])
    rows = [FAR, [45.0, 40, 75, 70], [60.0, 40, 90, 70], [100.0, 0, 125, 25]]
    sample = heads.sample_boxes([proposals_of(rows)], targets)
    # The second overlaps the first object by 15 of 45: too little.
    assert sample.gt_classes.tolist() == [1, 1, 3, 3]
    change = torch.tensor([[10.0, 0, 0, 0]] * 2)  # by their whole width to the right
    refined = heads.refined(0, sample, change)
    assert refined.boxes[:2].tolist() == [[90, 40, 120, 70], [125, 0, 128, 25]]
    others = {tuple(x) for x in sample.regions.boxes[2:].tolist()}
    assert {tuple(x) for x in refined.boxes[2:].tolist()} == others == {tuple(FAR), tuple(rows[1])}
    again = heads.match_again(refined, targets, 1)
    assert again.gt_classes.tolist() == [3] * 4
    back = refined.moved(refined.boxes.clone())
    back.boxes[3] = torch.tensor(truth)
    again = heads.match_again(back, targets, 1)
    assert again.gt_classes.tolist() == [1, 3, 3, 3]
    assert again.regions.boxes[0].tolist() == truth


def test_a_moved_region_may_change_its_object() -> None:
    """11..31 overlaps 10..30 of class 0 by 19 of 21; moved by 0.4 * 20 it is nearer to 20..40."""
    heads = constant_heads([[4.0, 0, 0, 0] * 3, [0.0] * 4])
    objects = [([[10.0, 10, 30, 30], [20, 10, 40, 30]], [0, 2])]
    targets = targets_of(objects)
    sample = heads.sample_boxes([proposals_of([[11.0, 10, 31, 30]])], targets)
    assert (sample.gt_classes.tolist(), sample.gt_index.tolist()) == ([0], [0])
    again = heads.match_again(heads.refined(0, sample, torch.tensor([[4.0, 0, 0, 0]])), targets, 1)
    assert (again.gt_classes.tolist(), again.gt_index.tolist()) == ([2], [1])
    assert again.gt_boxes.tolist() == [[20, 10, 40, 30]]


def test_full_sets_have_the_divisor_of_the_authors() -> None:
    """512 regions each: the sum over (512 + 512) / 2, times 0.5; theirs is the sum over 1024."""
    heads = constant_heads([OF_CLASS_1], batch_size_per_image=512, box_batch_size_per_image=512)
    rows = torch.cat((torch.tensor([NEAR]), anywhere(800) / 8))
    losses = losses_of(heads, [rows], [rows], [([TRUTH], [1])])
    assert losses["loss_box_reg_stage0"].item() == pytest.approx(0.85 / 1024)


def test_at_most_so_many_positives_are_drawn() -> None:
    heads = constant_heads([OF_CLASS_1], box_batch_size_per_image=16)
    targets = targets_of([([TRUTH], [1]), ([], [])])
    proposals = [proposals_of([NEAR] * 30 + [FAR] * 30), proposals_of([FAR] * 10)]
    sample = heads.sample_boxes(proposals, targets)
    assert sample.gt_classes.tolist() == [1] * 16 + [3] * 10
    assert sample.regions.image_index.tolist() == [0] * 16 + [1] * 10


def test_stage_0_takes_the_likeliest_class_at_test() -> None:
    """(8, 9) Background is likelier than any class, and does not count. Class 1 moves the region
    by a fifth of its 20 pixels, class 0 would move it up; then stage 1 by a tenth downwards. All
    classes of a region share its box.
    """
    biases = [[0.0, -4, 0, 0, 2, 0, 0, 0, 9, 9, 9, 9], [0.0, 2, 0, 0]]
    selection = RegionSelection(test_score_thresh=0.05, nms=HardNMS(test_nms_thresh=0.5))
    heads = constant_heads(biases, selection=selection).eval()
    heads.class_branch.cls_score.bias.data.copy_(torch.tensor([0.5, 1, 0, 2]))
    (found,) = heads.propose(features_of(1), [proposals_of([NEAR])])
    scores = torch.tensor([0.5, 1, 0, 2]).softmax(0)
    assert found.pred_classes.tolist() == [0, 1, 2]
    torch.testing.assert_close(found.scores, scores[:3])
    end = [44.0, 42, 64, 62]
    torch.testing.assert_close(found.pred_boxes.tensor, torch.tensor([end] * 3))
    stages = torch.tensor([NEAR, [44.0, 40, 64, 60], end])
    torch.testing.assert_close(found.stage_boxes, stages.expand(3, 3, 4))
    assert found.proposal_index.tolist() == [0, 0, 0]


def test_one_stage_has_a_box_for_each_class() -> None:
    """As in Faster R-CNN; boxes end at the border of the image, 128 pixels wide."""
    heads = constant_heads([[0.0, -4, 0, 0, 99, 0, 0, 0, 2, 0, 0, 0]]).eval()
    (found,) = heads.propose(features_of(1), [proposals_of([NEAR])])
    wanted = [[40.0, 32, 60, 52], [128, 40, 128, 60], [44, 40, 64, 60]]
    torch.testing.assert_close(found.pred_boxes.tensor, torch.tensor(wanted))
    assert found.pred_classes.tolist() == [0, 1, 2]
    torch.testing.assert_close(found.stage_boxes[:, 1], found.pred_boxes.tensor)
    assert found.stage_boxes[:, 0].tolist() == [NEAR] * 3


# Who learns from what.


def test_negatives_of_the_box_branch_do_not_matter() -> None:
    """(3) Other ones, as many: the losses of all stages stay."""
    heads, features = heads_of(), features_of()
    positives = [near(boxes, 6, 0.05) for boxes, _ in OBJECTS]
    cls = [x.proposal_boxes.tensor for x in scene()[0]]
    results = []
    for _ in range(2):
        far = [5 * torch.rand(9, 4) + torch.tensor([0.0, 80, 5, 86]) for _ in OBJECTS]
        reg = [torch.cat(pair) for pair in zip(positives, far, strict=True)]
        torch.manual_seed(1)  # of the class branch's sample
        results.append(losses_of(heads, cls, reg, OBJECTS, features))
    for name, loss in results[0].items():
        assert loss.item() == pytest.approx(results[1][name].item(), rel=1e-6) != 0, name
    fewer = losses_of(heads, cls, positives, OBJECTS, features)
    assert fewer["loss_box_reg_stage1"] > 1.2 * results[0]["loss_box_reg_stage1"]  # the divisor


def test_ground_truth_is_never_among_the_box_branchs_regions() -> None:
    """(4) The class branch has it."""
    heads, (proposals, targets) = heads_of(), scene()
    sampled = heads.sample_boxes(proposals.reg, targets).regions.boxes
    with EventStorage():
        drawn = heads.label_and_sample_proposals(proposals, targets)
    for target, sample in zip(targets, drawn, strict=True):
        for box in target.gt_boxes.tensor:
            assert not (sampled == box).all(-1).any()
            assert (sample.proposal_boxes.tensor == box).all(-1).any()


def test_losses_reach_their_own_branches() -> None:
    """(11) No stage learns through the boxes of a later one. The maps learn from all."""
    heads, features = heads_of(), features_of()
    for x in features.values():
        x.requires_grad_()
    proposals, targets = scene()
    with EventStorage():
        _, losses = heads(None, features, proposals, targets)
    parts = {"loss_cls": heads.class_branch} | {
        f"loss_box_reg_stage{k}": branch for k, branch in enumerate(heads.box_branches)
    }
    assert losses.keys() == parts.keys()
    for name, loss in losses.items():
        for owner, part in parts.items():
            gradients = torch.autograd.grad(
                loss, list(part.parameters()), retain_graph=True, materialize_grads=True
            )
            assert all(x.any() for x in gradients) == (owner == name), (name, owner)
            assert any(x.any() for x in gradients) == (owner == name), (name, owner)
        gradients = torch.autograd.grad(loss, list(features.values()), retain_graph=True)
        assert sum(x.abs().sum() for x in gradients) > 0


def test_shared_layers_learn_from_both() -> None:
    heads, (proposals, targets) = heads_of(box_branches(1, kind="shared")), scene()
    with EventStorage():
        _, losses = heads(None, features_of(), proposals, targets)
    layer = heads.class_branch.head.fc1.weight
    for loss in losses.values():
        assert torch.autograd.grad(loss, layer, retain_graph=True)[0].any()


def test_regressors_do_not_touch_the_scores() -> None:
    """(10) Whatever their weights: candidates differ in their boxes alone."""
    heads, features = heads_of().eval(), features_of()
    proposals = list(scene()[0])
    before = heads.propose(features, proposals)
    for branch in heads.box_branches:
        for parameter in branch.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    for was, now in zip(before, heads.propose(features, proposals), strict=True):
        assert torch.equal(was.scores, now.scores)
        assert torch.equal(was.pred_classes, now.pred_classes)
        assert (was.pred_boxes.tensor - now.pred_boxes.tensor).abs().max() > 1


# Leaving out what cannot be detected.

KINDS = {
    "one stage": lambda: box_branches(1),
    "three stages": lambda: box_branches(3),
    "shared": lambda: box_branches(1, kind="shared"),
    "shared, three stages": lambda: box_branches(3, kind="shared"),
    "convolutions": lambda: box_branches(2, kind="conv"),
}


def pruned_and_not(heads: DecoupledROIHeads, passing: int) -> list[list[Instances]]:
    """Candidates with regions left out and without; so many have a score above the threshold."""
    features, proposals = features_of(), list(scene()[0])
    regions = Regions.of([x.proposal_boxes.tensor for x in proposals], [SIZE] * len(proposals))
    logits, _ = heads.class_branch(heads.pool(heads.maps(features), regions))
    best = heads.score(logits).amax(-1).sort(descending=True)[0]
    between = best[passing - 1 : passing + 1].mean() if passing else torch.ones(())
    heads.selection.test_score_thresh = between.item()
    found = []
    for prune in (True, False):
        heads.selection.prune = prune
        found.append(heads.propose(features, proposals))
    for candidates in found:
        index = torch.cat([x.proposal_index for x in candidates])
        assert len(index.unique()) == passing
        origin = torch.cat([x.stage_boxes[:, 0] for x in candidates])
        assert torch.equal(origin, regions.boxes[index])
    return found


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("passing", [30, 7])
def test_left_out_regions_change_nothing(kind: str, passing: int) -> None:
    """Bit for bit where at least 16 regions are left; below, a matrix product sums otherwise."""
    pruned, whole = pruned_and_not(heads_of(KINDS[kind]()).eval(), passing)
    for ours, all_of_them in zip(pruned, whole, strict=True):
        for name in ("proposal_index", "pred_classes", "scores"):
            assert torch.equal(getattr(ours, name), getattr(all_of_them, name)), name
        boxes, expected = ours.pred_boxes.tensor, all_of_them.pred_boxes.tensor
        if passing >= 16:
            assert torch.equal(boxes, expected)
            assert torch.equal(ours.stage_boxes, all_of_them.stage_boxes)
        torch.testing.assert_close(boxes, expected, rtol=0, atol=1e-3)
        proposals = ours.stage_boxes[:, 0]
        assert len(ours) == 0 or (boxes - proposals).abs().max() > 0.1  # they have moved


@torch.no_grad()
def test_nothing_worth_refining() -> None:
    for branches in (box_branches(1), box_branches(3)):
        stages = len(branches)
        pruned, whole = pruned_and_not(heads_of(branches).eval(), 0)
        for found in (*pruned, *whole):
            assert len(found) == 0
            assert found.stage_boxes.shape == (0, stages + 1, 4)


@torch.no_grad()
def test_proposals_are_pooled_once() -> None:
    """For the classifier; stage 1 takes of these what is left, and each further stage pools its
    own. Convolutions want enlarged regions, so their own from the first stage on.
    """
    for branches, pruned, whole in (
        (box_branches(1), ["all"], ["all"]),
        (box_branches(3), ["all", "left", "left"], ["all", "all", "all"]),
        (box_branches(2, kind="conv"), ["all", "left", "left"], ["all", "all", "all"]),
    ):
        heads, (proposals, _) = heads_of(branches).eval(), scene()
        heads.selection.test_score_thresh = 0.5
        counts: list[int] = []
        for level, pool in enumerate(heads.box_pooler.level_poolers):
            pool.register_forward_hook(
                lambda _, inputs, __, x=counts, level=level: x.append((level, len(inputs[1])))
            )
        for prune, wanted in ((True, pruned), (False, whole)):
            counts.clear()
            heads.selection.prune = prune
            found = heads.propose(features_of(), list(proposals))
            left = len({index for x in found for index in x.proposal_index.tolist()})
            sizes = {"all": sum(map(len, proposals)), "left": left}
            assert 0 < left < sizes["all"]
            calls = [sum(n for _, n in counts[i : i + 4]) for i in range(0, len(counts), 4)]
            assert calls == [sizes[name] for name in wanted]
