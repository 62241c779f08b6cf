# SPDX-License-Identifier: Apache-2.0
"""The head's slots hold what the papers need: stand-ins of their tensors pass through them."""

import pytest
import torch
from compositions import (
    CHANNELS,
    CLASSES,
    COMPOSITIONS,
    STRIDES,
    aligned,
    box_detail,
    compose,
    half_resolution,
    learned_levels,
    pdnet,
    recipe,
)
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from standins import AnchorPredictor, IdentityAligner, sample
from util import WIDTH, excite, loss_sum, random_input, without_gradient

from d2_decouple.modeling import TSCODE
from d2_decouple.modeling.head import prior_bias

# P5, P6 and P7 are 25, 13 and 7 cells long: each odd, each half of the one before, rounded up.
LONG = (32, 800)
BATCHES = {
    "long": [(LONG, 3), (LONG, 0)],
    "odd sizes": [((33, 47), 0), ((101, 67), 4), ((1, 1), 0)],
    "no objects": [((64, 64), 0), ((40, 64), 0)],
}

EXTRAS = {  # shape of each behind (N, R)
    "coarse_boxes": (4,),
    "points": (9, 2),
    "cls_points": (9, 2),
    "class_points": (9, 2),
    "boundary_points": (4, 2),
    "box_level_weights": (4, len(STRIDES)),
}


def cells(size):
    """Cells of each level of a batch padded to ``size``, by repeated halving, rounded up."""
    height, width = (-(-side // 32) * 4 for side in size)
    counts = []
    for _ in STRIDES:
        counts.append(height * width)
        height, width = -(-height // 2), -(-width // 2)
    return counts


@pytest.fixture(params=COMPOSITIONS)
def composed(request):
    return compose(request.param)


@pytest.mark.parametrize("batch", BATCHES)
def test_stand_ins_train_and_infer(composed, batch):
    inputs = [random_input(size, objects, CLASSES) for size, objects in BATCHES[batch]]
    losses = composed(inputs)
    assert all(torch.isfinite(loss) and loss.dim() == 0 for loss in losses.values()), losses
    loss_sum(losses).backward()
    assert without_gradient(composed) == []

    composed.eval()
    with torch.no_grad():
        images, features, predictions = composed.predict(inputs)
        found = composed.forward_inference(images, features, predictions)
    anchors_per_cell = 9 if isinstance(composed.head.predictor, AnchorPredictor) else 1
    expected = [anchors_per_cell * n for n in cells(images.tensor.shape[-2:])]
    N, R = len(inputs), sum(expected)
    assert predictions.level_sizes == tuple(expected)
    assert predictions.logits.shape == (N, R, CLASSES)
    assert predictions.boxes.shape == (N, R, 4)
    assert predictions.locations.shape == (R, 2)
    assert predictions.strides.shape == (R,)
    assert predictions.priors.shape == (R, 4)
    assert predictions.quality is None or predictions.quality.shape == (N, R)
    for name, value in predictions.extras.items():
        assert value.shape == (N, R, *EXTRAS[name]), name
    for instances, (size, _) in zip(found, BATCHES[batch], strict=True):
        assert instances.image_size == size
        assert set(instances.get_fields()) == {
            "pred_boxes",
            "scores",
            "pred_classes",
            "location_index",
        }


def test_coordinates_are_float32_under_autocast(composed):
    inputs = [random_input((64, 96), 2, CLASSES), random_input((64, 96), 0, CLASSES)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = composed(inputs)
        predictions = composed.predict(inputs)[2]
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert all(torch.isfinite(loss) for loss in losses.values())
    tensors = [x for x in (*predictions, *predictions.extras.values()) if torch.is_tensor(x)]
    assert {x.dtype for x in tensors} == {torch.float32}


def test_every_part_learns_from_objects(composed):
    """Not only a gradient, but one that moves the parameter."""
    inputs = [random_input((128, 160), 12, CLASSES), random_input((128, 160), 6, CLASSES)]
    loss_sum(composed(inputs)).backward()
    still = [n for n, p in composed.named_parameters() if p.requires_grad and not p.grad.any()]
    assert still == []


def test_half_resolution_has_four_times_the_channels_and_crops_odd_levels():
    model = instantiate(recipe(half_resolution))
    head = model.head
    assert head.cls_score.weight.shape == (4 * CLASSES, WIDTH, 3, 3)
    assert torch.all(head.cls_score.bias == prior_bias())
    assert head.cls_subnet[0].weight.shape[1] == 2 * WIDTH
    shapes = []
    head.cls_score.register_forward_hook(lambda _, inputs, out: shapes.append(out.shape[-2:]))
    seen = []
    head.cls_subnet.register_forward_hook(lambda _, inputs, out: seen.append(out.shape[-2:]))
    _, features, predictions = model.predict([random_input(LONG, 0)])
    assert [x.shape[-1] for x in features] == [200, 100, 50, 25, 13, 7]
    assert shapes == [x.shape[-2:] for x in features[1:]]
    assert [size[1] for size in seen] == [50, 25, 13, 7, 4]
    assert predictions.level_sizes == tuple(cells(LONG))


def test_context_decides_which_maps_each_task_reads():
    """Classes at P_l read P_l and the next coarser map, boxes the finer one as well."""
    model = excite(instantiate(recipe(half_resolution)))
    model.eval()
    with torch.no_grad():
        _, features, before = model.predict([random_input((64, 64), 0)])
        features[0] = features[0].flip(-1)
        after = model.head(features)
    finest = before.level_sizes[0]
    torch.testing.assert_close(after.logits, before.logits)
    moved = (after.boxes - before.boxes).abs().amax((0, 2))
    assert moved[:finest].max() > 1e-3
    assert moved[finest:].max() == 0


def test_forgotten_res2_is_not_silent():
    def forgetful(model):
        model.head.context = L(TSCODE)(channels=CHANNELS)

    with pytest.raises(ValueError, match=r"finer maps.*res2"):
        instantiate(recipe(forgetful)).predict([random_input((64, 64), 0)])


def test_aligner_needs_both_tasks_on_one_grid():
    with pytest.raises(ValueError, match=r"PointAligner.*TSCODE.*1/2") as error:
        instantiate(recipe(half_resolution, aligned))
    assert "box half" in str(error.value)


def test_identity_aligner_equals_the_plain_host():
    def identity(model):
        model.head.aligner = L(IdentityAligner)()

    inputs = [random_input((64, 96), 3)]
    results = []
    for plug_ins in ([], [identity]):
        torch.manual_seed(1)
        model = instantiate(recipe(*plug_ins))
        results.append((model(inputs), model.predict(inputs)[2]))
    (plain, predictions), (losses, with_aligner) = results
    assert plain == losses
    assert torch.equal(predictions.boxes, with_aligner.boxes)
    assert with_aligner.extras["levels"] == [0, 1, 2, 3, 4]


def test_points_and_coarse_boxes_are_pixels():
    """A cell that predicts distances (1, 2, 3, 4) and middles of the ranges, by hand."""
    model = instantiate(recipe(aligned))
    aligner = model.head.aligner
    with torch.no_grad():
        for part in (aligner.coarse, aligner.fractions, aligner.factors):
            part.weight.zero_()
            part.bias.zero_()
        aligner.coarse.bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        aligner.scales.copy_(torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0]))
        _, _, predictions = model.predict([random_input((64, 64), 0)])
    first, second = 0, predictions.level_sizes[0]
    assert predictions.locations[[first, second]].tolist() == [[4, 4], [8, 8]]
    extras = predictions.extras
    # 4 - 1 * 8, 4 - 2 * 8, 4 + 3 * 8, 4 + 4 * 8; on P4 the scale doubles distances in 16 pixels.
    assert extras["coarse_boxes"][0, first].tolist() == [-4, -12, 28, 36]
    assert extras["coarse_boxes"][0, second].tolist() == [-24, -56, 104, 136]
    torch.testing.assert_close(extras["points"][0, first], torch.tensor([[12.0, 12.0]] * 9))
    torch.testing.assert_close(extras["cls_points"][0, second], torch.tensor([[40.0, 40.0]] * 9))


def test_scale_of_each_level_learns_from_its_level():
    model = excite(instantiate(recipe(aligned)))
    _, _, predictions = model.predict([random_input((64, 64), 0)])
    level = predictions.extras["coarse_boxes"].split(list(predictions.level_sizes), dim=1)[2]
    level.abs().sum().backward()
    assert model.head.aligner.scales.grad.nonzero().flatten().tolist() == [2]


def test_predictor_reads_the_next_finer_level():
    model = excite(instantiate(recipe(pdnet)))
    _, features, predictions = model.predict([random_input((256, 256), 0)])
    features = [x.detach().requires_grad_() for x in features]
    predictions = model.head(features)
    boxes = predictions.boxes.split(list(predictions.level_sizes), dim=1)
    for level, expected in enumerate(([0], [0, 1], [1, 2], [2, 3], [3, 4])):
        grads = torch.autograd.grad(
            boxes[level].sum(), features, retain_graph=True, allow_unused=True
        )
        assert [i for i, grad in enumerate(grads) if grad is not None and grad.any()] == expected


def test_collected_classes_need_no_bias_and_a_1x1_convolution():
    model = instantiate(recipe(pdnet))
    assert model.head.cls_score.weight.shape == (9 * CLASSES, WIDTH, 1, 1)
    assert model.head.cls_score.bias is None


@torch.no_grad()
def test_dynamic_points_read_the_rearranged_class_map():
    """PDNet under TSCODE, levels of odd sizes: each logit by hand from the map of full size."""
    model = excite(instantiate(recipe(half_resolution, pdnet)))
    assert model.head.cls_score.weight.shape == (4 * 9 * CLASSES, WIDTH, 1, 1)
    seen = []
    model.head.predictor.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0]))
    _, features, predictions = model.predict([random_input(LONG, 0)])
    (class_maps,) = seen
    assert [x.shape[1:] for x in class_maps] == [(9 * CLASSES, *x.shape[-2:]) for x in features[1:]]
    points = predictions.extras["class_points"] / predictions.strides[:, None, None]
    logits = predictions.logits - model.head.predictor.cls_score.bias
    for maps, where, found in zip(
        class_maps,
        points.split(predictions.level_sizes, 1),
        logits.split(predictions.level_sizes, 1),
        strict=True,
    ):
        where = where.unflatten(1, maps.shape[-2:]).permute(0, 3, 4, 1, 2)
        expected = sum(
            sample(votes, where[:, point : point + 1])[:, :, 0]
            for point, votes in enumerate(maps.split(CLASSES, dim=1))
        )
        torch.testing.assert_close(found, expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in COMPOSITIONS if "PDNet" in name])
def test_predictions_under_autocast_are_those_of_float32(name):
    """From a bfloat16 tower's maps on, every number is what float32 makes of them."""
    model = compose(name)
    inputs = [random_input((64, 96), 0)]
    seen = []
    model.head.predictor.register_forward_hook(lambda _, given, out: seen.append((given, out)))
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.predict(inputs)
        (given, found) = seen[0]
        expected = model.head.predictor(*given)
    assert torch.equal(found.boxes, expected.boxes)
    assert torch.equal(found.logits, expected.logits)
    assert all(torch.equal(found.extras[name], expected.extras[name]) for name in found.extras)


def test_a_plug_in_adds_a_loss_and_renames_nothing():
    plain = instantiate(recipe())
    inputs = [random_input((64, 64), 2)]
    shapes = {name: value.shape for name, value in plain.state_dict().items()}
    for plug_in, prefix, loss in (
        (aligned, "head.aligner.", "loss_box_coarse"),
        (learned_levels, "assigner.net.", "loss_select"),
        (box_detail, "head.context.", None),
    ):
        model = instantiate(recipe(plug_in))
        own = {name: value.shape for name, value in model.state_dict().items()}
        added = own.keys() - shapes.keys()
        assert {name: own[name] for name in shapes} == shapes
        assert added
        assert all(name.startswith(prefix) for name in added)
        assert model(inputs).keys() - plain(inputs).keys() == ({loss} if loss else set())
