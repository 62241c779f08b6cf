# SPDX-License-Identifier: Apache-2.0
"""SAPD's targets and losses on random scenes, against plain loops, in float64."""

import pytest
import sapd_loops
import torch
from detectron2.utils.events import EventStorage
from test_fcos_assigner import instances

from d2_decouple.layers.points import distances_to_boxes, make_grid, squares
from d2_decouple.modeling import FocalTerm, IoUTerm, SAPDAssigner, SAPDOptions
from d2_decouple.structures import DensePredictions

K = 3
STRIDES = [8, 16, 32]
SIZES = [(9, 12), (5, 6), (3, 3)]
PYRAMID = sapd_loops.Pyramid(STRIDES, SIZES)
CHANNELS = 4
OPTIONS = {
    "paper": {},
    "hard": {"soft_start": 1.0},
    "baseline": {"use_soft_weights": False, "use_soft_levels": False},
    "levels alone": {"use_soft_weights": False},
    "two levels": {"top_k": 2, "exponent": 0.5},
    "renormalised": {"renormalize_levels": True, "exponent": 2.0},
    "touched cells": {"positive_rule": "cell", "top_k": 1},
    "ring": {"ignore_scale": 0.6, "soft_start": 1.0},
    "ring of touched cells": {"ignore_scale": 0.5, "positive_rule": "cell", "top_k": 2},
    "ignored classes": {"unselected": "ignore_class", "top_k": 1, "shrink": 0.4},
    "ignored locations": {"unselected": "ignore_all", "use_soft_levels": False},
    "all": {"unselected": "ignore_class", "ignore_scale": 0.9, "top_k": 2, "shrink": 0.5},
}


def random_predictions(images):
    """Float64, with a gradient; a tenth of the boxes are far off, and some are inverted."""
    grid = make_grid(SIZES, STRIDES, 0.5, device=torch.device("cpu"), dtype=torch.float64)
    count = len(grid.locations)
    distances = torch.rand(images, count, 4, dtype=torch.float64) * 5 * grid.strides[:, None] - 3
    boxes = distances_to_boxes(grid.locations, distances)
    boxes = torch.where(torch.rand(images, count, 1) < 0.1, boxes + 1000, boxes)
    return DensePredictions(
        logits=(2 * torch.randn(images, count, K, dtype=torch.float64)).requires_grad_(),
        boxes=boxes.requires_grad_(),
        quality=None,
        locations=grid.locations,
        strides=grid.strides,
        priors=squares(grid.locations, 4 * grid.strides),
        level_sizes=grid.level_sizes,
        extras={},
    )


def random_objects():
    """A crowd, one of its objects twice, some of a pixel or two, and some beyond the image."""
    corner = torch.rand(6, 2) * 50
    crowd = torch.cat((corner, corner + 4 + 50 * torch.rand(6, 2)), dim=1)
    middle = torch.rand(4, 2) * torch.tensor([96.0, 72.0])
    tiny = torch.cat((middle - 0.5, middle + torch.tensor([[0.5], [0.5], [1.5], [2.5]])), dim=1)
    odd = torch.tensor([[-80.0, -60.0, 190.0, 150.0], [0, 0, 96, 72], [100, 80, 130, 99]])
    odd = torch.cat((odd, torch.tensor([[-50.0, -40.0, -12.0, -5.0]])))
    boxes = torch.cat((crowd, crowd[:1], tiny, odd))
    return instances(boxes, torch.randint(K, (len(boxes),)))


def make_assigner(**values):
    values = {"soft_start": 0.0, **values}  # soft at once, if at all
    assigner = SAPDAssigner(
        num_classes=K,
        channels=CHANNELS,
        num_levels=len(SIZES),
        max_iter=10,
        options=SAPDOptions(**values),
        hidden_channels=8,
    ).double()
    for parameter in assigner.parameters():  # logits that differ
        torch.nn.init.normal_(parameter, std=0.2)
    return assigner


def scene(seed):
    torch.manual_seed(seed)
    truth = [random_objects(), instances([], []), random_objects()]
    features = [torch.randn(3, CHANNELS, *size, dtype=torch.float64) for size in SIZES]
    return features, random_predictions(3), truth


def answers_of_loops(assigner, predictions, truth, targets):
    options, soft = assigner.options, assigner.is_soft()
    probabilities = None
    if "level_logits" in targets.extras:
        probabilities = targets.extras["level_logits"].softmax(1).tolist()
    answers, first = [], 0
    for image, one in enumerate(truth):
        objects = list(zip(one.gt_boxes.tensor.tolist(), one.gt_classes.tolist(), strict=True))
        own = probabilities and probabilities[first : first + len(objects)]
        logits, boxes = predictions.logits[image].tolist(), predictions.boxes[image].tolist()
        answers.append(sapd_loops.assign_image(PYRAMID, logits, boxes, objects, options, own, soft))
        first += len(objects)
    return answers


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", OPTIONS)
def test_targets_and_losses_are_those_of_plain_loops(name, seed):
    features, predictions, truth = scene(seed)
    assigner = make_assigner(**OPTIONS[name])
    with EventStorage(3):
        targets = assigner(features, predictions, truth)
        answers = answers_of_loops(assigner, predictions, truth, targets)
    assert targets.labels.tolist() == [x.labels for x in answers]
    assert targets.extras["gt_index"].tolist() == [x.index for x in answers]
    assert targets.extras["best_levels"].tolist() == [one for x in answers for one in x.best]
    per_class = assigner.options.unselected == "ignore_class" or assigner.options.ignore_scale
    assert targets.cls_weights.shape[-1] == (K if per_class else 1)
    counted = (targets.labels >= 0)[..., None]
    for got, wanted in (
        (targets.boxes, [x.boxes for x in answers]),
        (targets.box_weights, [x.box_weights for x in answers]),
        (targets.extras["level_weights"], [one for x in answers for one in x.level_weights]),
        (targets.cls_weights, [x.weights for x in answers]),
    ):
        wanted = torch.as_tensor(wanted, dtype=torch.float64)
        if got is targets.cls_weights:
            got, wanted = got * counted, wanted * counted
        torch.testing.assert_close(got.expand_as(wanted), wanted, rtol=1e-9, atol=1e-12)
    total = max(sum(sum(x.box_weights) for x in answers), 1.0)
    assert targets.cls_normalizer.item() == pytest.approx(total)
    assert targets.box_normalizer.item() == pytest.approx(total)
    logits, boxes = predictions.logits.tolist(), predictions.boxes.tolist()
    wanted = sapd_loops.losses(logits, boxes, answers)
    terms = (FocalTerm(), IoUTerm())
    assert [x(predictions, targets).item() for x in terms] == pytest.approx(wanted)


def test_scenes_reach_what_is_special():
    """Overlaps, cells without a point in their region, every level, ignored classes."""
    features, predictions, truth = scene(0)
    targets = make_assigner(unselected="ignore_class")(features, predictions, truth)
    assert targets.extras["best_levels"].bincount(minlength=3).gt(0).all()
    assert len(set(targets.extras["gt_index"][0].tolist())) > 8
    assert ((targets.labels < K) & (targets.box_weights == 0)).any()
    assert (targets.cls_weights == 0).any()


def test_gradients_are_those_of_plain_loops():
    """Differences of the loops' losses, at a positive, at a negative and at inverted boxes."""
    features, predictions, truth = scene(1)
    assigner = make_assigner()
    targets = assigner(features, predictions, truth)
    answers = answers_of_loops(assigner, predictions, truth, targets)
    loss = FocalTerm()(predictions, targets) + IoUTerm()(predictions, targets)
    gradients = torch.autograd.grad(loss, (predictions.logits, predictions.boxes))
    row = int(targets.box_weights[0].argmax())
    background = int((targets.labels[0] == K).nonzero()[3])
    step = 1e-6
    for which, gradient in enumerate(gradients):
        for place in ((0, row, 0), (0, row, 1), (0, row, 2), (0, background, 0), (1, 5, 2)):
            values = []
            for sign in (1, -1):
                inputs = [x.detach().clone() for x in (predictions.logits, predictions.boxes)]
                inputs[which][place] += sign * step
                values.append(sum(sapd_loops.losses(*(x.tolist() for x in inputs), answers)))
            wanted = (values[0] - values[1]) / (2 * step)
            assert gradient[place].item() == pytest.approx(wanted, rel=1e-5, abs=1e-8)


def test_float32_agrees_with_float64():
    for seed in range(3):
        features, predictions, truth = scene(seed)
        assigner = make_assigner(ignore_scale=0.5)
        exact = assigner(features, predictions, truth)
        single = predictions._replace(
            **{k: getattr(predictions, k).float() for k in ("logits", "boxes", "locations")},
            strides=predictions.strides.float(),
        )
        near = assigner.float()([x.float() for x in features], single, truth)
        assert (near.labels == exact.labels).float().mean() == 1
        assert near.box_weights.dtype == near.cls_normalizer.dtype == torch.float32
        torch.testing.assert_close(
            near.box_weights.double(), exact.box_weights, rtol=1e-4, atol=1e-5
        )
