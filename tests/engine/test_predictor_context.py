# SPDX-License-Identifier: Apache-2.0
"""Where the evidence for detections lies: gradients that are known, in pixels of the image."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import transforms as T
from pixel_detector import BOX, LEFT, TOP, pixel_detector
from torch import nn
from util import excite, tiny, tiny_model

from d2_decouple.config import ConfigError, get_config
from d2_decouple.engine.context import _Uncut, context_of, evidence_in
from d2_decouple.engine.predictor import Predictor
from d2_decouple.visualization import draw_context

SIZE, SEEN = (40, 60), (80, 120)  # (H, W) of the image, and of what the model sees of it
RESIZE = [T.ResizeShortestEdge(80, 200)]
DEVIATION = 2.0  # pixels of the image: 4 of the seen one, half the stride


def pixel_predictor(**options):
    return Predictor(pixel_detector(**options), augmentations=RESIZE, device="cpu")


def black():
    return np.zeros((*SIZE, 3), np.uint8)


def bell(x, y):
    """(H, W) what becomes of a pixel (x, y) of the seen image, which is twice as large."""
    rows, columns = (
        np.exp(-(((np.arange(length) + 0.5 - (at + 0.5) / 2) / DEVIATION) ** 2) / 2)
        for length, at in zip(SIZE, (y, x), strict=True)
    )
    return torch.tensor(np.outer(rows / rows.sum(), columns / columns.sum())).float()


def build(name, **options):
    torch.manual_seed(0)
    model = excite(instantiate(tiny(get_config(name)).model), 0.7)
    return Predictor(model, augmentations=[T.ResizeShortestEdge(64, 96)], device="cpu", **options)


def picture(height=40, width=56):
    return np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def predictor():
    return build("pdnet_R_18_FPN_bccd")


def test_evidence_that_is_known():
    """Channels and sides add up by their absolute values, wherever they are read."""
    seen = pixel_predictor().context(black())
    found = seen.instances
    assert found.pred_classes.tolist() == [1]
    torch.testing.assert_close(found.pred_boxes.tensor, torch.tensor([BOX]) / 2)
    assert found.locations.tolist() == [[26, 18]]
    of_class = (bell(30, 20) + bell(60, 50)) / 2  # 2 + 2 in two channels, and 4 in one
    of_box = (2 * bell(*LEFT) + bell(*TOP)) / 3
    assert seen.class_evidence.maps.shape == seen.box_evidence.maps.shape == (1, *SIZE)
    torch.testing.assert_close(seen.class_evidence.maps[0], of_class, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(seen.box_evidence.maps[0], of_box, rtol=1e-3, atol=1e-6)
    # The box is 10 to 45 and 5 to 30: both pixels of the class lie in it, and that of the top not.
    assert seen.class_evidence.shares.tolist() == pytest.approx([1], abs=0.01)
    assert seen.box_evidence.shares.tolist() == pytest.approx([2 / 3], abs=0.01)
    half = math.hypot(35, 25) / 2
    away = [(15.25 - 27.5, 10.25 - 17.5), (30.25 - 27.5, 25.25 - 17.5)]
    square = sum(x * x + y * y for x, y in away) / 2 + 2 * DEVIATION**2
    assert seen.class_evidence.radii.tolist() == pytest.approx([math.sqrt(square) / half], rel=0.01)
    away = [(20.25 - 27.5, 20.25 - 17.5)] * 2 + [(52.25 - 27.5, 20.25 - 17.5)]
    square = sum(x * x + y * y for x, y in away) / 3 + 2 * DEVIATION**2
    assert seen.box_evidence.radii.tolist() == pytest.approx([math.sqrt(square) / half], rel=0.01)
    common = torch.minimum(of_class, of_box).sum().item()
    assert seen.overlaps.tolist() == pytest.approx([common], rel=0.01)
    assert 0.001 < common < 0.2


def test_evidence_of_the_same_pixels_overlaps():
    reads = {LEFT: (2.0, 0.0, 0.0), TOP: (0.0, 0.0, 1.0)}
    seen = pixel_predictor(class_reads=reads).context(black())
    assert seen.overlaps.tolist() == pytest.approx([1])
    torch.testing.assert_close(seen.class_evidence.maps, seen.box_evidence.maps)
    elsewhere = pixel_predictor(class_reads={(5, 75): (1.0, 0.0, 0.0)}).context(black())
    assert elsewhere.overlaps.tolist() == pytest.approx([0], abs=1e-4)


def test_what_does_not_depend_on_the_image_has_no_evidence():
    seen = pixel_predictor(class_reads={(5, 5): (0.0, 0.0, 0.0)}).context(black())
    assert not seen.class_evidence.maps.any()
    numbers = [*seen.class_evidence[1:], seen.overlaps]
    assert [value.tolist() for value in numbers] == [[0], [0], [0]]
    torch.testing.assert_close(seen.box_evidence.maps.sum(), torch.tensor(1.0))


def test_a_gradient_that_is_missing_or_not_finite_is_named():
    with pytest.raises(ConfigError, match="class logit of a detection has no gradient with") as e:
        pixel_predictor(change=lambda x: x.data).context(black())
    assert "not under torch.no_grad()" in str(e.value)
    with pytest.raises(ConfigError, match="class logit with respect to the image is not finite"):
        pixel_predictor(change=torch.sqrt).context(black())


def test_shares_count_parts_of_pixels_and_radii_are_relative_to_the_box():
    maps = torch.zeros(3, 20, 30)
    maps[0, 5:15, 10:26] = 1 / 160  # evenly over the box
    maps[1, 10, 10] = 1.0
    box = [10.0, 5.0, 26.0, 15.0]
    boxes = torch.tensor([box, [10.25, 10.5, 20.0, 30.0], box])
    evidence = evidence_in(maps, boxes)
    # Of pixel (10, 10) three quarters in x and a half in y are inside.
    assert evidence.shares.tolist() == pytest.approx([1, 0.375, 0], rel=1e-5)
    away = math.hypot(10.5 - 15.125, 10.5 - 20.25) / (math.hypot(9.75, 19.5) / 2)
    # Pixels are counted at their middle: a twelfth of a pixel's square is missing in x and in y.
    even = math.sqrt((16**2 - 1 + 10**2 - 1) / 12) / (math.hypot(16, 10) / 2)
    assert evidence.radii.tolist() == pytest.approx([even, away, 0], rel=1e-5)
    assert even == pytest.approx(1 / math.sqrt(3), rel=0.01)
    empty = evidence_in(torch.zeros(0, 20, 30), torch.zeros(0, 4))
    assert empty.shares.shape == empty.radii.shape == (0,)
    corner = evidence_in(maps[:1], torch.tensor([[10.0, 5.0, 10.0, 5.0]]))
    assert corner.shares.tolist() == [0]


def test_gradients_go_where_a_training_cuts_them():
    """PDNet's points start from the coarse box; its gradients are those of finite differences."""
    torch.manual_seed(0)
    model = excite(tiny_model("pdnet_R_18_FPN_bccd"), 0.7).eval().double().requires_grad_(False)
    pixels = (255 * torch.rand(3, 64, 64, dtype=torch.float64)).requires_grad_()
    with _Uncut():
        _, _, predictions = model.predict([{"image": pixels}])
    _, _, cut = model.predict([{"image": pixels}])
    location = 30
    outputs = {
        "logit": lambda x: x.logits[0, location, 1],
        "left": lambda x: x.boxes[0, location, 0],
        "bottom": lambda x: x.boxes[0, location, 3],
    }
    direction = torch.randn(3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        ahead, behind = (
            model.predict([{"image": pixels + step * direction}])[2] for step in (1e-5, -1e-5)
        )
    for of in outputs.values():
        expected = float(of(ahead) - of(behind)) / 2e-5
        (gradient,) = torch.autograd.grad(of(predictions), pixels, retain_graph=True)
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-4)
        (without,) = torch.autograd.grad(of(cut), pixels, retain_graph=True)
        assert float((without * direction).sum()) != pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", ["tscode_fcos_R_18_FPN_bccd", "pdnet_R_18_FPN_bccd"])
def test_maps_are_the_models_own_gradients(name):
    """Computed again, with one backward pass an output, and smoothed pixel by pixel."""
    predictor = build(name)
    seen = predictor.context(picture(), limit=2)
    item = predictor._input(picture())
    pixels = item["image"].float().requires_grad_()
    assert pixels.shape == (3, 64, 90)  # padded to 64 x 96
    with _Uncut():
        _, _, predictions = predictor.model.predict([{"image": pixels}])
    found = seen.instances
    assert len(found) > 4
    places, labels = (found.get(key).tolist() for key in ("location_index", "pred_classes"))
    smooth = []
    for length, before in zip(found.image_size, pixels.shape[1:], strict=True):
        new = (np.arange(length)[:, None] + 0.5) * before / length
        weights = np.exp(-((np.arange(before) + 0.5 - new) ** 2) / (2 * 4.0**2))
        smooth.append(torch.tensor(weights / weights.sum(axis=0)))
    for index in range(2):
        logit = predictions.logits[0, places[index], labels[index]]
        sides = predictions.boxes[0, places[index]]
        for outputs, evidence in (
            ([logit], seen.class_evidence),
            (list(sides), seen.box_evidence),
        ):
            raw = sum(
                torch.autograd.grad(x, pixels, retain_graph=True)[0].abs().sum(0) for x in outputs
            )
            expected = smooth[0] @ raw.double() @ smooth[1].T
            expected = (expected / expected.sum()).float()
            torch.testing.assert_close(evidence.maps[index], expected, rtol=1e-3, atol=1e-7)
    assert seen.overlaps.min() > 0
    assert seen.overlaps.max() < 0.99  # two tasks, two maps


@pytest.mark.parametrize("name", ["atss_R_18_FPN_bccd", "tscode_gfl_R_18_FPN_bccd"])
def test_other_one_stage_detectors_need_no_change_here(name):
    seen = build(name).context(picture(), limit=1)
    for evidence in (seen.class_evidence, seen.box_evidence):
        torch.testing.assert_close(evidence.maps.sum((1, 2)), torch.ones(1))
        assert (evidence.maps >= 0).all()
        assert 0 < evidence.shares[0] < 1.0001
    assert 0 < seen.overlaps[0] < 0.99


def test_detections_are_those_of_a_call_and_only_the_strongest_have_evidence(predictor):
    found = predictor(picture())
    points = predictor.points(picture())
    seen = predictor.context(picture(), limit=2)
    assert len(found) > 3
    for name in ("scores", "pred_classes", "location_index"):
        assert torch.equal(seen.instances.get(name), found.get(name))
    assert torch.equal(seen.instances.pred_boxes.tensor, found.pred_boxes.tensor)
    for name in ("locations", "levels"):
        torch.testing.assert_close(seen.instances.get(name), points.instances.get(name))
    assert (seen.level_names, seen.strides) == (points.level_names, points.strides)
    assert len(seen.overlaps) == len(seen.class_evidence.maps) == len(seen.box_evidence.radii) == 2
    records = seen.as_records()
    assert len(records) == 2
    for index, record in enumerate(records):
        assert record["level"] == seen.level_names[seen.instances.levels[index]]
        assert record["location"] == points.as_records()[index]["location"]
        assert record["overlap"] == pytest.approx(seen.overlaps[index].item(), abs=6e-5)
        for key, evidence in (("class", seen.class_evidence), ("box", seen.box_evidence)):
            share, radius = evidence.shares[index].item(), evidence.radii[index].item()
            assert record[key] == pytest.approx({"share": share, "radius": radius}, abs=6e-5)
    everything = predictor.context(picture(), limit=None)
    assert len(everything.overlaps) == len(found)
    torch.testing.assert_close(everything.box_evidence.maps[:2], seen.box_evidence.maps)


def test_an_image_without_detections():
    predictor = build("pdnet_R_18_FPN_bccd", score_thresh=0.9999)
    seen = predictor.context(picture())
    assert seen.class_evidence.maps.shape == (0, 40, 56)
    assert seen.overlaps.shape == seen.box_evidence.shares.shape == (0,)
    assert seen.instances.locations.shape == (0, 2)
    assert seen.as_records() == []
    assert predictor.draw_context(picture()).shape[1] == 640 + 36


def test_the_model_stays_as_it_is():
    """Also one that is trained: no gradients, no hooks, no changed flags."""
    model = pixel_detector().eval()
    model.head.gain.requires_grad_(True)
    model.head.gain.grad = torch.tensor(7.0)
    image = torch.zeros(3, *SEEN)
    item = {"image": image, "height": SIZE[0], "width": SIZE[1]}
    with torch.no_grad():
        found = model([item])[0]["instances"]
        seen = context_of(model, item, found)
    assert seen.class_evidence.maps.sum() > 0
    assert model.head.gain.grad.item() == 7
    assert model.head.gain.requires_grad
    assert not image.requires_grad
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(value.requires_grad for value in (*seen.box_evidence, seen.overlaps))
    predictor = build("fcos_R_18_FPN_bccd")
    before = {name: value.clone() for name, value in predictor.model.state_dict().items()}
    predictor.context(picture(), limit=1)
    after = predictor.model.state_dict()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    assert not any(x.requires_grad or x.grad is not None for x in predictor.model.parameters())
    assert torch.is_grad_enabled()


def test_under_inference_mode_and_of_a_model_made_in_it(predictor):
    expected = predictor.context(picture(), limit=1)
    with torch.inference_mode():
        inside = predictor.context(picture(), limit=1)
        made = build("pdnet_R_18_FPN_bccd")
    assert any(x.is_inference() for x in made.model.parameters())
    for seen in (inside, made.context(picture(), limit=1)):
        torch.testing.assert_close(seen.class_evidence.maps, expected.class_evidence.maps)
        torch.testing.assert_close(seen.box_evidence.maps, expected.box_evidence.maps)
        seen.class_evidence.maps.mul_(2)  # in place, which tensors of inference mode refuse


def test_half_precision_finds_and_float32_explains(predictor):
    half = build("pdnet_R_18_FPN_bccd", precision="bfloat16")
    found, seen = half(picture()), half.context(picture())
    assert torch.equal(seen.instances.scores, found.scores)
    assert {x.dtype for x in half.model.parameters()} == {torch.bfloat16, torch.float32}
    # The same weights, rounded; gradients in half precision would be off by some percent.
    rounded = build("pdnet_R_18_FPN_bccd")
    for mine, theirs in zip(rounded.model.parameters(), half.model.parameters(), strict=True):
        mine.data.copy_(theirs)
    item = half._input(picture())
    expected = context_of(rounded.model, item, found, limit=4)
    for got, want in (
        (seen.class_evidence, expected.class_evidence),
        (seen.box_evidence, expected.box_evidence),
    ):
        assert got.maps.dtype == torch.float32
        torch.testing.assert_close(got.maps, want.maps, rtol=1e-4, atol=1e-7)


def test_the_picture_is_drawn_on_the_image_as_it_is_read(predictor):
    """From an array in BGR, as a predictor takes it."""
    image = picture()
    drawn = predictor.draw_context(image, limit=1)
    seen = predictor.context(image, limit=1)
    expected = draw_context(image[..., ::-1].copy(), seen, predictor.classes, limit=1)
    assert np.array_equal(drawn, expected)


def test_other_detectors_and_several_looks_are_refused():
    class TwoStage(nn.Module):
        def forward(self, inputs):
            raise AssertionError("it must not run")

    other = Predictor(TwoStage(), augmentations=RESIZE, device="cpu")
    with pytest.raises(ConfigError, match="TwoStage is not a OneStageDetector") as error:
        other.context(picture())
    assert "recipes with context are fcos_R_18_FPN_bccd, fcos_R_50_FPN_1x, " in str(error.value)
    assert "_d2" not in str(error.value)
    with pytest.raises(ConfigError, match="leave tta out to see context"):
        build("fcos_R_18_FPN_bccd", tta=True).context(picture())


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_is_at_least_one(predictor, limit):
    for look in (predictor.context, predictor.draw_context):
        with pytest.raises(ConfigError, match=f"whole number from 1, or None, got {limit}"):
            look(picture(), limit=limit)


def test_threads_that_share_a_predictor_do_not_disturb_each_other(predictor):
    images = [picture() // (1 + index) for index in range(2)]

    def overlaps(image):
        return predictor.context(image, limit=1).overlaps.tolist()

    alone = [overlaps(image) for image in images]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(overlaps, images * 3)) == [pytest.approx(x) for x in alone * 3]
