# SPDX-License-Identifier: Apache-2.0
"""The predictor answers as the model does, for images in any form, and says what it refuses."""

import copy
import logging

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from PIL import Image
from util import excite, tiny_model

from d2_decouple.checkpoint import CheckpointError
from d2_decouple.config import ConfigError, get_config
from d2_decouple.data.images import ImageError
from d2_decouple.engine import predictor as module
from d2_decouple.engine.predictor import Predictor

CLASSES = ["ant", "bee", "cat"]
RECIPE = """
from util import tiny
from d2_decouple.config import get_config

cfg = tiny(get_config("fcos_R_18_FPN_bccd"), num_classes=5)
model, dataloader = cfg.model, cfg.dataloader
dataloader.test.mapper.augmentations[0].update(short_edge_length=96, max_size=160)
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.py"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def trained():
    """A model of three classes, whose outputs differ between cells and whose norms do something."""
    torch.manual_seed(0)
    model = excite(tiny_model("fcos_R_18_FPN_bccd"), 0.7)
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(part.running_mean, -0.3, 0.3)
            torch.nn.init.uniform_(part.running_var, 0.5, 2)
    torch.nn.init.normal_(model.head.cls_score.bias, -2)
    return model.eval()


@pytest.fixture(scope="module")
def weights(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model_final.pth"
    torch.save({"model": trained.state_dict(), "classes": CLASSES, "iteration": 3}, path)
    return path


@pytest.fixture
def predictor(recipe, weights):
    return Predictor.from_config(recipe, weights, device="cpu")


def picture(height, width, seed=0):
    """(H, W, 3) uint8 noise in blocks, which survives resizing."""
    noise = np.random.default_rng(seed).integers(256, size=(8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.NEAREST))


def check_equal(found, expected, tolerance=1e-4):
    assert found.image_size == expected.image_size
    assert len(found) == len(expected) > 5
    assert torch.equal(found.pred_classes, expected.pred_classes)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=tolerance)
    boxes = found.pred_boxes.tensor
    torch.testing.assert_close(boxes, expected.pred_boxes.tensor, rtol=0, atol=10 * tolerance)


def test_it_answers_as_the_model_behind_detectron2s_loader(predictor, recipe, trained, tmp_path):
    """Folded norms, channels-last and own preprocessing change nothing but rounding."""
    path = tmp_path / "a.png"
    Image.fromarray(picture(75, 110)).save(path)
    mapper: DatasetMapper = instantiate(
        {**get_config(recipe).dataloader.test.mapper, "image_format": "BGR"}
    )
    inputs = mapper({"file_name": str(path), "height": 75, "width": 110})
    assert inputs["image"].shape == (3, 96, 141)
    with torch.no_grad():
        expected = trained([inputs])[0]["instances"]
    found = predictor(path)
    check_equal(found, expected, 1e-5)
    assert torch.equal(found.location_index, expected.location_index)
    boxes = found.pred_boxes.tensor
    assert boxes.min() >= 0
    assert (boxes <= torch.tensor([110.0, 75.0, 110.0, 75.0])).all()
    assert predictor.classes == tuple(CLASSES)  # the recipe says five
    assert not any(isinstance(x, torch.nn.BatchNorm2d) for x in predictor.model.modules())


def test_a_list_gives_what_single_images_give(predictor, tmp_path):
    """Of other sizes, and of sizes that become equal: padding must not be seen."""
    shapes = [(75, 110), (96, 141), (110, 75), (60, 60), (192, 282), (75, 110), (200, 90)]
    images = [picture(*shape, seed) for seed, shape in enumerate(shapes)]
    calls = []
    predictor.model.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    together = predictor(images)
    assert max(calls) == 2  # of the first four, two have one size
    assert sum(calls) == len(images)
    for image, found in zip(images, together, strict=True):
        check_equal(found, predictor(image))
    assert predictor([]) == []
    (once,) = predictor(iter(images[:1]))
    check_equal(once, together[0])


def test_the_order_of_channels_is_the_one_that_was_said(recipe, weights, predictor, tmp_path):
    rgb = picture(75, 110)
    path = tmp_path / "a.png"
    Image.fromarray(rgb).save(path)
    expected = predictor(str(path))
    check_equal(predictor(rgb[..., ::-1]), expected)
    other = Predictor.from_config(recipe, weights, device="cpu", channels="RGB")
    check_equal(other(rgb), expected)
    check_equal(other(path), expected)
    assert not torch.equal(predictor(rgb).scores[:5], expected.scores[:5])
    with pytest.raises(ConfigError, match="'BGR' or 'RGB', got 'GBR'"):
        Predictor.from_config(recipe, weights, channels="GBR")


def test_a_rotated_photograph_has_boxes_where_it_is_displayed(predictor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb = picture(60, 90)
    Image.fromarray(np.ascontiguousarray(np.rot90(rgb))).save(tmp_path / "a.png", exif=exif)
    check_equal(predictor(tmp_path / "a.png"), predictor(rgb[..., ::-1]))


@pytest.mark.parametrize("shape", [(1, 1), (1, 4000, 3), (4000, 1, 1), (40, 3, 4)])
def test_images_of_one_pixel_or_one_line(predictor, shape):
    found = predictor(np.full(shape, 128, np.uint8))
    assert found.image_size == shape[:2]
    assert torch.isfinite(found.pred_boxes.tensor).all()


def test_results_are_ordinary_tensors_on_the_cpu(predictor):
    found = predictor(picture(75, 110))
    found.pred_boxes.scale(2, 2)  # in place, which tensors of inference mode refuse
    found.scores.mul_(0.5)
    found.pred_classes.add_(1)
    assert not found.scores.requires_grad


def test_the_threshold_drops_what_is_not_above_it(recipe, weights, predictor, trained):
    everything = predictor(picture(75, 110))
    thresh = float(everything.scores[len(everything) // 2])
    kept = everything[everything.scores > thresh]
    strict = Predictor.from_config(recipe, weights, device="cpu", score_thresh=thresh)
    check_equal(strict(picture(75, 110)), kept)
    # Also where the model knows no such threshold, or a lower one.
    resize = [T.ResizeShortestEdge(96, 160)]
    own = Predictor(copy.deepcopy(trained), augmentations=resize, device="cpu", score_thresh=thresh)
    check_equal(own(picture(75, 110)), kept)
    assert strict.model.selection.candidates.test_score_thresh == thresh


def test_averaged_weights_are_preferred(recipe, weights, trained, tmp_path):
    other = {name: torch.zeros_like(x) for name, x in trained.state_dict().items()}
    path = tmp_path / "a.pth"
    torch.save({"model": other, "ema": trained.state_dict(), "classes": CLASSES}, path)
    image = picture(75, 110)
    averaged = Predictor.from_config(recipe, path, device="cpu")
    check_equal(averaged(image), Predictor.from_config(recipe, weights, device="cpu")(image))


def test_class_names_come_from_the_checkpoint_or_are_given(recipe, weights, trained, tmp_path):
    with pytest.raises(ConfigError, match="classes ant, bee, cat, given are a, b; leave"):
        Predictor.from_config(recipe, weights, classes=["a", "b"])
    path = tmp_path / "nameless.pth"
    torch.save({"model": trained.state_dict()}, path)
    given = Predictor.from_config(recipe, path, classes=["x", "y", "z"], device="cpu")
    assert given.classes == ("x", "y", "z")
    known = Predictor.from_config(recipe, path, ["model.num_classes=3"], device="cpu")
    assert known.classes == ("RBC", "WBC", "Platelets")  # the test set's
    with pytest.raises(CheckpointError, match=r"cls_score"):
        Predictor.from_config(recipe, path)  # five classes


def test_missing_weights_are_named(recipe, tmp_path):
    with pytest.raises(CheckpointError, match=r"no weights '.*none\.pth': give the checkpoint"):
        Predictor.from_config(recipe, tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="no weights ''"):
        Predictor.from_config(recipe, "")


def test_a_broken_file_in_a_list_is_named(predictor, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        predictor([picture(60, 60), tmp_path / "broken.jpg"])


def test_what_is_no_image_is_refused(predictor):
    with pytest.raises(TypeError, match="got Tensor"):
        predictor(torch.zeros(3, 8, 8))
    with pytest.raises(TypeError, match=r"got Image .*numpy\.asarray"):
        predictor(Image.new("RGB", (8, 8)))
    with pytest.raises(ImageError, match=r"\(2, 8, 8, 3\)"):
        predictor(np.zeros((2, 8, 8, 3), np.uint8))


def test_bfloat16_is_close_and_computes_boxes_in_float32(recipe, weights, predictor):
    half = Predictor.from_config(recipe, weights, device="cpu", precision="bfloat16")
    types = {name: parameter.dtype for name, parameter in half.model.named_parameters()}
    assert types["backbone.bottom_up.stem.conv1.weight"] == torch.bfloat16
    assert types["head.cls_subnet.0.weight"] == types["head.cls_score.weight"] == torch.bfloat16
    assert types["head.predictor.bbox_pred.weight"] == torch.float32
    image = picture(75, 110)
    inputs = [half._input(image)]
    with torch.inference_mode(), half._autocast():
        *_, got = half.model.predict(inputs)
    with torch.inference_mode():
        *_, expected = predictor.model.predict(inputs)
    assert got.boxes.dtype == got.logits.dtype == torch.float32
    apart = (got.boxes - expected.boxes).abs() / expected.strides[:, None]
    assert apart.mean() < 0.02  # strides
    assert (got.logits.sigmoid() - expected.logits.sigmoid()).abs().mean() < 0.01
    assert not torch.equal(got.logits, expected.logits)
    assert half(image).pred_boxes.tensor.dtype == torch.float32


def test_precisions_that_make_no_sense_are_refused(recipe, weights, monkeypatch, caplog):
    with pytest.raises(ConfigError, match=r"float16 is for GPUs.*ten times.*bfloat16"):
        Predictor.from_config(recipe, weights, device="cpu", precision="float16")
    with pytest.raises(ConfigError, match=r"one of float32, bfloat16, float16, got 'int8'"):
        Predictor.from_config(recipe, weights, device="cpu", precision="int8")
    with pytest.raises(ConfigError, match="whole number from 1, got 0"):
        Predictor.from_config(recipe, weights, device="cpu", batch_size=0)
    monkeypatch.setattr(module, "_cpu_has_bfloat16", lambda: False)
    with caplog.at_level(logging.WARNING):
        Predictor.from_config(recipe, weights, device="cpu", precision="bfloat16")
    assert "slower than float32" in caplog.text


def test_a_device_that_is_not_there_is_named(recipe, weights, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(
        ConfigError, match="device is cuda, but torch sees no GPU; give device='cpu'"
    ):
        Predictor.from_config(recipe, weights, device="cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="cuda:2, but torch sees 2 GPUs; give cuda:0 to cuda:1"):
        Predictor.from_config(recipe, weights, device="cuda:2")
    with pytest.raises(ConfigError, match="device 'gpu' is not known"):
        Predictor.from_config(recipe, weights, device="gpu")


def test_augmentations_that_move_boxes_are_refused(trained):
    predictor = Predictor(
        tiny_model("fcos_R_18_FPN_bccd"),
        augmentations=[T.ResizeShortestEdge(64, 96), T.RandomFlip(prob=1.0)],
        device="cpu",
    )
    with pytest.raises(ConfigError, match=r"more than resizing .*HFlip"):
        predictor(picture(40, 50))


def test_test_time_augmentation_sees_the_original(recipe, weights):
    options = {"short_edge_lengths": [64, 96], "max_size": 160, "flip": True}
    augmented = Predictor.from_config(recipe, weights, device="cpu", tta=options)
    seen, given = [], []
    augmented.model.register_forward_pre_hook(lambda _, x: given.append(x[0][0]["image"].shape))
    detector = augmented.model.model
    detector.backbone.register_forward_pre_hook(lambda _, x: seen.append(tuple(x[0].shape[-2:])))
    found = augmented([picture(75, 110), picture(1, 4000)])[0]
    assert seen[:4] == [(64, 96), (64, 96), (96, 160), (96, 160)]
    assert found.image_size == (75, 110)
    assert given[0] == (3, 75, 110)  # not what one of the sizes was made of
    assert set(found.variant_index.tolist()) == {0, 1, 2, 3}
    default = Predictor.from_config(recipe, weights, device="cpu", tta=True)
    assert default.model.short_edge_lengths == (72, 96, 120)
    assert default.model.max_size == 200
    with pytest.raises(ConfigError, match=r"tta=.*max_size=0"):
        Predictor.from_config(recipe, weights, tta={"max_size": 0})
    with pytest.raises(ConfigError, match=r"tta=.*lengths"):
        Predictor.from_config(recipe, weights, tta={"lengths": [1]})


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["fcos_R_18_FPN_bccd_d2", "retinanet_R_18_FPN_bccd_d2"])
def test_detectron2s_own_detectors_work_as_well(name, precision, tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"model": instantiate(get_config(name).model).state_dict()}, path)
    size = "dataloader.test.mapper.augmentations.0.short_edge_length=64"
    predictor = Predictor.from_config(
        name, path, [size], device="cpu", precision=precision, score_thresh=0.0
    )
    found = predictor(picture(75, 110))
    assert len(found) > 5
    assert found.image_size == (75, 110)
    assert found.scores.dtype == found.pred_boxes.tensor.dtype == torch.float32
    # Torch takes the order of the weights for all maps behind the first convolution.
    kernels = [x for x in predictor.model.parameters() if x.dim() == 4]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in kernels)
    with pytest.raises(ConfigError, match="OneStageDetector"):
        Predictor.from_config(name, path, device="cpu", tta=True)
