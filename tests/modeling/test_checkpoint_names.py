# SPDX-License-Identifier: Apache-2.0
"""Names in checkpoints are API: Detectron2's FCOS loads, and what does not fit is named."""

import logging
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling.backbone.fpn import FPN, LastLevelP6P7
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
from standins import AnchorPredictor, OddPredictor
from torch import nn
from util import WIDTH, excite, random_input, tiny, tiny_model, tiny_resnet

from d2_decouple.config import get_config
from d2_decouple.modeling import BoundaryPoints, FCOSPredictor, PDNetPredictor, SemanticPoints

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CLASSES = 5
SIZES = [(120, 160), (101, 67)]


def group_norm(channels):
    """GroupNorm of 32 groups, but also of the one channel that Detectron2's head probes with."""
    return nn.GroupNorm(min(32, channels), channels)


def detectron2_fcos(norm):
    backbone = FPN(
        tiny_resnet(),
        ["res3", "res4", "res5"],
        WIDTH,
        top_block=LastLevelP6P7(WIDTH, WIDTH, "p5"),
    )
    head = FCOSHead(
        input_shape=[ShapeSpec(channels=WIDTH)] * 5,
        num_classes=CLASSES,
        conv_dims=[WIDTH, WIDTH],
        norm=norm,
    )
    model = FCOS(
        backbone=backbone,
        head=head,
        head_in_features=["p3", "p4", "p5", "p6", "p7"],
        num_classes=CLASSES,
        pixel_mean=[103.530, 116.280, 123.675],
        pixel_std=[1.0, 1.0, 1.0],
    )
    return planted(model)


@torch.no_grad()
def planted(model):
    """Outputs of a trained detector's size: logits around -0.5, boxes of a few cells."""
    for part in model.modules():  # statistics of the frozen norms that are not 0 and 1
        if isinstance(part, FrozenBatchNorm2d):
            for name in ("weight", "running_var"):
                getattr(part, name).uniform_(0.5, 1.5)
            for name in ("bias", "running_mean"):
                getattr(part, name).normal_(std=0.1)
    excite(model)
    images = model.preprocess_image([random_input((128, 128), 0)]).tensor
    outputs = model.head([model.backbone(images)[name] for name in model.head_in_features])
    layers = (model.head.cls_score, model.head.bbox_pred, model.head.ctrness)
    for layer, maps, middle in zip(layers, outputs, (-0.5, 2.0, 0.0), strict=True):
        layer.weight /= torch.cat([x.flatten() for x in maps]).std()
        layer.bias.fill_(middle)
    return model.eval()


def our_fcos(norm):
    cfg = tiny(get_config("fcos_R_50_FPN_1x_d2"), num_classes=CLASSES, convs=2)
    cfg.model.head.norm = norm
    return instantiate(cfg.model).eval()


@pytest.fixture(params=["none", "GN"])
def pair(request):
    """Detectron2's FCOS and ours with its state dict."""
    norm = {"none": "", "GN": group_norm}[request.param]
    theirs, ours = detectron2_fcos(norm), our_fcos(norm)
    incompatible = ours.load_state_dict(theirs.state_dict())
    assert not incompatible.missing_keys
    assert not incompatible.unexpected_keys
    return theirs, ours


def raw(model, inputs):
    """Logits, centerness and decoded boxes of Detectron2's FCOS, flattened over levels."""
    images = model.preprocess_image(inputs)
    maps = model.backbone(images.tensor)
    features = [maps[name] for name in model.head_in_features]
    logits, deltas, centerness = model._transpose_dense_predictions(
        model.head(features), [CLASSES, 4, 1]
    )
    boxes = [
        torch.stack([model.box2box_transform.apply_deltas(x, anchor.tensor) for x in delta])
        for delta, anchor in zip(deltas, model.anchor_generator(features), strict=True)
    ]
    return torch.cat(logits, 1), torch.cat(centerness, 1)[..., 0], torch.cat(boxes, 1)


@torch.no_grad()
def test_detectron2s_weights_give_detectron2s_predictions(pair):
    """In float64, where another order of summation cannot hide an error."""
    theirs, ours = (model.double() for model in pair)
    inputs = [random_input(size, 0) for size in SIZES]
    logits, centerness, boxes = raw(theirs, inputs)
    predictions = ours.predict(inputs)[2]
    assert logits.std() > 0.5
    torch.testing.assert_close(predictions.logits, logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(predictions.quality, centerness, rtol=0, atol=1e-9)
    torch.testing.assert_close(predictions.boxes, boxes, rtol=0, atol=1e-9)


@torch.no_grad()
def test_detectron2s_weights_give_detectron2s_detections(pair):
    theirs, ours = pair
    inputs = [random_input(size, 0) for size in SIZES]
    for expected, found in zip(theirs(inputs), ours(inputs), strict=True):
        expected, found = expected["instances"], found["instances"]
        assert len(expected) >= 20
        assert torch.equal(found.pred_classes, expected.pred_classes)
        torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-5, atol=1e-4
        )


@torch.no_grad()
def test_our_weights_load_into_ours_unchanged():
    """Nested names, as ours are saved, pass the translation of flat ones untouched."""
    source, target = excite(tiny_model()), tiny_model()
    target.load_state_dict(source.state_dict())
    inputs = [random_input((64, 64), 0)]
    assert torch.equal(source.predict(inputs)[2].boxes, target.predict(inputs)[2].boxes)


@pytest.mark.parametrize("name", ["fcos_R_50", "pdnet_R_50"])
def test_golden_list_of_names(name):
    """Full size, without memory: names and shapes of the real recipe's state dict."""
    with torch.device("meta"):
        model = instantiate(get_config(f"{name}_FPN_1x").model)
    own = [
        f"{name} {'x'.join(map(str, value.shape)) or 'scalar'}"
        for name, value in model.state_dict().items()
    ]
    assert own == (GOLDEN / f"state_dict_keys_{name}.txt").read_text().splitlines()


def other_model(predictor, num_classes=3):
    """A detector whose predictor is not the one the weights come from."""
    cfg = tiny(get_config("fcos_R_50_FPN_1x"), num_classes=num_classes)
    cfg.model.head.predictor = L(predictor)(num_classes="${...num_classes}", in_channels=WIDTH)
    if predictor is PDNetPredictor:
        cfg.model.head.predictor.update(
            class_points=L(SemanticPoints)(num_points=9), box_points=L(BoundaryPoints)()
        )
    return instantiate(cfg.model)


MISFITS = {
    # predictor -> tensors of FCOS's that have a place but another shape: (name, shape here)
    AnchorPredictor: [
        ("cls_score.weight", (27, WIDTH, 3, 3)),
        ("cls_score.bias", (27,)),
        ("predictor.bbox_pred.weight", (36, WIDTH, 3, 3)),
        ("predictor.bbox_pred.bias", (36,)),
    ],
    PDNetPredictor: [
        ("cls_score.weight", (27, WIDTH, 1, 1)),
        ("predictor.bbox_pred.weight", (4, WIDTH, 1, 1)),
    ],
    OddPredictor: [
        ("predictor.bbox_pred.weight", (8, WIDTH, 3, 3)),
        ("predictor.bbox_pred.bias", (8,)),
    ],
}
HOMELESS = {
    # predictor -> tensors of FCOS's for which it has no parameter at all
    AnchorPredictor: {"head.ctrness.weight", "head.ctrness.bias"},
    PDNetPredictor: {
        "head.predictor.bbox_pred.bias",
        "head.ctrness.weight",
        "head.ctrness.bias",
        "head.cls_score.bias",
    },
    OddPredictor: set(),
}


def source_weights():
    """FCOS weights under Detectron2's flat names, K = 3."""
    state = excite(tiny_model()).state_dict()
    return {name.replace("head.predictor.", "head."): value for name, value in state.items()}


def assert_fitting_tensors_loaded(model, weights, misfits):
    own = model.state_dict()
    left_out = {f"head.{name}" for name, _ in misfits}
    compared = 0
    for name, value in weights.items():
        nested = name if name in own else name.replace("head.", "head.predictor.")
        if name.startswith("head.cls_score."):
            nested = name  # of the head itself, whatever the predictor has under that name
        if nested in own and nested not in left_out:
            assert torch.equal(own[nested], value), nested
            compared += 1
    assert compared >= len(weights) - 6


@pytest.mark.parametrize("predictor", MISFITS)
def test_other_shapes_are_left_out_and_named(predictor, caplog):
    model, weights = other_model(predictor), source_weights()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        incompatible = model.load_state_dict(weights, strict=False)
    assert_fitting_tensors_loaded(model, weights, MISFITS[predictor])
    assert set(incompatible.unexpected_keys) == HOMELESS[predictor]
    (record,) = [r for r in caplog.records if r.name.startswith("d2_decouple")]
    message = record.getMessage()
    assert message.startswith(f"{len(MISFITS[predictor])} tensors")
    for name, here in MISFITS[predictor]:
        assert torch.equal(model.state_dict()[f"head.{name}"], before[f"head.{name}"])
        there = tuple(weights["head." + name.removeprefix("predictor.")].shape)
        assert f"head.{name}: {there} in the file, {here} here" in message


@pytest.mark.parametrize("predictor", MISFITS)
def test_other_shapes_in_a_file(predictor, caplog, tmp_path):
    """Detectron2's checkpointer compares shapes by name itself, before any name is translated."""
    model, weights = other_model(predictor), source_weights()
    torch.save({"model": weights}, tmp_path / "fcos.pth")
    with caplog.at_level(logging.WARNING):
        DetectionCheckpointer(model).load(str(tmp_path / "fcos.pth"))
    assert_fitting_tensors_loaded(model, weights, MISFITS[predictor])
    for name, here in MISFITS[predictor]:
        there = tuple(weights["head." + name.removeprefix("predictor.")].shape)
        (record,) = [
            r
            for r in caplog.records
            if f"head.{name}" in r.getMessage() and str(there) in r.getMessage()
        ]
        assert str(here) in record.getMessage()


def test_detectron2s_file_loads_without_a_word(caplog, tmp_path):
    theirs, ours = detectron2_fcos(""), our_fcos("")
    torch.save({"model": theirs.state_dict()}, tmp_path / "fcos.pth")
    with caplog.at_level(logging.WARNING):
        DetectionCheckpointer(ours).load(str(tmp_path / "fcos.pth"))
    assert caplog.text == ""
    assert torch.equal(ours.head.predictor.bbox_pred.weight, theirs.head.bbox_pred.weight)


def test_another_class_count_keeps_the_rest(caplog):
    model, weights = tiny_model(num_classes=7), source_weights()
    with caplog.at_level(logging.WARNING):
        model.load_state_dict(weights, strict=False)
    misfits = [("cls_score.weight", (7, WIDTH, 3, 3)), ("cls_score.bias", (7,))]
    assert_fitting_tensors_loaded(model, weights, misfits)
    assert "2 tensors" in caplog.text


class ShadowingPredictor(FCOSPredictor):
    """A part of the predictor is named as one of the head itself."""

    def __init__(self, *, num_classes, in_channels):
        super().__init__(num_classes=num_classes, in_channels=in_channels)
        self.cls_score = nn.Conv2d(in_channels, num_classes, 1)


def test_a_predictors_part_may_be_named_like_the_heads():
    model = other_model(ShadowingPredictor)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    other = other_model(ShadowingPredictor)
    other.load_state_dict(state)
    assert torch.equal(other.head.cls_score.weight, state["head.cls_score.weight"])


def test_a_strict_load_still_fails_on_misfits():
    with pytest.raises(RuntimeError, match=r"cls_score\.weight"):
        tiny_model(num_classes=7).load_state_dict(source_weights())


def test_loading_leaves_the_callers_dict_alone():
    weights = source_weights()
    names = list(weights)
    tiny_model(num_classes=7).load_state_dict(weights, strict=False)
    assert list(weights) == names
