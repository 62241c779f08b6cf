# SPDX-License-Identifier: Apache-2.0
"""The detector trains on any batch, predicts inside the image, and comes back from a file."""

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from util import excite, loss_sum, random_input, tiny, tiny_model, without_gradient

from d2_decouple.config import get_config
from d2_decouple.modeling import clip_to_image

LOSSES = {"loss_cls", "loss_box_reg", "loss_quality"}
RECIPES = ["fcos_R_50_FPN_1x", "fcos_R_50_FPN_1x_d2", "fcos_R_18_FPN_bccd"]
BATCHES = {
    "one image": [((64, 64), 2)],
    "one empty image": [((64, 64), 0)],
    "only empty images": [((64, 96), 0), ((96, 64), 0)],
    "half empty": [((64, 96), 3), ((96, 64), 0)],
    "odd sizes": [((33, 47), 2), ((101, 67), 3)],
    "one pixel": [((1, 1), 1), ((1, 1), 0)],
    "pixel beside image": [((1, 1), 0), ((130, 45), 5)],
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_any_batch_trains(recipe, batch):
    if recipe == "fcos_R_18_FPN_bccd" and batch.startswith("one"):
        # Batch norm learns from batches; a single cell of a single image has no spread.
        inputs = [random_input((64, 96), 2), *(random_input(s, n) for s, n in BATCHES[batch])]
    else:
        inputs = [random_input(size, objects) for size, objects in BATCHES[batch]]
    model = tiny_model(recipe)
    losses = model(inputs)
    assert losses.keys() == LOSSES
    assert all(loss.dim() == 0 and torch.isfinite(loss) for loss in losses.values()), losses
    loss_sum(losses).backward()
    assert without_gradient(model) == []
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    if recipe == "fcos_R_18_FPN_bccd":
        assert frozen == set()
    else:
        assert frozen == {
            name
            for name, _ in model.named_parameters()
            if name.startswith(("backbone.bottom_up.stem.", "backbone.bottom_up.res2."))
        }


def test_boxes_without_area_train():
    """Augmentation can squeeze a box to nothing; its loss must stay finite."""
    inputs = [random_input((64, 64), 3)]
    inputs[0]["instances"].gt_boxes.tensor[1, 2:] = inputs[0]["instances"].gt_boxes.tensor[1, :2]
    model = tiny_model()
    losses = model(inputs)
    loss_sum(losses).backward()
    assert torch.isfinite(loss_sum(losses))
    assert without_gradient(model) == []


def test_a_step_lowers_the_loss():
    model = tiny_model()
    inputs = [random_input((64, 64), 3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = loss_sum(model(inputs))
    for _ in range(5):
        optimizer.zero_grad()
        loss_sum(model(inputs)).backward()
        optimizer.step()
    assert loss_sum(model(inputs)) < before


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(101, 67), (202, 134), (50, 90)])
def test_boxes_lie_inside_the_image(height, width):
    """After Detectron2's scaling to the size of the original image."""
    model = excite(tiny_model()).eval()
    item = {**random_input((101, 67), 0), "height": height, "width": width}
    (result,) = model([item, random_input((64, 160), 0)])[:1]
    found = result["instances"]
    assert len(found) > 10
    assert found.image_size == (height, width)
    x1, y1, x2, y2 = found.pred_boxes.tensor.unbind(1)
    assert (x1 >= 0).all()
    assert (x1 < x2).all()
    assert (x2 <= width).all()
    assert (y1 >= 0).all()
    assert (y1 < y2).all()
    assert (y2 <= height).all()
    assert torch.isfinite(found.scores).all()
    assert found.pred_classes.max() < 3


@torch.no_grad()
@pytest.mark.parametrize("recipe", RECIPES)
def test_saves_and_reloads(recipe, tmp_path):
    model = excite(tiny_model(recipe))
    inputs = [random_input((64, 96), 1), random_input((64, 64), 1)]
    if recipe == "fcos_R_18_FPN_bccd":
        model(inputs)  # the running statistics of its batch norm belong to the checkpoint
    model.eval()
    expected = model(inputs)
    DetectionCheckpointer(model, str(tmp_path)).save("weights")
    other = tiny_model(recipe).eval()
    DetectionCheckpointer(other).load(str(tmp_path / "weights.pth"))
    for want, got in zip(expected, other(inputs), strict=True):
        assert len(want["instances"]) > 0
        assert torch.equal(want["instances"].scores, got["instances"].scores)
        assert torch.equal(want["instances"].pred_boxes.tensor, got["instances"].pred_boxes.tensor)


@torch.no_grad()
def test_predict_is_the_forward_pass_and_indices_point_into_it():
    model = excite(tiny_model()).eval()
    inputs = [random_input((101, 67), 0), random_input((64, 96), 0)]
    images, features, predictions = model.predict(inputs)
    assert images.image_sizes == [(101, 67), (64, 96)]
    assert [x.shape[0] for x in features] == [2] * 5
    scores = model.selection.score(predictions)
    detections = model.forward_inference(images, features, predictions)
    for i, (found, whole) in enumerate(zip(detections, model(inputs), strict=True)):
        index = found.location_index
        clipped = clip_to_image(predictions.boxes[i, index], found.image_size)
        assert torch.equal(found.pred_boxes.tensor, clipped)
        assert torch.equal(found.scores, scores[i, index, found.pred_classes])
        assert (found.scores.diff() <= 0).all()
        # The same detections, without those that clipping empties.
        found = found[found.pred_boxes.nonempty()]
        assert len(found) > 0
        whole = whole["instances"]
        assert torch.equal(found.pred_boxes.tensor, whole.pred_boxes.tensor)
        assert torch.equal(found.location_index, whole.location_index)


@torch.no_grad()
def test_bfloat16_keeps_coordinates():
    """At x = 796 bfloat16 would step by 4 pixels, half a cell of P3."""
    model = excite(tiny_model()).eval()
    inputs = [random_input((32, 800), 0)]
    exact = model.predict(inputs)[2]
    received = []
    model.head.predictor.register_forward_pre_hook(lambda _, arguments: received.append(arguments))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.predict(inputs)[2]
        detections = model(inputs)[0]["instances"]
    (class_maps, box_features, grid), *_ = received
    dtypes = {x.dtype for x in (*class_maps, *box_features, grid.locations, half.boxes)}
    assert dtypes == {torch.float32}
    assert half.logits.dtype == half.quality.dtype == torch.float32
    assert detections.pred_boxes.tensor.dtype == torch.float32
    # What the predictor makes of those maps is what it makes of them without autocast, ...
    again = model.head.predictor(class_maps, box_features, grid)
    assert torch.equal(again.boxes, half.boxes)
    assert torch.equal(again.logits, half.logits)
    # ... and the maps are as near to the exact ones as eight bits of mantissa allow.
    error = (half.boxes - exact.boxes).abs().amax(-1)[0] / exact.strides
    reach = (exact.boxes - exact.locations.repeat(1, 2)).abs().amax(-1)[0] / exact.strides
    assert (error / (1 + reach)).max() < 0.05
    assert error.max() > 0


def test_bfloat16_trains():
    model = tiny_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model([random_input((64, 96), 3), random_input((64, 64), 0)])
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    loss_sum(losses).backward()
    assert without_gradient(model) == []


@torch.no_grad()
def test_float64_runs_whole():
    """For gradient checks and fixtures; Detectron2's own boxes are float32."""
    model = excite(tiny_model()).double().eval()
    inputs = [random_input((64, 64), 1)]
    assert model.predict(inputs)[2].boxes.dtype == torch.float64
    assert len(model(inputs)[0]["instances"]) > 0


def test_positives_are_logged_per_image():
    model = tiny_model()
    inputs = [random_input((96, 96), 4), random_input((96, 96), 0)]
    _, features, predictions = model.predict(inputs)
    targets = model.assigner(features, predictions, [x["instances"] for x in inputs])
    expected = (targets.labels < 3).sum().item() / 2
    with EventStorage() as storage:
        model(inputs)
    assert expected > 0
    assert storage.latest()["num_positives_per_image"][0] == expected


CALLABLES = {
    "model.selection.score": "class_score",
    "model.selection.nms": "HardNMS",
    "model.selection.boxes": "predicted_boxes",
    "model.selection.candidates": "BestPairs",
    "model.selection.clip": "clip_to_image",
    "model.assigner.box_weight": "unit_weight",
    "model.head.tower": "conv_tower",
    "model.losses.loss_cls": "FocalTerm",
    "model.losses.loss_box_reg.boxes": "predicted_boxes",
    "model.losses.loss_box_reg.targets": "main_targets",
}


@pytest.mark.parametrize("key", CALLABLES)
def test_a_string_for_a_callable_is_refused_when_built(key):
    """The command line can only give strings, which would fail in the first iteration."""
    cfg = tiny(get_config("fcos_R_50_FPN_1x", [f"{key}={CALLABLES[key]}"]))
    with pytest.raises(TypeError, match=rf"{key.rsplit('.', 1)[1]}\b.*callable.*{CALLABLES[key]}"):
        instantiate(cfg.model)


def test_evaluation_needs_no_ground_truth():
    model = tiny_model().eval()
    item = random_input((64, 64), 0)
    with torch.no_grad():
        assert "instances" in model([{"image": item["image"]}])[0]
