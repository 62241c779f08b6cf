# SPDX-License-Identifier: Apache-2.0
"""Loss terms: which rows count, how much, and what the sum is divided by."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2_decouple.layers.losses import generalized_iou_loss, sigmoid_focal_loss
from d2_decouple.modeling import FocalTerm, GIoUTerm, QualityTerm, loss_terms, main_targets
from d2_decouple.structures import DensePredictions, DenseTargets

N, R, K = 2, 5, 3
LABELS = torch.tensor([[0, 2, K, -1, K], [K, K, 1, 1, -1]])
POSITIVE = torch.tensor([[1.0, 1, 0, 0, 0], [0, 0, 1, 1, 0]]).double()


def make_predictions() -> DensePredictions:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    corner = normal(N, R, 2) * 20
    return DensePredictions(
        logits=normal(N, R, K).requires_grad_(),
        boxes=torch.cat((corner, corner + 15 + normal(N, R, 2)), -1).requires_grad_(),
        quality=normal(N, R).requires_grad_(),
        locations=torch.zeros(R, 2),
        strides=torch.full((R,), 8.0),
        priors=torch.zeros(R, 4),
        level_sizes=(R,),
        extras={"coarse": torch.cat((corner - 3, corner + 10), -1).requires_grad_()},
    )


def make_targets(**changes: Any) -> DenseTargets:
    generator = torch.Generator().manual_seed(1)
    corner = torch.randn(N, R, 2, generator=generator, dtype=torch.float64) * 20
    boxes = torch.cat((corner, corner + 20), -1) * POSITIVE[..., None]
    share = torch.rand(N, R, generator=generator, dtype=torch.float64) * POSITIVE
    targets = DenseTargets(
        labels=LABELS,
        boxes=boxes,
        cls_weights=torch.ones(N, R, 1, dtype=torch.float64),
        box_weights=share,
        quality=share,
        cls_normalizer=torch.tensor(4.0, dtype=torch.float64),
        box_normalizer=torch.tensor(2.5, dtype=torch.float64),
        extras={},
    )
    return targets._replace(**changes)


def test_focal_term_by_loops() -> None:
    """All rows but the ignored, weighted, over the class normaliser."""
    predictions = make_predictions()
    weights = torch.rand(N, R, K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for cls_weights in (weights, weights[..., :1]):
        want = 0.0
        for n in range(N):
            for r in range(R):
                if LABELS[n, r] < 0:
                    continue
                row = sigmoid_focal_loss(predictions.logits[n, r], LABELS[n, r], 0.3, 1.5)
                want += (row * cls_weights[n, r]).sum().item()
        term = FocalTerm(alpha=0.3, gamma=1.5, weight=2.0)
        got = term(predictions, make_targets(cls_weights=cls_weights))
        assert got.item() == pytest.approx(2 * want / 4)


def test_focal_defaults_are_the_papers() -> None:
    predictions, targets = make_predictions(), make_targets()
    explicit = FocalTerm(alpha=0.25, gamma=2.0, weight=1.0)
    assert FocalTerm()(predictions, targets) == explicit(predictions, targets)


def test_ignored_rows_get_no_gradient() -> None:
    predictions = make_predictions()
    FocalTerm()(predictions, make_targets()).backward()
    assert predictions.logits.grad is not None
    silent = (predictions.logits.grad == 0).all(-1)
    assert torch.equal(silent, LABELS == -1)


def test_giou_term_by_loops() -> None:
    predictions, targets = make_predictions(), make_targets()
    want = sum(
        generalized_iou_loss(predictions.boxes[n, r], targets.boxes[n, r]).item()
        * targets.box_weights[n, r].item()
        for n in range(N)
        for r in range(R)
    )
    got = GIoUTerm(weight=2.0)(predictions, targets)
    assert got.item() == pytest.approx(2 * want / 2.5)
    got.backward()
    assert predictions.boxes.grad is not None
    assert torch.equal((predictions.boxes.grad != 0).any(-1), POSITIVE.bool())


def test_giou_term_of_other_boxes_and_labels() -> None:
    """A second label set, as coarse boxes have it: its boxes, weights and normaliser count."""
    predictions = make_predictions()
    second = make_targets(
        boxes=torch.full((N, R, 4), 3.0).double() * torch.tensor([1, 1, 5, 5]),
        box_weights=1 - POSITIVE,
        box_normalizer=torch.tensor(6.0).double(),
    )
    targets = make_targets(extras={"coarse": second})
    term = GIoUTerm(boxes=lambda p: p.extras["coarse"], targets=lambda t: t.extras["coarse"])
    losses = generalized_iou_loss(predictions.extras["coarse"], second.boxes)
    want = (losses * (1 - POSITIVE)).sum() / 6
    torch.testing.assert_close(term(predictions, targets), want)
    assert main_targets(targets) is targets


def test_quality_term_by_loops() -> None:
    """Binary cross entropy on the positives alone; the target may be 0 there."""
    predictions, targets = make_predictions(), make_targets()
    assert predictions.quality is not None
    assert targets.quality is not None
    want = 0.0
    for n, r in POSITIVE.nonzero().tolist():
        p, t = predictions.quality[n, r].sigmoid(), targets.quality[n, r]
        want -= (t * p.log() + (1 - t) * (1 - p).log()).item()
    got = QualityTerm(weight=0.5)(predictions, targets)
    assert got.item() == pytest.approx(0.5 * want / 4)
    got.backward()
    assert predictions.quality.grad is not None
    assert torch.equal(predictions.quality.grad != 0, POSITIVE.bool())


def test_quality_term_survives_extreme_logits() -> None:
    predictions = make_predictions()
    quality = torch.tensor([1e4, -1e4, 1e4, -1e4, 0]).expand(N, R).double().requires_grad_()
    loss = QualityTerm()(predictions._replace(quality=quality), make_targets())
    loss.backward()
    assert loss.isfinite()
    assert quality.grad is not None
    assert quality.grad.isfinite().all()


@pytest.mark.parametrize("label", [K, -1])
def test_nothing_to_learn(label: int) -> None:
    """Zero losses of boxes and quality that are still connected to the predictions."""
    predictions = make_predictions()
    one = torch.ones((), dtype=torch.float64)
    zeros = torch.zeros(N, R, dtype=torch.float64)
    targets = make_targets(
        labels=torch.full((N, R), label),
        boxes=torch.zeros(N, R, 4, dtype=torch.float64),
        box_weights=zeros,
        quality=zeros,
        cls_normalizer=one,
        box_normalizer=one,
    )
    terms = {"cls": FocalTerm(), "box": GIoUTerm(), "quality": QualityTerm()}
    losses = {name: term(predictions, targets) for name, term in terms.items()}
    assert losses["box"].item() == losses["quality"].item() == 0
    background = F.softplus(predictions.logits) * predictions.logits.sigmoid() ** 2 * 0.75
    want = background.sum().item() if label == K else 0
    assert losses["cls"].item() == pytest.approx(want)
    sum(losses.values(), start=torch.zeros(())).backward()
    for x in (predictions.logits, predictions.boxes, predictions.quality):
        assert x is not None
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_terms_have_no_parameters_and_do_not_change() -> None:
    for term in (FocalTerm(), GIoUTerm(), QualityTerm()):
        assert not hasattr(term, "parameters")
        with pytest.raises(AttributeError):
            term.weight = 3.0  # type: ignore[misc]


def test_loss_terms_returns_its_arguments() -> None:
    first, second = FocalTerm(), GIoUTerm()
    assert loss_terms(loss_cls=first, loss_box_reg=second) == {
        "loss_cls": first,
        "loss_box_reg": second,
    }
