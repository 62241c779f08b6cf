# SPDX-License-Identifier: Apache-2.0
"""AutoAssign's losses and gradients against plain loops; what its prior learns and leaves out."""

import math

import pytest
import torch
from test_autoassign import TERMS, K, assign, predict
from test_fcos_assigner import instances

from d2_decouple.modeling.autoassign import AutoAssignAssigner


def giou(box, other):
    low, high = torch.maximum(box[:2], other[:2]), torch.minimum(box[2:], other[2:])
    common = (high - low).clamp(min=0).prod()
    union = (box[2:] - box[:2]).prod() + (other[2:] - other[:2]).prod() - common
    hull = (torch.maximum(box[2:], other[2:]) - torch.minimum(box[:2], other[:2])).prod()
    return common / union - (hull - union) / hull, (common / union).item()


def loops(predictions, truth, mean, sigma):
    """The three losses, location by location and object by object; nothing is left out."""
    scores, presence = predictions.logits.sigmoid(), predictions.quality.sigmoid()
    positive, negative, center, prior_sum, objects = 0, 0, 0, 0, 0
    weights = torch.ones_like(scores)
    for n, one in enumerate(truth):
        sum_of_image = 0
        pairs = list(zip(one.gt_boxes.tensor.to(scores), one.gt_classes.tolist(), strict=True))
        objects += len(pairs)
        for box, label in pairs:
            rows = [
                row
                for row, (x, y) in enumerate(predictions.locations.tolist())
                if box[0] < x < box[2] and box[1] < y < box[3]
            ]
            shares, confidences, fits = [], [], []
            for row in rows:
                middle = (box[:2] + box[2:]) / 2
                step = (predictions.locations[row] - middle) / predictions.strides[row]
                prior = (-((step - mean[label]) ** 2) / (2 * sigma[label] ** 2)).exp().prod()
                value = giou(predictions.boxes[n, row], box)[0]
                p = scores[n, row, label] * presence[n, row] * (-5 * (1 - value)).exp()
                shares.append(prior * (3 * p).exp())
                confidences.append(p)
                fits.append(max(giou(predictions.boxes[n, row], other)[1] for other, _ in pairs))
                sum_of_image = sum_of_image + prior
            if not rows:
                continue
            joint = sum(s * p for s, p in zip(shares, confidences, strict=True)) / sum(shares)
            positive = positive - joint.log()
            fits = [1 / max(1 - fit, 1e-12) for fit in fits]
            for row, fit in zip(rows, fits, strict=True):
                low, high = min(fits), max(fits)
                weight = 1 - ((fit - low) / (high - low) if high > low else 1)
                weights[n, row, label] = min(weight, weights[n, row, label].item())
        if torch.is_tensor(sum_of_image):
            center = center + len(one) / sum_of_image
            prior_sum += sum_of_image.item()
    q = scores * presence[..., None] * weights
    negative = (q**2 * -(1 - q).log()).sum()
    return (
        0.25 * positive / max(objects, 1),
        0.75 * negative / max(prior_sum, 1),
        0.75 * center / len(truth),
    )


def random_scene(seed):
    """Float64 predictions that need a gradient, and objects: also one twice, and one in a gap."""
    torch.manual_seed(seed)
    predictions = predict(3, dtype=torch.float64)
    distances = predictions.strides[:, None] * 4 * torch.rand(3, 80, 4, dtype=torch.float64)
    low, high = (
        predictions.locations - distances[..., :2],
        predictions.locations + distances[..., 2:],
    )
    predictions = predictions._replace(
        logits=(3 * torch.randn(3, 80, K, dtype=torch.float64)).requires_grad_(),
        quality=torch.randn(3, 80, dtype=torch.float64).requires_grad_(),
        boxes=torch.cat((low, high), -1).requires_grad_(),
    )
    corner = torch.rand(6, 2) * 50
    boxes = torch.cat((corner, corner + 4 + 40 * torch.rand(6, 2)), 1)
    boxes = torch.cat((boxes, boxes[:1], torch.tensor([[9.0, 9.0, 11.0, 11.0]])))
    classes = [0, 1, 1, 2, 0, 1, 0, 2]
    truth = [instances(boxes, classes), instances([], []), instances(boxes[5:], classes[5:])]
    return predictions, truth


@pytest.mark.parametrize("seed", range(3))
def test_losses_and_gradients_are_those_of_plain_loops(seed):
    predictions, truth = random_scene(seed)
    assigner = AutoAssignAssigner(num_classes=K).double()
    prior = assigner.center_prior
    with torch.no_grad():
        prior.mean.normal_(std=0.3)
        prior.sigma.uniform_(0.7, 1.5)
    targets = assigner([], predictions, truth)
    inputs = [predictions.logits, predictions.quality, predictions.boxes, prior.mean, prior.sigma]
    expected = loops(predictions, truth, prior.mean, prior.sigma)
    for term, value in zip(TERMS, expected, strict=True):
        loss = term(predictions, targets)
        torch.testing.assert_close(loss, value)
        grads, wanted = (
            torch.autograd.grad(x, inputs, retain_graph=True, allow_unused=True)
            for x in (loss, value)
        )
        for gradient, other in zip(grads, wanted, strict=True):
            if other is None:
                other = torch.zeros(())
            gradient = torch.zeros(()) if gradient is None else gradient
            torch.testing.assert_close(gradient, other.expand_as(gradient), check_dtype=False)


def test_what_is_left_out_weighs_nothing():
    """An object that fills an image of 800 x 1344 pixels, and so has 22,388 locations."""
    torch.manual_seed(0)
    strides = [8, 16, 32, 64, 128]
    sizes = [(math.ceil(800 / x), math.ceil(1344 / x)) for x in strides]
    predictions = predict(1, sizes=sizes, strides=strides, dtype=torch.float64)
    predictions = predictions._replace(logits=torch.randn_like(predictions.logits))
    truth = [instances([[-1.0, -1.0, 1344.0, 800.0]], [1])]
    values = []
    for count in (30000, 2048, 20):
        _, targets = assign(predictions, truth, max_locations=count)
        values.append(torch.stack([term(predictions, targets) for term in TERMS]))
    torch.testing.assert_close(values[1], values[0], rtol=1e-12, atol=0)
    assert (values[2] / values[0] - 1).abs().min() > 1e-4

    assigner = AutoAssignAssigner(num_classes=K).double()
    for sigma, share in ((1, 1e-12), (2, 1e-6), (3, 1e-3)):
        assigner.center_prior.sigma.data.fill_(sigma)
        inside = assigner([], predictions, truth).extras["inside"]
        assert inside.exists.all()
        assert inside.prior().amin() < share * inside.prior().amax()


def test_prior_is_learned_by_class():
    """Only the parameters of the classes that are there move; the others stay."""
    predictions, _ = random_scene(0)
    truth = [instances([[3.0, 5.0, 41.0, 37.0]], [1]), instances([], []), instances([], [])]
    assigner, targets = assign(predictions, truth)
    sum(term(predictions, targets) for term in TERMS).backward()
    for parameter in assigner.parameters():
        moved = parameter.grad.abs().amax(1) > 0
        assert moved.tolist() == [False, True, False]


def test_a_prior_that_has_collapsed_keeps_finite_gradients():
    predictions, truth = random_scene(0)
    assigner = AutoAssignAssigner(num_classes=K).double()
    assigner.center_prior.sigma.data.zero_()
    targets = assigner([], predictions, truth)
    loss = sum(term(predictions, targets) for term in TERMS)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(x.grad).all() for x in assigner.parameters())
