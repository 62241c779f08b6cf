# SPDX-License-Identifier: Apache-2.0
"""What is exported is the model: its boxes, its scores, and its selection among them."""

import copy
from dataclasses import replace

import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import transforms as T
from detectron2.structures import Instances
from PIL import Image
from torchvision.ops import DeformConv2d
from util import excite, tiny_model

from d2_decouple.config import get_config
from d2_decouple.data.legacy import LegacyResizeShortestEdge
from d2_decouple.export import ExportError, exportable
from d2_decouple.export.description import check_exportable, describe
from d2_decouple.export.graph import _best_locations, _best_pairs, class_wise_nms
from d2_decouple.export.programs import export_file
from d2_decouple.export.verify import deviation
from d2_decouple.modeling import HardNMS, SoftNMS
from d2_decouple.modeling.selection import LinearDecay, Selection, clip_to_image
from d2_decouple.runtime import Detections

METHODS = [
    "atss_R_50_FPN_1x",
    "autoassign_R_18_FPN_bccd",
    "ddod_R_18_FPN_bccd",
    "fcos_R_18_FPN_bccd",
    "gflv2_R_18_FPN_bccd",
    "ota_R_50_FPN_1x",
    "pdnet_R_18_FPN_bccd",
    "retinanet_R_18_FPN_bccd",
    "salt_R_18_FPN_bccd",
    "sapd_R_18_FPN_bccd",
    "tscode_gfl_R_18_FPN_bccd",
]


def excited(name):
    torch.manual_seed(0)
    # Behind RetinaNet's towers, which have no norm, scores would be 1 and their order chance.
    return excite(tiny_model(name), 0.3 if name.startswith("retinanet") else 0.7).eval()


def pictures(count, height, width, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, height, width), generator=draw).float()


def own_candidates(model, images):
    """Boxes, cut as the recipe cuts, and scores of the model itself."""
    with torch.no_grad():
        predictions = model.predict([{"image": image} for image in images])[2]
    boxes, clip = model.selection.boxes(predictions), model.selection.clip
    size = tuple(images.shape[-2:])
    boxes = boxes if clip is None else torch.stack([clip(own, size) for own in boxes])
    return boxes, model.selection.score(predictions), predictions


@pytest.mark.parametrize("name", METHODS)
def test_candidates_and_detections_are_the_models(name):
    model = excited(name)
    images = pictures(2, 70, 101)
    boxes, scores, predictions = own_candidates(model, images)
    with torch.no_grad():
        outside = exportable(copy.deepcopy(model), nms_inside=False)(images)
        inside = exportable(copy.deepcopy(model), nms_inside=True)(images)
    # RetinaNet's are not cut, and may be thousands of pixels wide.
    reach = float(boxes.abs().max())
    torch.testing.assert_close(outside[0], boxes, rtol=1e-4, atol=2e-3 + 2e-5 * reach)
    torch.testing.assert_close(outside[1], scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outside[2], predictions.strides)

    own = model.selection
    selection = Selection(
        score=lambda _: outside[1],
        boxes=lambda _: outside[0],
        candidates=own.candidates,
        nms=own.nms,
        max_detections_per_image=own.max_detections_per_image,
    )
    for index, wanted in enumerate(selection(predictions, [(70, 101)] * 2)):
        count = int(inside[3][index])
        assert count == len(wanted) > 3
        found, scores, classes = (x[index] for x in inside[:3])
        torch.testing.assert_close(scores[:count], wanted.scores)
        torch.testing.assert_close(found[:count], wanted.pred_boxes.tensor)
        assert classes[:count].tolist() == wanted.pred_classes.tolist()
        assert not found[count:].any()
        assert not scores[count:].any()
        assert (classes[count:] == -1).all()


def test_suppression_is_hand_worked():
    square = [0.0, 0.0, 10.0, 10.0]
    boxes = torch.tensor([[square, [0, 0, 10, 6], [0, 0, 10, 4], [5, 5, 5, 9]]] * 2)
    scores = torch.tensor([[[0.7, 0.9, 0.8, 0.5]], [[0.9, 0.8, 0.1, 0.5]]])
    # In the first the box of height 6 is best: it overlaps the square by 0.6, which goes, and that
    # of height 4 by 2/3, which goes too. In the second the square takes that of height 6 along,
    # and the last is not above the threshold. Lines overlap nothing.
    kept = class_wise_nms(boxes, scores, 0.5, 0.1, 9)
    assert kept.tolist() == [[[False, True, False, True]], [[True, False, False, True]]]
    assert class_wise_nms(boxes, scores, 0.65, 0.1, 9)[0, 0].tolist() == [True, True, False, True]
    assert class_wise_nms(boxes, scores, 0.5, 0.1, 1).sum().item() == 2
    torch.library.opcheck(class_wise_nms, (boxes, scores, 0.5, 0.1, 9))


def test_a_level_with_too_few_candidates_is_filled_up():
    level = torch.tensor([[[0.2, 0.6], [0.9, 0.1], [0.0, 0.3]]])  # three locations, two classes
    rows, values = _best_pairs(level, 2)
    assert rows.tolist() == [[1, 0]]  # 0.9 and 0.6
    torch.testing.assert_close(values, torch.tensor([[[0.9, -1.0], [-1.0, 0.6]]]))
    rows, values = _best_pairs(level, 8)
    assert rows.tolist() == [[1, 0, 2, 0, 1, 2, 0, 0]]  # the last two are none
    assert (values.amax(1)[0, :6] >= 0).all()
    assert (values[..., 6:] == -1).all()
    rows, values = _best_locations(level, 2)
    assert rows.tolist() == [[1, 0]]
    torch.testing.assert_close(values, torch.tensor([[[0.9, 0.2], [0.1, 0.6]]]))
    rows, values = _best_locations(level, 4)
    assert rows.tolist() == [[1, 0, 2, 0]]
    assert values[0, :, 3].tolist() == [-1, -1]


def test_an_inverted_box_neither_drops_nor_is_dropped():
    model = excited("fcos_R_18_FPN_bccd")
    graph = exportable(model, nms_inside=True)
    limit = graph.selection.candidates.test_topk_candidates
    boxes = torch.tensor([[[0.0, 0, 10, 10], [10, 10, 0, 0], [10, 0, 0, 10]]])
    scores = torch.tensor([[[0.9, 0, 0], [0.8, 0, 0], [0.7, 0, 0]]])
    found, value, label, count = graph._detections(boxes, scores, (3,))
    assert limit > 3
    assert count.tolist() == [3]
    torch.testing.assert_close(value[0, :3], scores[0, :, 0])
    torch.testing.assert_close(found[0, :3], boxes[0])
    assert label[0, :4].tolist() == [0, 0, 0, -1]


def test_fewer_candidates_than_detections_are_filled_up():
    graph = exportable(excited("fcos_R_18_FPN_bccd"), nms_inside=True)
    graph.selection = copy.copy(graph.selection)
    graph.selection.candidates = replace(graph.selection.candidates, test_topk_candidates=2)
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 30, 30]]])
    scores = torch.tensor([[[0.5, 0, 0], [0, 0.7, 0]]])
    found, value, label, count = graph._detections(boxes, scores, (2,))
    limit = graph.selection.max_detections_per_image
    assert found.shape == (1, limit, 4)
    assert limit > 2 * 3  # pairs of what was picked and a class
    torch.testing.assert_close(found[0, :2], boxes[0].flip(0))
    assert value[0, :2].tolist() == pytest.approx([0.7, 0.5])
    assert label[0, :3].tolist() == [1, 0, -1]
    assert count.tolist() == [2]
    assert not found[0, 2:].any()
    assert not value[0, 2:].any()


def test_what_cannot_be_exported_says_why_and_what_can():
    with pytest.raises(ExportError, match=r"GeneralizedRCNN cannot be .* number of them.*one-st"):
        check_exportable(tiny_model("decoupled_rcnn_R_18_FPN_bccd"))
    theirs = instantiate(get_config("retinanet_R_18_FPN_bccd_d2").model)
    with pytest.raises(ExportError, match=r"^RetinaNet .*detectron2\..* FCOS .*without _d2"):
        check_exportable(theirs)
    with pytest.raises(ExportError, match="the recipe without _official"):
        check_exportable(tiny_model("pdnet_R_50_FPN_2x_official"))
    model = tiny_model("fcos_R_18_FPN_bccd")
    for name, value, message in (
        ("clip", lambda boxes, size: boxes, "wanted is clip_to_image or None"),
        ("nms", SoftNMS(decay=LinearDecay(test_nms_thresh=0.5), test_score_thresh=0), "HardNMS"),
        ("candidates", lambda scores, sizes: None, "wanted is BestPairs or BestLocations"),
    ):
        other = copy.copy(model)
        other.selection = copy.copy(model.selection)
        setattr(other.selection, name, value)
        with pytest.raises(ExportError, match=rf"model.selection.{name} is .*{message}"):
            check_exportable(other)
    model.selection = len
    with pytest.raises(ExportError, match=r"model\.selection is .* wanted is a Selection"):
        check_exportable(model)


def test_ways_of_exporting_that_do_not_exist(tmp_path, monkeypatch):
    graph = exportable(excited("fcos_R_18_FPN_bccd"), nms_inside=True)
    for options, message in (
        ({"kind": "tflite"}, "--format is 'tflite'; wanted is one of onnx, torch-export, aoti"),
        ({"opset": 17}, "--opset is 17; wanted is 18 or newer"),
        ({"kind": "aoti"}, "--format aoti has no suppression inside.*--nms outside"),
    ):
        name = "a.pt2" if options.get("kind") == "aoti" else "a.onnx"
        with pytest.raises(ExportError, match=message):
            export_file(graph, {}, tmp_path / name, **options)
    graph.nms_inside = False
    with pytest.raises(
        ExportError, match=r"must end in \.pt2, .*a\.onnx; type --output .*/a\.pt2$"
    ):
        export_file(graph, {}, tmp_path / "a.onnx", kind="aoti")
    graph.backbone = tiny_model("sapd_R_18_FPN_bccd").backbone
    for kind in ("aoti", "torch-export"):
        with pytest.raises(ExportError, match=f"--format {kind} has no pooling.*type --size H W"):
            export_file(graph, {}, tmp_path / "a.pt2", kind=kind)
    monkeypatch.setattr("torch.__version__", "2.9.1+cpu")
    with pytest.raises(ExportError, match=r"torch 2\.10 or newer, .* 2\.9\.1.*torch>=2\.10'"):
        export_file(graph, {}, tmp_path / "a.pt2", kind="aoti", fixed_size=(64, 64))
    graph.head.cls_score = DeformConv2d(1, 1, 3)
    with pytest.raises(ExportError, match=r"--opset is 18; type --opset 19\. To run .* 1\.25"):
        export_file(graph, {}, tmp_path / "a.onnx")


def described(augmentations):
    model = tiny_model("atss_R_50_FPN_1x")
    return describe(
        model, recipe="atss", classes=["a"], augmentations=augmentations, nms_inside=True
    )


def test_the_description_says_how_to_run_it():
    found = described([T.ResizeShortestEdge([240, 240], 400)])
    assert found["resize"] == {"short_edge": 240, "max_size": 400}
    assert found["fixed_size"] is None
    assert found["channels"] == "RGB"
    assert found["pixel_mean"] == pytest.approx([123.675, 116.28, 103.53])
    assert (found["size_divisor"], found["strides"]) == (32, [8, 16, 32, 64, 128])
    assert found["selection"] == {
        "inside": True,
        "candidates": "locations",
        "test_score_thresh": 0.05,
        "test_topk_candidates": 1000,
        "test_nms_thresh": 0.6,
        "nms_side_offset": 0.0,
        "max_detections_per_image": 100,
    }


@pytest.mark.parametrize(
    "augmentations",
    [
        [],
        [T.ResizeShortestEdge([240, 320], 400)],
        [T.ResizeShortestEdge(0, 400)],  # Detectron2 then leaves the size
        [T.ResizeShortestEdge(240, 400), T.RandomFlip()],
        [T.ResizeShortestEdge(240, 400, interp=Image.Resampling.NEAREST)],
        [LegacyResizeShortestEdge(short_edge_length=240, max_size=400)],
    ],
)
def test_another_preparation_of_images_is_not_described(augmentations):
    assert described(augmentations)["resize"] is None


def found(*rows):
    """Detections of (x, score, class) rows: squares of 10 pixels."""
    boxes = torch.tensor([[x, 0, x + 10, 10] for x, _, _ in rows]).float().reshape(-1, 4)
    scores, classes = (torch.tensor([row[i] for row in rows]) for i in (1, 2))
    return Detections(boxes.numpy(), scores.float().numpy(), classes.long().numpy())


def test_deviations_are_hand_worked():
    limit = {"test_score_thresh": 0.05, "max_detections_per_image": 4}
    one = found((0, 0.9, 0), (50, 0.5, 1))
    same = deviation(one, one, limit=limit)
    assert (same.detections, same.box, same.score, same.unmatched) == (2, 0, 0, 0)
    assert same.accepted
    moved = deviation(one, found((50.25, 0.5, 1), (0, 0.8, 0)), limit=limit)
    assert (moved.box, moved.unmatched) == (0.25, 0)
    assert moved.score == pytest.approx(0.1)
    assert not moved.accepted
    assert deviation(one, found((0, 0.9, 0), (50, 0.5, 2)), limit=limit).unmatched == 2
    assert deviation(one, found((0, 0.9, 0)), limit=limit).unmatched == 1
    assert deviation(found((0, 0.9, 0)), one, limit=limit).unmatched == 1
    # One that lies at the threshold, or at the end of a full list, may be missing.
    assert deviation(found((0, 0.0505, 0)), found(), limit=limit).accepted
    full = found((0, 0.9, 0), (50, 0.8, 0), (90, 0.7, 0), (130, 0.6, 0))
    other = found((0, 0.9, 0), (50, 0.8, 0), (90, 0.7, 0), (170, 0.6, 0))
    assert deviation(full, other, limit=limit).accepted
    assert not deviation(full, other, limit={**limit, "max_detections_per_image": 5}).accepted


def test_the_names_that_are_used_are_those_of_the_package():
    # The graph leaves the assigner and its parameters behind.
    graph = exportable(excited("sapd_R_18_FPN_bccd"), nms_inside=False)
    assert {name.split(".")[0] for name in graph.state_dict()} == {"backbone", "head"}
    assert graph.selection.clip in (clip_to_image, None)
    assert isinstance(graph.selection.nms, HardNMS)
    assert not any(isinstance(value, Instances) for value in vars(graph).values())
