# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN with a classifier at every stage (Table X)."""

import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling.matcher import Matcher
from detectron2.utils.events import EventStorage
from util import loss_sum, random_input, tiny, without_gradient

from d2_decouple.config import get_config
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
