# SPDX-License-Identifier: Apache-2.0
"""How boxes came about: the model's own numbers, in pixels of the original image."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import transforms as T
from detectron2.structures import Boxes
from torch import nn
from torchvision.ops import box_iou
from util import excite, tiny

from d2_decouple.config import ConfigError, get_config
from d2_decouple.engine.predictor import Predictor
from d2_decouple.visualization import draw_stages

SIZE, SEEN = (75, 110), (96, 141)  # (H, W) of the image, and of what the model sees of it
SCALE = torch.tensor([110 / 141, 75 / 96]).repeat(2)
RESIZE = [T.ResizeShortestEdge(96, 160)]
THREE, ONE = "decoupled_rcnn_R_18_FPN_bccd", "decoupled_rcnn_R_18_FPN_bccd_single"
OWN = ("pred_boxes", "scores", "pred_classes", "proposal_index")


def build(name=THREE, change=lambda model: None, **options):
    """A predictor whose regressors move boxes a lot; ``change`` edits the model's config."""
    torch.manual_seed(0)
    cfg = tiny(get_config(name))
    change(cfg.model)
    model = excite(instantiate(cfg.model), 0.7)
    for branch in getattr(model.roi_heads, "box_branches", ()):
        nn.init.normal_(branch.bbox_pred.weight, std=0.3)
    return Predictor(model, augmentations=RESIZE, device="cpu", **options)


def picture(height=SIZE[0], width=SIZE[1]):
    return np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)


def forward(predictor):
    """The maps, and the proposals of the test, of the model's own parts."""
    item = predictor._input(picture())
    assert item["image"].shape[1:] == SEEN
    model = predictor.model
    with torch.no_grad():
        images = model.preprocess_image([item])
        maps = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, maps)
    return maps, proposals


@pytest.fixture(scope="module")
def predictor():
    return build()


@pytest.mark.parametrize(("name", "stages"), [(THREE, 3), (ONE, 1)])
def test_they_are_the_models_numbers_in_pixels_of_the_image(name, stages):
    predictor = build(name)
    found = predictor.stages(picture()).instances
    assert len(found) > 10
    assert found.stage_boxes.shape == (len(found), stages + 1, 4)
    maps, proposals = forward(predictor)
    with torch.no_grad():
        (expected,) = predictor.model.roi_heads(None, maps, proposals)[0]
    torch.testing.assert_close(found.stage_boxes, expected.stage_boxes * SCALE)
    assert torch.equal(found.stage_boxes[:, -1], found.pred_boxes.tensor)
    chosen = proposals[0].proposal_boxes.tensor[found.proposal_index]
    torch.testing.assert_close(found.stage_boxes[:, 0], chosen * SCALE)
    moves = found.stage_boxes.diff(dim=1).abs().amax(-1)
    assert (moves.mean(0) > 0.5).all()  # pixels: each stage does something
    found.stage_boxes.mul_(2)  # in place, which tensors of inference mode refuse


def test_stages_set_by_hand():
    """Each stage moves a box by a part of its width, and makes it lower."""
    predictor = build()
    for part, branch in enumerate(predictor.model.roi_heads.box_branches, start=1):
        nn.init.zeros_(branch.bbox_pred.weight)
        weights = torch.tensor(branch.transform.weights)
        change = torch.tensor([0.01 * part, 0, 0, -0.1]) * weights
        branch.bbox_pred.bias.data = change.repeat(branch.num_classes or 1)
    boxes = predictor.stages(picture()).instances.stage_boxes / SCALE
    inner = (boxes[:, 0] > 0) & (boxes[:, 0] < torch.tensor(SEEN[::-1]).repeat(2) - 9.0)
    boxes = boxes[inner.all(-1)]
    assert len(boxes) > 3
    expected = [boxes[:, 0]]
    for part in (1, 2, 3):
        x1, y1, x2, y2 = expected[-1].unbind(-1)
        shift, middle = (x2 - x1) * 0.01 * part, (y1 + y2) / 2
        half = (y2 - y1) / 2 * np.exp(-0.1)
        moved = torch.stack((x1 + shift, middle - half, x2 + shift, middle + half), dim=-1)
        expected.append(torch.minimum(moved, torch.tensor(SEEN[::-1]).repeat(2)))
    torch.testing.assert_close(boxes, torch.stack(expected, dim=1), rtol=1e-4, atol=1e-3)


def test_proposals_at_both_densities(predictor):
    """As tests with either threshold, and with the limits of training, give them."""
    seen = predictor.stages(picture())
    rpn = predictor.model.proposal_generator
    for threshold, limit, got in (
        (0.7, rpn.post_nms_topk[True], seen.class_proposals),
        (0.85, rpn.post_nms_topk_reg, seen.box_proposals),
    ):
        other = build()
        other.model.proposal_generator.nms_thresh = threshold
        other.model.proposal_generator.post_nms_topk = {False: limit}
        _, (expected,) = forward(other)
        torch.testing.assert_close(got.boxes, expected.proposal_boxes.tensor * SCALE)
        torch.testing.assert_close(got.logits, expected.objectness_logits)
        assert got.nms_thresh == threshold
        assert got.survivors == len(got.boxes)  # below the limit
        got.boxes.mul_(1)  # in place
    assert len(seen.box_proposals.boxes) > len(seen.class_proposals.boxes) > 50
    counts = [len(x.boxes) for x in (seen.class_proposals, seen.box_proposals)]
    assert seen.proposals_record() == {
        "class": {"nms_thresh": 0.7, "survivors": counts[0], "count": counts[0]},
        "box": {"nms_thresh": 0.85, "survivors": counts[1], "count": counts[1]},
    }


def test_proposals_of_the_test_are_the_first_of_the_class_branchs():
    def change(model):
        model.proposal_generator.update(post_nms_topk=[60, 25], post_nms_topk_reg=40)

    predictor = build(change=change)
    _, (tested,) = forward(predictor)
    seen = predictor.stages(picture())
    boxes = seen.class_proposals.boxes
    assert (len(tested), len(boxes), len(seen.box_proposals.boxes)) == (25, 60, 40)
    unlimited = build().stages(picture())
    assert seen.class_proposals.survivors == len(unlimited.class_proposals.boxes)
    assert seen.box_proposals.survivors == len(unlimited.box_proposals.boxes)
    torch.testing.assert_close(boxes[:25], tested.proposal_boxes.tensor * SCALE)
    found = seen.instances
    torch.testing.assert_close(found.stage_boxes[:, 0], boxes[found.proposal_index])


def test_overlaps_with_the_last_box(predictor):
    seen = predictor.stages(picture())
    found = seen.instances
    assert seen.gt_boxes is None
    assert not found.has("gt_index")
    assert torch.equal(seen.references, found.stage_boxes[:, -1])
    torch.testing.assert_close(found.stage_ious[:, -1], torch.ones(len(found)))
    for boxes, ious in zip(found.stage_boxes, found.stage_ious, strict=True):
        torch.testing.assert_close(ious, box_iou(boxes[-1:], boxes)[0])
    assert found.stage_ious[:, 0].std() > 0.01


def test_overlaps_with_objects(predictor):
    """Two are real, one lies elsewhere; detections without an object have none."""
    boxes = predictor(picture()).pred_boxes.tensor
    gt_boxes = torch.cat((boxes[:2] + torch.tensor([1.0, -2, 3, 0]), torch.zeros(1, 4)))
    seen = predictor.stages(picture(), gt_boxes=gt_boxes)
    found = seen.instances
    assert torch.equal(seen.gt_boxes, gt_boxes)
    for index in range(len(found)):
        overlap = box_iou(gt_boxes[:2], boxes[index : index + 1])[:, 0]
        best = int(overlap.argmax()) if overlap.max() > 0 else -1
        assert int(found.gt_index[index]) == best
        expected = torch.zeros(4)
        if best >= 0:
            expected = box_iou(gt_boxes[best : best + 1], found.stage_boxes[index])[0]
        torch.testing.assert_close(found.stage_ious[index], expected)
    assert found.gt_index[:2].tolist() == [0, 1]
    for same in (Boxes(gt_boxes), gt_boxes.numpy(), gt_boxes.double(), gt_boxes.tolist()):
        again = predictor.stages(picture(), gt_boxes=same).instances
        assert torch.equal(again.stage_ious, found.stage_ious)
    nothing = predictor.stages(picture(), gt_boxes=[])
    assert (nothing.instances.gt_index == -1).all()
    assert not nothing.instances.stage_ious.any()
    assert not nothing.instances.near_proposals.any()
    assert nothing.as_records()[0]["gt_index"] == -1


def test_proposals_near_a_detection(predictor):
    seen = predictor.stages(picture())
    both = (seen.class_proposals, seen.box_proposals)
    for branch, (proposals, owners) in enumerate(zip(both, seen.owners(5), strict=True)):
        overlap = box_iou(seen.references, proposals.boxes)
        counts = [int((row >= 0.5).sum()) for row in overlap]
        assert seen.instances.near_proposals[:, branch].tolist() == counts
        expected = [int(column.argmax()) if column.max() >= 0.5 else -1 for column in overlap[:5].T]
        assert owners.tolist() == expected
    assert (seen.instances.near_proposals.diff(dim=1) >= 0).float().mean() > 0.9
    assert [len(x) for x in seen.owners(5)] == [len(x.boxes) for x in both]


def test_records_are_plain_and_rounded(predictor):
    seen = predictor.stages(picture(), limit=3)
    found, records = seen.instances, seen.as_records()
    assert len(records) == len(found) == 3
    keys = ["proposal_index", "boxes", "ious", "near_proposals"]
    for index, record in enumerate(records):
        assert list(record) == keys
        assert record["proposal_index"] == int(found.proposal_index[index])
        boxes, ious = torch.tensor(record["boxes"]), torch.tensor(record["ious"])
        torch.testing.assert_close(boxes, found.stage_boxes[index], rtol=0, atol=0.006)
        torch.testing.assert_close(ious, found.stage_ious[index], rtol=0, atol=6e-5)
        assert record["near_proposals"] == found.near_proposals[index].tolist()


def test_detections_are_those_of_a_call_and_there_is_one_forward():
    everything = build()(picture())
    predictor = build(score_thresh=everything.scores.median().item())
    expected = predictor(picture())
    assert len(expected) < len(everything)
    calls = []
    predictor.model.backbone.register_forward_hook(lambda *_: calls.append(1))
    rpn = predictor.model.proposal_generator
    rpn.rpn_head.register_forward_hook(lambda *_: calls.append(1))
    found = predictor.stages(picture()).instances
    assert len(calls) == 2
    assert len(found) == len(expected) > 5
    assert found.image_size == SIZE
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    for name in ("scores", "pred_classes", "proposal_index"):
        assert torch.equal(found.get(name), expected.get(name))
    few = predictor.stages(picture(), limit=3).instances
    assert torch.equal(few.stage_boxes, found.stage_boxes[:3])
    assert len(few) == 3
    assert not rpn._forward_hooks  # a later call keeps nothing
    assert len(rpn.rpn_head._forward_hooks) == 1


def test_no_detections_and_half_precision():
    for gt_boxes in (None, [], [[1, 2, 3, 4]]):
        seen = build(score_thresh=0.9999).stages(picture(), gt_boxes=gt_boxes)
        found = seen.instances
        assert found.stage_boxes.shape == (0, 4, 4)
        assert found.stage_ious.shape == (0, 4)
        assert found.near_proposals.shape == (0, 2)
        assert (seen.owners(4)[0] == -1).all()
        assert seen.as_records() == []
    half = build(precision="bfloat16").stages(picture())
    assert len(half.instances) > 5
    assert half.instances.stage_ious.dtype == half.instances.stage_boxes.dtype == torch.float32
    assert half.class_proposals.logits.dtype == torch.float32


def test_the_picture_is_drawn_on_the_image_as_it_is_read(predictor):
    """From an array in BGR, as a predictor takes it, and from the same in RGB."""
    image, gt_boxes = picture(), [[10, 20, 60, 70]]
    drawn = predictor.draw_stages(image, limit=2, gt_boxes=gt_boxes)
    seen = predictor.stages(image, gt_boxes=gt_boxes)
    expected = draw_stages(image[..., ::-1].copy(), seen, predictor.classes, limit=2)
    assert np.array_equal(drawn, expected)
    assert not np.array_equal(drawn, predictor.draw_stages(image, limit=2))


def test_other_models_are_refused_by_name():
    class Other(nn.Module):
        def forward(self, inputs):
            raise AssertionError("it must not run")

    known = "recipes with stages are decoupled_rcnn_R_"
    for predictor, message in (
        (Predictor(Other(), augmentations=RESIZE, device="cpu"), "Other is not a GeneralizedRCNN"),
        (
            build("faster_rcnn_R_18_FPN_bccd_d2"),
            "GeneralizedRCNN with RPN and StandardROIHeads is not a GeneralizedRCNN with Decoup",
        ),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            predictor.stages(picture())
        assert known in str(error.value)
    with pytest.raises(ConfigError, match="is not a OneStageDetector"):
        build().points(picture())
    with pytest.raises(ConfigError, match="leave tta out to see stages"):
        build(tta=True).stages(picture())


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_is_at_least_one(predictor, limit):
    with pytest.raises(ConfigError, match=f"limit must be a whole number from 1, .* got {limit}"):
        predictor.stages(picture(), limit=limit)
    with pytest.raises(ValueError, match=f"limit is {limit}; wanted is a whole number from 1"):
        predictor.draw_stages(picture(), limit=limit)


@pytest.mark.parametrize(
    "bad", [[1, 2, 3, 4], [[1, 2, 3]], [[0, 0, float("nan"), 1]], np.zeros((2, 4, 1))]
)
def test_objects_that_are_no_boxes_are_refused(predictor, bad):
    with pytest.raises(ConfigError, match=r"gt_boxes have the shape \(.*\); wanted are finite"):
        predictor.stages(picture(), gt_boxes=bad)


def test_threads_that_share_a_predictor_do_not_see_each_others_stages(predictor):
    images = [picture() // (1 + index) for index in range(4)]
    alone = [predictor.stages(image) for image in images]
    assert len({len(seen.box_proposals.boxes) for seen in alone}) > 1
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(predictor.stages, images * 4))
    for index, seen in enumerate(together):
        expected = alone[index % 4]
        assert torch.equal(seen.instances.stage_boxes, expected.instances.stage_boxes)
        assert torch.equal(seen.box_proposals.boxes, expected.box_proposals.boxes)
