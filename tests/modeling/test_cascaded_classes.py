# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN with a classifier at every stage (Table X)."""

import pytest
import torch
from decoupled_rcnn_parts import (
    LEVELS,
    K,
    box_branches,
    fc_head,
    features_of,
    pooler_of,
    scene,
)
from detectron2.config import instantiate
from detectron2.modeling.matcher import Matcher
from detectron2.utils.events import EventStorage
from util import loss_sum, random_input, tiny, without_gradient

from d2_decouple.config import get_config
from d2_decouple.modeling import (
    CascadedClassROIHeads,
    ClassBranch,
    HardNMS,
    RegionSelection,
)
from d2_decouple.modeling.regions import Regions

RECIPE = "decoupled_rcnn_R_101_FPN_1x_cascaded_classes"
INPUTS = [((64, 96), 3), ((64, 96), 0)]


@pytest.fixture
def model():
    return instantiate(tiny(get_config(RECIPE)).model)


def drawn_apart(model):
    """Branches whose outputs differ from region to region and from stage to stage."""
    for name, parameter in model.roi_heads.named_parameters():
        if name.endswith(("cls_score.weight", "bbox_pred.weight")):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_every_stage_learns_classes_and_boxes(model):
    with EventStorage():
        losses = model([random_input(size, objects) for size, objects in INPUTS])
    stages = {f"loss_cls{end}" for end in ("", "_stage1", "_stage2")}
    stages |= {f"loss_box_reg_stage{stage}" for stage in range(3)}
    assert stages <= losses.keys()
    loss_sum(losses).backward()
    assert without_gradient(model) == []


def test_overlaps_rise(model):
    """An overlap of 0.65 is a positive of the first two stages, and none of the third."""
    heads = model.roi_heads
    regions = Regions.of([torch.tensor([[0.0, 0, 100, 65]])], [(100, 100)])
    target = random_input((100, 100), 1)["instances"]
    target.gt_boxes.tensor[:] = torch.tensor([0.0, 0, 100, 100])
    found = [int(heads.match(regions, [target], stage).gt_classes[0]) for stage in range(3)]
    label = int(target.gt_classes[0])
    assert found == [label, label, heads.num_classes]


@torch.no_grad()
def test_scores_are_the_mean_of_the_stages(model):
    """By hand: each classifier on the boxes that the regressors before it have made."""
    drawn_apart(model).eval()
    heads = model.roi_heads
    heads.selection.test_score_thresh = -1.0  # every pair of proposal and class is a candidate
    images = model.preprocess_image([random_input((64, 96), 0)])
    features = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, features)
    (found,) = heads.propose(features, proposals)

    maps, boxes, scores = heads.maps(features), proposals[0].proposal_boxes.tensor, []
    classifiers = [heads.class_branch, *heads.class_branches]
    for stage, (classifier, regressor) in enumerate(
        zip(classifiers, heads.box_branches, strict=True)
    ):
        pooled = heads.pool(maps, Regions.of([boxes], [(64, 96)]))
        logits, _ = classifier(pooled)
        scores.append(logits.softmax(-1)[:, :-1])
        deltas = regressor(pooled)
        if stage == 0:
            best = logits[:, :-1].argmax(-1)
            deltas = deltas.view(-1, heads.num_classes, 4)[torch.arange(len(boxes)), best]
        boxes = regressor.transform.apply_deltas(deltas, boxes)
        boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([96, 64, 96, 64]))
    mean = torch.stack(scores).mean(0)
    assert not torch.allclose(mean, scores[0], atol=1e-3)
    index, label = found.proposal_index, found.pred_classes
    assert len(index) == mean.numel()
    torch.testing.assert_close(found.scores, mean[index, label])
    torch.testing.assert_close(found.pred_boxes.tensor, boxes[index])


def test_no_region_is_left_out_early(model):
    """A class that only a later stage sees must be found, so nothing is pruned by the first."""
    model.eval()
    heads = model.roi_heads
    assert heads.selection.prune
    heads.selection.test_score_thresh = 0.3
    with torch.no_grad():
        for classifier in (heads.class_branch, *heads.class_branches):
            classifier.cls_score.weight.zero_()
            classifier.cls_score.bias.zero_()
        heads.class_branch.cls_score.bias[-1] = 10.0  # background
        for classifier in heads.class_branches:
            classifier.cls_score.bias[1] = 10.0
        (result,) = model([random_input((64, 96), 0)])
    assert len(result["instances"])
    assert set(result["instances"].pred_classes.tolist()) == {1}
    torch.testing.assert_close(
        result["instances"].scores,
        torch.full((len(result["instances"]),), 2 / 3),
        atol=1e-3,
        rtol=0,
    )


def heads_with(kind):
    return CascadedClassROIHeads(
        num_classes=K,
        batch_size_per_image=64,
        positive_fraction=0.25,
        proposal_matcher=Matcher([0.5], [0, 1]),
        box_in_features=LEVELS,
        box_pooler=pooler_of(),
        class_branch=ClassBranch(head=fc_head(), num_classes=K),
        class_branches=[ClassBranch(head=fc_head(), num_classes=K) for _ in range(2)],
        stage_matchers=[Matcher([overlap], [0, 1]) for overlap in (0.5, 0.6, 0.7)],
        box_branches=box_branches(3, kind=kind),
        box_batch_size_per_image=64,
        selection=RegionSelection(test_score_thresh=0.05, nms=HardNMS(test_nms_thresh=0.5)),
    )


@pytest.mark.parametrize("training", [True, False])
def test_a_shared_regressor_reads_its_own_stages_classifier(training):
    """In training, too, and not the first stage's: it would be tested on what it never saw."""
    heads, (proposals, targets) = heads_with("shared").train(training), scene()
    named = dict(zip(range(3), (heads.class_branch, *heads.class_branches), strict=True))
    last, read = [], set()
    for stage, classifier in named.items():
        classifier.head.register_forward_hook(lambda *_, stage=stage: last.append(stage))
    for stage, branch in enumerate(heads.box_branches):
        branch.register_forward_hook(lambda *_, stage=stage: read.add((stage, last[-1])))
    with EventStorage() as storage:
        heads(None, features_of(), proposals, targets if training else None)
    assert read == {(0, 0), (1, 1), (2, 2)}
    if training:
        logged = {name: len(storage.history(name).values()) for name in storage.latest()}
        names = [f"roi_head/cls_accuracy{ending}" for ending in ("", "_stage1", "_stage2")]
        assert [logged.get(name) for name in names] == [1, 1, 1]


def test_branches_with_norms_over_all_regions_are_refused():
    with pytest.raises(ValueError, match=r"box_branches \[0, 1, 2\] see all regions .*BoxBranch"):
        heads_with("conv")


def test_lists_of_another_length_are_refused():
    cfg = tiny(get_config(RECIPE))
    cfg.model.roi_heads.stage_matchers = cfg.model.roi_heads.stage_matchers[:2]
    with pytest.raises(ValueError, match="3 box_branches, 2 class_branches and 2 stage_matchers"):
        instantiate(cfg.model)
    cfg = tiny(get_config(RECIPE))
    cfg.model.roi_heads.class_branches = []
    with pytest.raises(ValueError, match="0 class_branches and 3 stage_matchers"):
        instantiate(cfg.model)


def test_matchers_are_of_their_stage(model):
    assert all(isinstance(matcher, Matcher) for matcher in model.roi_heads.stage_matchers)
    assert [x.thresholds[1] for x in model.roi_heads.stage_matchers] == [0.5, 0.6, 0.7]
