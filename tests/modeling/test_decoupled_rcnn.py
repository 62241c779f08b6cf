# SPDX-License-Identifier: Apache-2.0
"""The whole detector: Faster R-CNN's weights in it, and what Detectron2 does with such a model."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from decoupled_rcnn_parts import proposals_of
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from util import WIDTH, excite, loss_sum, random_input, tiny, without_gradient

from d2_decouple.checkpoint import Checkpointer, CheckpointError
from d2_decouple.config import get_config
from d2_decouple.modeling import DecoupledROIHeads

FASTER = "faster_rcnn_R_18_FPN_bccd_d2"
SINGLE = "decoupled_rcnn_R_18_FPN_bccd_single"
CASCADE = "decoupled_rcnn_R_18_FPN_bccd"
SIZES = [(120, 160), (101, 67)]
STAGES = {f"loss_box_reg_stage{stage}" for stage in range(3)}


def build(name: str, **options: Any) -> Any:
    return instantiate(tiny(get_config(name), **options).model)


def planted(model: Any) -> Any:
    """Outputs of a trained detector's size: proposals that differ, scores around a half."""
    excite(model.proposal_generator)
    rpn = model.proposal_generator.rpn_head
    nn.init.normal_(rpn.anchor_deltas.weight, std=0.02)
    nn.init.zeros_(rpn.anchor_deltas.bias)
    for name, layer in model.roi_heads.named_modules():
        if name.endswith(("cls_score", "bbox_pred")):
            nn.init.normal_(layer.weight, std=1.0)
            nn.init.normal_(layer.bias, std=0.1)
    return model.eval()


def inputs_of(objects: tuple[int, ...] = (3, 2)) -> list[dict[str, Any]]:
    return [random_input(size, count) for size, count in zip(SIZES, objects, strict=True)]


# With one stage and a Faster R-CNN's weights, it is that Faster R-CNN.


def load_strictly(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    model.load_state_dict(weights, strict=True)


def load_with_detectron2(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    torch.save({"model": weights}, folder / "faster.pth")
    found = DetectionCheckpointer(model).load(str(folder / "faster.pth"))
    assert found == {}


def load_with_ours(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    """``complete`` refuses a file that leaves a tensor at its initial value."""
    torch.save({"model": weights}, folder / "faster.pth")
    Checkpointer(model, complete=True).load(str(folder / "faster.pth"))


@torch.no_grad()
@pytest.mark.parametrize("load", [load_strictly, load_with_detectron2, load_with_ours])
def test_faster_rcnns_weights_give_its_detections(
    load: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs, ours = planted(build(FASTER)), build(SINGLE).eval()
    assert type(theirs.roi_heads) is StandardROIHeads
    with caplog.at_level(logging.WARNING):
        load(ours, theirs.state_dict(), tmp_path)
    assert caplog.text == ""
    inputs = inputs_of()
    maps = [model.backbone(model.preprocess_image(inputs).tensor) for model in (theirs, ours)]
    images = theirs.preprocess_image(inputs)
    proposals, _ = theirs.proposal_generator(images, maps[0])
    own, _ = ours.proposal_generator(images, maps[1])
    for got, want in zip(own, proposals, strict=True):
        assert len(got) == len(want) > 50
        boxes = got.proposal_boxes.tensor
        torch.testing.assert_close(boxes, want.proposal_boxes.tensor, rtol=0, atol=1e-3)
    expected, _ = theirs.roi_heads(images, maps[0], proposals)
    found, _ = ours.roi_heads(images, maps[1], proposals)
    for got, want in zip(found, expected, strict=True):
        assert len(got) == len(want) >= 20
        assert torch.equal(got.pred_classes, want.pred_classes)
        assert len(got.pred_classes.unique()) > 1
        torch.testing.assert_close(got.scores, want.scores, rtol=0, atol=1e-5)
        boxes = got.pred_boxes.tensor
        torch.testing.assert_close(boxes, want.pred_boxes.tensor, rtol=0, atol=1e-3)
    for got, want in zip(ours(inputs), theirs(inputs), strict=True):
        assert len(got["instances"]) == len(want["instances"])


def test_each_branch_begins_with_weights_of_its_own() -> None:
    """Both with the one head's values; learning of one does not change the other."""
    theirs, ours = build(FASTER), build(CASCADE)
    fresh = {name: value.clone() for name, value in ours.state_dict().items()}
    incompatible = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert incompatible.unexpected_keys == []
    later = ("roi_heads.box_branches.1.", "roi_heads.box_branches.2.")
    assert {x[:25] for x in incompatible.missing_keys} == {x[:25] for x in later}
    heads, head = ours.roi_heads, theirs.roi_heads.box_head
    first, second = heads.class_branch.head.fc1.weight, heads.box_branches[0].head.fc1.weight
    assert torch.equal(first, head.fc1.weight)
    assert torch.equal(second, head.fc1.weight)
    first.data.zero_()
    assert second.any()
    for name in incompatible.missing_keys:
        assert torch.equal(ours.state_dict()[name], fresh[name])


def test_our_names_go_before_detectron2s() -> None:
    """Ours load into ours unchanged, and what a file has under our names is not written over."""
    source, target = planted(build(CASCADE)), build(CASCADE)
    weights = source.state_dict()
    assert not any("box_head" in name or "box_predictor" in name for name in weights)
    target.load_state_dict(weights)
    assert all(torch.equal(value, weights[name]) for name, value in target.state_dict().items())
    both = build(FASTER).state_dict() | weights
    names = list(both)
    target = build(CASCADE)
    target.load_state_dict(both)
    assert all(torch.equal(value, weights[name]) for name, value in target.state_dict().items())
    assert list(both) == names  # the caller's dict


LAYERS = {
    "roi_heads.class_branch.cls_score.weight": ((4, WIDTH), (8, WIDTH)),
    "roi_heads.class_branch.cls_score.bias": ((4,), (8,)),
    "roi_heads.box_branches.0.bbox_pred.weight": ((12, WIDTH), (28, WIDTH)),
    "roi_heads.box_branches.0.bbox_pred.bias": ((12,), (28,)),
}


@pytest.mark.parametrize("kind", ["state dict", "Detectron2's", "ours"])
def test_other_shapes_are_left_out_and_named(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Three classes in the file, seven here: only the last layers keep their initial values."""
    theirs, ours = build(FASTER), build(SINGLE, num_classes=7)
    fresh = {name: value.clone() for name, value in ours.state_dict().items()}
    file = str(tmp_path / "faster.pth")
    torch.save({"model": theirs.state_dict()}, file)
    with caplog.at_level(logging.INFO):
        if kind == "state dict":
            ours.load_state_dict(theirs.state_dict(), strict=False)
        elif kind == "ours":
            Checkpointer(ours).load(file)
        else:
            DetectionCheckpointer(ours).load(file)
    (record,) = [r for r in caplog.records if r.name == "d2_decouple.modeling.loading"]
    assert record.levelname == "WARNING"
    message = record.getMessage()
    assert message.startswith("4 tensors")
    for name, (there, here) in LAYERS.items():
        assert f"{name}: {there} in the file, {here} here" in message
        assert torch.equal(ours.state_dict()[name], fresh[name])
    head = theirs.roi_heads.box_head.fc2.weight
    assert torch.equal(ours.roi_heads.class_branch.head.fc2.weight, head)
    assert torch.equal(ours.roi_heads.box_branches[0].head.fc2.weight, head)
    if kind == "ours":
        assert "4 keep their initial values" in caplog.text


def test_a_strict_load_refuses_other_shapes() -> None:
    with pytest.raises(RuntimeError, match=r"class_branch\.cls_score\.weight"):
        build(SINGLE, num_classes=7).load_state_dict(build(FASTER).state_dict())


# What Detectron2's meta-architecture and heads do with it.


def test_trains_and_detects_with_detectron2s_picture_of_proposals() -> None:
    """VIS_PERIOD: proposals of both densities are the list that is drawn from."""
    cfg = tiny(get_config(CASCADE)).model
    cfg.vis_period = 1
    model, inputs = instantiate(cfg), inputs_of()
    with EventStorage() as storage:
        losses = model(inputs)
        assert [name for name, *_ in storage._vis_data] == [
            "Left: GT bounding boxes;  Right: Predicted proposals"
        ]
        logged = set(storage.latest())
    assert losses.keys() == STAGES | {"loss_cls", "loss_rpn_cls", "loss_rpn_loc"}
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    loss_sum(losses).backward()
    assert without_gradient(model) == []
    positives = {f"roi_head/num_positives_stage{stage}" for stage in range(3)}
    assert logged >= positives | {"roi_head/cls_accuracy", "roi_head/fg_cls_accuracy"}
    planted(model)
    with torch.no_grad():
        results = [result["instances"] for result in model(inputs)]
    for item, found in zip(inputs, results, strict=True):
        assert len(found) > 0
        boxes = found.pred_boxes.tensor
        limit = torch.tensor([item["width"], item["height"]]).repeat(2)
        assert ((boxes >= 0) & (boxes <= limit)).all()
        assert torch.equal(found.scores, found.scores.sort(descending=True)[0])


@torch.no_grad()
def test_given_boxes_are_left_alone() -> None:
    """Without masks and keypoints there is nothing to add to boxes that are known."""
    model, inputs = build(CASCADE).eval(), inputs_of()
    boxes = [item["instances"].gt_boxes for item in inputs]
    given = [
        Instances(size, pred_boxes=box, pred_classes=torch.zeros(len(box), dtype=torch.int64))
        for size, box in zip(SIZES, boxes, strict=True)
    ]
    results = model.inference(inputs, detected_instances=given, do_postprocess=False)
    for found, wanted in zip(results, given, strict=True):
        assert found.get_fields().keys() == {"pred_boxes", "pred_classes"}
        assert torch.equal(found.pred_boxes.tensor, wanted.pred_boxes.tensor)


def with_masks(name: str) -> Any:
    cfg = tiny(get_config(name)).model
    cfg.roi_heads.update(
        mask_in_features=["p2", "p3", "p4", "p5"],
        mask_pooler=L(ROIPooler)(
            output_size=14,
            scales=[1 / 4, 1 / 8, 1 / 16, 1 / 32],
            sampling_ratio=0,
            pooler_type="ROIAlignV2",
        ),
        mask_head=L(MaskRCNNConvUpsampleHead)(
            input_shape=L(ShapeSpec)(channels=WIDTH, height=14, width=14),
            num_classes=3,
            conv_dims=[8, 8],
        ),
    )
    return instantiate(cfg)


@pytest.mark.parametrize("objects", [(3, 2), (2, 0), (0, 0)])
def test_masks_learn_and_are_predicted(objects: tuple[int, int]) -> None:
    """From the class branch's positives; at test inside the final boxes."""
    model, inputs = with_masks(CASCADE), inputs_of(objects)
    for item in inputs:
        height, width = item["image"].shape[1:]
        masks = torch.rand(len(item["instances"]), height, width) > 0.5
        item["instances"].gt_masks = BitMasks(masks)
    with EventStorage():
        losses = model(inputs)
    assert losses.keys() == STAGES | {"loss_cls", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
    assert (losses["loss_mask"] > 0) == (sum(objects) > 0)
    loss_sum(losses).backward()
    assert without_gradient(model) == []
    planted(model)
    with torch.no_grad():
        for item, result in zip(inputs, model(inputs), strict=True):
            found = result["instances"]
            assert found.pred_masks.shape == (len(found), *item["image"].shape[1:])
            assert len(found) > 0


# Precision.


@torch.no_grad()
def test_bfloat16_moves_boxes_by_a_fraction_of_a_pixel() -> None:
    """At 1000 pixels coordinates of bfloat16 are 4 apart. The same proposals and maps, so that
    only the branches' arithmetic differs; the maps are rounded, too, as a network's are there.
    """
    heads: DecoupledROIHeads = planted(build(CASCADE)).roi_heads
    for branch in heads.box_branches:  # a few pixels
        branch.bbox_pred.weight.mul_(0.02)
    maps = {
        name: torch.randn(1, WIDTH, 800 // stride, 1216 // stride).bfloat16()
        for name, stride in (("p2", 4), ("p3", 8), ("p4", 16), ("p5", 32))
    }
    corner = 100 + torch.rand(60, 2) * torch.tensor([1000.0, 600.0])
    boxes = torch.cat((corner, corner + 8 + 80 * torch.rand(60, 2)), dim=-1)
    proposals = [proposals_of(boxes, (800, 1216))]
    heads.selection.test_score_thresh, heads.selection.prune = -1.0, False
    (exact,) = heads.propose({name: x.float() for name, x in maps.items()}, proposals)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (rounded,) = heads.propose(maps, proposals)
    assert rounded.pred_boxes.tensor.dtype == rounded.scores.dtype == torch.float32
    assert torch.equal(exact.proposal_index, rounded.proposal_index)
    difference = (exact.pred_boxes.tensor - rounded.pred_boxes.tensor).abs().max()
    assert 0 < difference < 0.25  # bfloat16 was in use
    moved = (exact.stage_boxes[:, 0] - exact.pred_boxes.tensor).abs().max()
    assert moved > 1


def test_bfloat16_trains() -> None:
    model, inputs = build(CASCADE), inputs_of()
    with EventStorage():
        torch.manual_seed(3)
        exact = model(inputs)
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = model(inputs)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.2), name
    loss_sum(losses).backward()
    assert without_gradient(model) == []


def test_a_network_of_more_stages_is_not_evaluated_as_one_of_fewer(tmp_path: Path) -> None:
    torch.save({"model": build(CASCADE).state_dict()}, tmp_path / "three.pth")
    with pytest.raises(CheckpointError, match=r"no place in this model.*box_branches\.1"):
        Checkpointer(build(SINGLE), complete=True).load(str(tmp_path / "three.pth"))
