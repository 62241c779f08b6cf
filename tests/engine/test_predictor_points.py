# SPDX-License-Identifier: Apache-2.0
"""Where detections were read: the model's own numbers, in pixels of the original image."""

import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from standins import IdentityAligner, PointAligner
from torch import nn
from util import WIDTH, excite, tiny

from d2_decouple.config import ConfigError, get_config
from d2_decouple.engine.points import points_of
from d2_decouple.engine.predictor import Predictor
from d2_decouple.modeling.legacy import LegacyBoxDetector
from d2_decouple.structures import DensePredictions
from d2_decouple.visualization import draw_points

SIZE, SEEN = (75, 110), (96, 141)  # (H, W) of the image, and of what the model sees of it
SCALE = torch.tensor([110 / 141, 75 / 96])
RESIZE = [T.ResizeShortestEdge(96, 160)]


def build(name="pdnet_R_18_FPN_bccd", change=lambda model: None, **options):
    torch.manual_seed(0)
    cfg = tiny(get_config(name))
    change(cfg.model)
    model = excite(instantiate(cfg.model), 0.7)
    return Predictor(model, augmentations=RESIZE, device="cpu", **options)


def picture(height=SIZE[0], width=SIZE[1]):
    return np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def predictor():
    return build()


def test_they_are_the_models_numbers_in_pixels_of_the_image(predictor):
    seen = predictor.points(picture())
    found = seen.instances
    assert len(found) > 10
    item = predictor._input(picture())
    assert item["image"].shape[1:] == SEEN
    with torch.no_grad():
        _, _, predictions = predictor.model.predict([item])
    extras = {key: value[0, found.location_index] for key, value in predictions.extras.items()}
    for name, scale in (
        ("coarse_boxes", SCALE.repeat(2)),
        ("boundary_points", SCALE),
        ("class_points", SCALE),
        ("box_level_weights", torch.ones(())),
    ):
        torch.testing.assert_close(found.get(name), extras[name] * scale)
        assert found.get(name).dtype == torch.float32
    assert found.coarse_boxes.shape == (len(found), 4)
    assert found.boundary_points.shape == (len(found), 4, 2)
    assert found.class_points.shape == (len(found), 9, 2)
    assert found.box_level_weights.shape == (len(found), 4, 5)
    found.class_points.mul_(2)  # in place, which tensors of inference mode refuse


def test_the_order_of_points_is_left_top_right_bottom(predictor):
    """Each boundary point of PDNet lies on its edge of the coarse box."""
    found = predictor.points(picture()).instances
    coarse, points = found.coarse_boxes, found.boundary_points
    assert (coarse[:, 2:] - coarse[:, :2]).abs().amin() > 1
    for side, axis in enumerate((0, 1, 0, 1)):
        torch.testing.assert_close(points[:, side, axis], coarse[:, side])


def test_cells_and_levels(predictor):
    seen = predictor.points(picture())
    assert seen.level_names == ("p3", "p4", "p5", "p6", "p7")
    assert seen.strides == (8, 16, 32, 64, 128)
    padded = [math.ceil(side / 32) * 32 for side in SEEN]
    cells = [
        (level, x * stride, y * stride)
        for level, stride in enumerate(seen.strides)
        for y in range(math.ceil(padded[0] / stride))
        for x in range(math.ceil(padded[1] / stride))
    ]
    found = seen.instances
    level, x, y = torch.tensor(cells)[found.location_index].unbind(1)
    assert torch.equal(found.levels, level)
    assert len(set(level.tolist())) > 1
    torch.testing.assert_close(found.locations, torch.stack((x, y), dim=1) * SCALE)
    weights = found.box_level_weights
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(found), 4))
    own = weights[torch.arange(len(found)), :, level]
    assert torch.equal(own[level == 0], torch.ones_like(own[level == 0]))  # nothing is finer
    assert (own[level > 0] < 1).all()


def test_a_model_set_by_hand():
    """All numbers written out: what each side and each class point of one cell must be."""
    predictor = build()
    head = predictor.model.head
    for module in (head.predictor.point_pred, head.predictor.bbox_pred, head.cls_score):
        nn.init.zeros_(module.weight)
    bias = torch.zeros(4 + 4 + 18 + 8)
    bias[0:4] = torch.tensor([-1.0, 0.5, 1, 2])  # to x - 2, y - 2, x + 2, y + 2 cells
    bias[4:8] = torch.tensor([0.25, -0.5, 0.75, 1])  # slides in y, x, y, x
    bias[8 + 2 * 5 + 1] = 3.0  # the y of the sixth class point, right of the middle
    bias[26:34] = torch.tensor([0, math.log(3)]).repeat(4)  # finer, own
    head.predictor.point_pred.bias.data = bias
    head.predictor.cls_score.bias.data = torch.tensor([-9.0, 1, -9])
    seen = predictor.points(picture())
    found = seen.instances
    assert (found.pred_classes == 1).all()
    unit = found.levels.new_tensor(seen.strides)[found.levels][:, None] * SCALE
    x, y = (found.locations / unit).unbind(1)
    # The coarse box is x - 3 to x + 3, y - 1.5 to y + 4: its middle is (x, y + 1.25).
    sides = torch.stack(
        [
            torch.stack((x - 3, y + 1.5), dim=1),
            torch.stack((x - 0.5, y - 1.5), dim=1),
            torch.stack((x + 3, y + 2), dim=1),
            torch.stack((x + 1, y + 4), dim=1),
        ],
        dim=1,
    )
    torch.testing.assert_close(found.boundary_points, sides * unit[:, None])
    coarse = torch.stack((x - 3, y - 1.5, x + 3, y + 4), dim=1) * unit.repeat(1, 2)
    torch.testing.assert_close(found.coarse_boxes, coarse)
    assert found.coarse_boxes.min() < 0  # they may leave the image, the detections may not
    limits = torch.tensor([*SIZE[::-1], *SIZE[::-1]])
    cut = torch.minimum(coarse.clamp(min=0), limits)
    torch.testing.assert_close(found.pred_boxes.tensor, cut, rtol=0, atol=1e-4)
    columns, rows = torch.meshgrid(
        torch.tensor([-3.0, 0, 3]), torch.tensor([-1.5, 1.25, 4]), indexing="xy"
    )
    lattice = torch.stack((columns, rows), dim=-1).reshape(9, 2)
    lattice[5, 1] += 3
    points = (torch.stack((x, y), dim=1)[:, None] + lattice) * unit[:, None]
    torch.testing.assert_close(found.class_points, points)
    for index, level in enumerate(found.levels.tolist()):
        expected = torch.zeros(5)
        expected[level] = 0.75 if level else 1.0
        expected[max(level - 1, 0)] += 0.25 if level else 0.0
        torch.testing.assert_close(found.box_level_weights[index], expected.expand(4, 5))


@pytest.mark.parametrize("detector", [None, LegacyBoxDetector])
def test_detections_are_those_of_a_call_and_there_is_one_forward(detector):
    def change(model):
        if detector is not None:
            model._target_ = detector

    everything = build(change=change)(picture())
    predictor = build(change=change, score_thresh=everything.scores.median().item())
    expected = predictor(picture())
    assert len(expected) < len(everything)
    calls = []
    predictor.model.backbone.register_forward_hook(lambda *_: calls.append(1))
    found = predictor.points(picture()).instances
    assert len(calls) == 1
    assert len(found) == len(expected) > 5
    assert found.image_size == SIZE
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    for name in ("scores", "pred_classes", "location_index"):
        assert torch.equal(found.get(name), expected.get(name))
    few = predictor.points(picture(), limit=3).instances
    assert torch.equal(few.boundary_points, found.boundary_points[:3])
    assert len(few) == 3
    assert not predictor.model.head._forward_hooks  # a later call keeps nothing


def test_no_detections_and_half_precision():
    predictor = build(score_thresh=0.9999)
    found = predictor.points(picture()).instances
    assert found.boundary_points.shape == (0, 4, 2)
    assert found.levels.shape == (0,)
    half = build(precision="bfloat16").points(picture()).instances
    assert len(half) > 5
    assert half.class_points.dtype == half.box_level_weights.dtype == torch.float32


def test_points_of_another_method_need_no_change_here():
    """SALT's, from the aligner's slot; the host is FCOS."""

    def change(model):
        model.head.aligner = L(PointAligner)(channels=WIDTH, num_levels=5)

    predictor = build("fcos_R_18_FPN_bccd", change)
    found = predictor.points(picture()).instances
    assert len(found) > 5
    with torch.no_grad():
        _, _, predictions = predictor.model.predict([predictor._input(picture())])
    for name in ("points", "cls_points"):
        expected = predictions.extras[name][0, found.location_index] * SCALE
        torch.testing.assert_close(found.get(name), expected)
    expected = predictions.extras["coarse_boxes"][0, found.location_index] * SCALE.repeat(2)
    torch.testing.assert_close(found.coarse_boxes, expected)


def test_of_extras_only_those_of_predictions_are_taken_and_only_pixels_are_scaled():
    count = 6
    values = torch.rand(1, count, 4, 2)
    predictions = DensePredictions(
        logits=torch.zeros(1, count, 3),
        boxes=torch.zeros(1, count, 4),
        quality=None,
        locations=torch.arange(12.0).view(6, 2),
        strides=torch.ones(count),
        priors=torch.zeros(count, 4),
        level_sizes=(4, 2),
        extras={
            "my_points": values,
            "box_level_weights": values,  # of two levels: the same shape
            "distances": values[..., 0],
            "anchor_boxes": values[..., 1],
            "levels_of_maps": ["p3", "p4"],
            "scales": torch.ones(2),
        },
    )
    found = Instances(
        (20, 60),
        pred_boxes=Boxes(torch.zeros(2, 4)),
        location_index=torch.tensor([4, 1]),
    )
    model = SimpleNamespace(
        head=SimpleNamespace(strides=(8, 16)), head_in_features=["res2", "p3", "p4"]
    )
    seen = points_of(model, predictions, found, (10, 20))  # 3 in x, 2 in y
    assert seen.level_names == ("p3", "p4")
    got = seen.instances.get_fields()
    assert got.keys() - found.get_fields().keys() == {
        *("my_points", "box_level_weights", "distances", "anchor_boxes", "locations", "levels"),
    }
    chosen = values[0, [4, 1]]
    torch.testing.assert_close(got["my_points"], chosen * torch.tensor([3.0, 2]))
    torch.testing.assert_close(got["anchor_boxes"], chosen[..., 1] * torch.tensor([3.0, 2, 3, 2]))
    torch.testing.assert_close(got["box_level_weights"], chosen)
    torch.testing.assert_close(got["distances"], chosen[..., 0])
    assert got["locations"].tolist() == [[24, 18], [6, 6]]
    assert got["levels"].tolist() == [1, 0]
    records = seen.as_records()
    assert [record["level"] for record in records] == ["p4", "p3"]
    assert records[0]["location"] == [24, 18]
    assert records[1]["my_points"][3] == pytest.approx(got["my_points"][1, 3].tolist(), abs=0.006)
    assert len(records) == 2


def test_the_picture_is_drawn_on_the_image_as_it_is_read(predictor):
    """From an array in BGR, as a predictor takes it, and from the same in RGB."""
    image = picture()
    drawn = predictor.draw_points(image, limit=2)
    expected = draw_points(
        image[..., ::-1].copy(), predictor.points(image), predictor.classes, limit=2
    )
    assert np.array_equal(drawn, expected)
    assert not np.array_equal(drawn, predictor.draw_points(image, limit=1))


def test_models_without_points_are_refused_by_name():
    predictor = build("fcos_R_18_FPN_bccd")
    with pytest.raises(ConfigError, match="OneStageDetector with FCOSPredictor has no po") as error:
        predictor.points(picture())
    assert "recipes with points are pdnet_" in str(error.value)
    assert not predictor.model.head._forward_hooks

    def change(model):
        model.head.aligner = L(IdentityAligner)()

    with pytest.raises(ConfigError, match="with IdentityAligner and FCOSPredictor has no points"):
        build("fcos_R_18_FPN_bccd", change).points(picture())


def test_other_detectors_and_several_looks_are_refused():
    class TwoStage(nn.Module):
        def forward(self, inputs):
            raise AssertionError("it must not run")

    other = Predictor(TwoStage(), augmentations=RESIZE, device="cpu")
    with pytest.raises(ConfigError, match="TwoStage is not a OneStageDetector") as error:
        other.points(picture())
    assert "pdnet_" in str(error.value)
    with pytest.raises(ConfigError, match="leave tta out to see points"):
        build(tta=True).points(picture())


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_is_at_least_one(predictor, limit):
    with pytest.raises(ConfigError, match=f"limit must be a whole number from 1, .* got {limit}"):
        predictor.points(picture(), limit=limit)
    with pytest.raises(ValueError, match=f"limit is {limit}; wanted is a whole number from 1"):
        predictor.draw_points(picture(), limit=limit)


def test_threads_that_share_a_predictor_do_not_see_each_others_points(predictor):
    images = [picture() // (1 + index) for index in range(4)]
    alone = [predictor.points(image).instances.coarse_boxes for image in images]
    assert len({len(boxes) for boxes in alone}) > 1 or not torch.equal(alone[0], alone[1])
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(predictor.points, images * 8))
    for index, seen in enumerate(together):
        assert torch.equal(seen.instances.coarse_boxes, alone[index % 4])
