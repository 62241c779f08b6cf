# SPDX-License-Identifier: Apache-2.0
"""Losses of scores that are qualities and of sides that are distributions, and what could break."""

import math

import pytest
import torch
from torch import Tensor

from d2_decouple.layers.losses import distribution_focal_loss, integral, quality_focal_loss

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=DOUBLE) * scale


# Quality focal loss.


def plain_cost(score: float, target: float, beta: float) -> float:
    """The paper's formula, a number at a time."""
    cross = target * math.log(score) + (1 - target) * math.log(1 - score)
    return -(abs(target - score) ** beta) * cross


LABELS = torch.tensor([0, 2, 3, -1, 1, 3])  # of three classes: 3 is background, -1 ignored
QUALITY = torch.tensor([0.0, 1.0, math.nan, math.nan, 0.3, 0.7], dtype=DOUBLE)


@pytest.mark.parametrize("beta", [0.0, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("joint", [False, True])
def test_quality_focal_against_the_formula(joint: bool, beta: float) -> None:
    """The quality is the target of the label's entry alone, and is not looked at elsewhere."""
    logits, quality_logits = normal(6, 3, scale=3), normal(6, seed=1, scale=2)
    got = quality_focal_loss(logits, LABELS, QUALITY, beta, quality_logits if joint else None)
    scores = logits.sigmoid() * (quality_logits.sigmoid()[:, None] if joint else 1)
    want = [
        [plain_cost(score, quality if k == label else 0.0, beta) for k, score in enumerate(row)]
        for row, label, quality in zip(
            scores.tolist(), LABELS.tolist(), QUALITY.tolist(), strict=True
        )
    ]
    torch.testing.assert_close(got, torch.tensor(want, dtype=DOUBLE), rtol=1e-9, atol=0)


def test_quality_focal_by_hand() -> None:
    """At logits 0, p = 1/2, and with a second logit 0, p = 1/4; the quality is 1.

    Wrong by 1/2: 1/4 * ln 2. Wrong by 3/4 at the label: 9/16 * ln 4; by 1/4 elsewhere:
    1/16 * ln (4/3).
    """
    logits, labels, quality = torch.zeros(1, 2, dtype=DOUBLE), torch.tensor([1]), torch.ones(1)
    got = quality_focal_loss(logits, labels, quality, 2.0)
    want = [[math.log(2) / 4, math.log(2) / 4]]
    torch.testing.assert_close(got, torch.tensor(want, dtype=DOUBLE))
    got = quality_focal_loss(logits, labels, quality, 2.0, torch.zeros(1, dtype=DOUBLE))
    want = [[math.log(4 / 3) / 16, 9 / 16 * math.log(4)]]
    torch.testing.assert_close(got, torch.tensor(want, dtype=DOUBLE))


def test_a_score_that_is_the_quality_costs_nothing() -> None:
    logits = torch.tensor([[0.25, -30.0]], dtype=DOUBLE, requires_grad=True)
    losses = quality_focal_loss(logits, torch.tensor([0]), logits.detach()[:, 0].sigmoid(), 2.0)
    losses.sum().backward()
    assert losses.detach().abs().max() < 1e-12
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-12


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0, 2.5])
@pytest.mark.parametrize("joint", [False, True])
def test_quality_focal_gradcheck(joint: bool, beta: float) -> None:
    """Through both factors: with a detached power the slopes would be others."""
    inputs = [normal(6, 3, seed=2).requires_grad_()]
    inputs += [normal(6, seed=3).requires_grad_()] if joint else []
    assert torch.autograd.gradcheck(
        lambda z, *q: quality_focal_loss(z, LABELS, QUALITY, beta, *q), inputs
    )


def test_quality_focal_takes_batches() -> None:
    logits, quality_logits = normal(2, 6, 3, seed=4), normal(2, 6, seed=5)
    labels = torch.stack((LABELS, LABELS.flip(0)))
    quality = torch.stack((QUALITY, QUALITY.flip(0)))
    got = quality_focal_loss(logits, labels, quality, 2.0, quality_logits)
    for image in range(2):
        alone = (x[image] for x in (logits, labels, quality))
        want = quality_focal_loss(*alone, 2.0, quality_logits[image])
        torch.testing.assert_close(got[image], want)


# Logits of class and quality in units of a large S, and what a target of 0 and of 1 costs there,
# in S as well. With p = sigmoid(z) sigmoid(q): one large negative logit makes p vanish, so that a
# target of 1 costs its size; two make it cost the sum. Where both are large, 1 - p is their
# exp(-S) added, so that a target of 0 costs S but for a logarithm of 2.
EXTREMES: dict[str, tuple[float, float | None, float, float]] = {
    "class, sure": (1, None, 1, 0),
    "class, sure not": (-1, None, 0, 1),
    "both sure": (1, 1, 1, 0),
    "quality sure not": (1, -1, 0, 1),
    "class sure not": (-1, 1, 0, 1),
    "both sure not": (-1, -1, 0, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("size", [50.0, 104.0, 1e4])
@pytest.mark.parametrize("case", EXTREMES)
def test_quality_focal_survives_extreme_logits(
    case: str, size: float, beta: float, dtype: torch.dtype
) -> None:
    """Certain and right costs nothing; certain and wrong costs its logit, with slope 1."""
    z, q, cost_of_0, cost_of_1 = EXTREMES[case]
    logits = torch.full((1, 2), z * size, dtype=dtype, requires_grad=True)
    leaves, quality = [logits], None
    if q is not None:
        quality = torch.full((1,), q * size, dtype=dtype, requires_grad=True)
        leaves.append(quality)
    losses = quality_focal_loss(
        logits, torch.tensor([1]), torch.ones(1, dtype=dtype), beta, quality
    )
    want = torch.tensor([[cost_of_0, cost_of_1]], dtype=dtype) * size
    if case == "both sure":
        want[0, 0] -= math.log(2)
    torch.testing.assert_close(losses, want, rtol=1e-6, atol=1e-9)
    slopes = torch.autograd.grad(losses.sum(), leaves)
    assert all(slope.isfinite().all() for slope in slopes)
    if q is None:
        expected = torch.tensor([[cost_of_0, -cost_of_1]], dtype=dtype)
        torch.testing.assert_close(slopes[0], expected, rtol=1e-5, atol=1e-9)
    total = slopes[0].sum() + (slopes[1].sum() if q is not None else 0)
    assert total.item() == pytest.approx(cost_of_0 - cost_of_1, abs=1e-5)


@pytest.mark.parametrize("target", [0.0, 0.4, 1.0])
def test_quality_focal_of_float32_is_that_of_float64(target: float) -> None:
    """Over all pairs of logits, where ``log(1 - p)`` of a rounded p would be off or infinite."""
    line = torch.linspace(-40, 40, 81, dtype=DOUBLE)
    z, q = (x.flatten() for x in torch.meshgrid(line, line, indexing="ij"))
    labels, quality = torch.zeros(len(z), dtype=torch.long), torch.full_like(z, target)
    found = []
    for dtype in (DOUBLE, torch.float32):
        leaves = [x.to(dtype).requires_grad_() for x in (z, q)]
        losses = quality_focal_loss(leaves[0][:, None], labels, quality.to(dtype), 2.0, leaves[1])
        found.append([losses[:, 0].detach(), *torch.autograd.grad(losses.sum(), leaves)])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


# Distributions.

BINS = 17


def test_integral_by_hand() -> None:
    """All bins alike: the middle. One alone: that. Two: between them. ln 3 more: three quarters."""
    logits = torch.full((4, BINS), -math.inf)
    logits[0] = 0.7
    logits[1, 16] = 0
    logits[2, [3, 4]] = 5
    logits[3, 2], logits[3, 6] = 0, math.log(3)
    assert integral(logits).tolist() == pytest.approx([8, 16, 3.5, 0.25 * 2 + 0.75 * 6])


def test_integral_of_the_fact_sheet() -> None:
    """Of SALT-Net's golden numbers: logits cos(0.3 bin + 0.5 side)."""
    side, index = torch.arange(4.0, dtype=DOUBLE)[:, None], torch.arange(17.0, dtype=DOUBLE)
    got = integral((0.3 * index + 0.5 * side).cos())
    assert got.tolist() == pytest.approx([5.29867, 6.91431, 9.15674, 10.73522], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_integral_is_float32_whatever_is_given(dtype: torch.dtype) -> None:
    """Of the same numbers: a sum of half-precision products would be off by thousandths."""
    logits = normal(50, 4, BINS, scale=3).to(dtype)
    want = integral(logits.double())
    assert want.dtype == DOUBLE
    got = integral(logits)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
    with torch.autocast("cpu", dtype):
        for given in (logits, logits.float()):
            assert torch.equal(integral(given), got)
    coarse = logits.softmax(-1) @ torch.arange(BINS, dtype=dtype)
    assert (coarse.double() - want).abs().max() > 1e-3


def test_integral_survives_extreme_logits() -> None:
    logits = torch.full((1, BINS), -1e4)
    logits[0, 5] = 1e4
    logits.requires_grad_()
    distances = integral(logits)
    distances.sum().backward()
    assert distances.tolist() == [5]
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_distribution_focal_by_hand() -> None:
    """Four bins of probabilities 1/4, 0, 1/2 and 1/4.

    At 2.25: 3/4 ln 2 + 1/4 ln 4. At 2: ln 2. At -7: bin 0, ln 4. Beyond the last bin: cut to 2.9,
    1/10 ln 2 + 9/10 ln 4.
    """
    shares = torch.tensor([1 / 4, 0, 1 / 2, 1 / 4], dtype=DOUBLE)
    logits = shares.clamp(min=1e-300).log().expand(4, 4)
    got = distribution_focal_loss(logits, torch.tensor([2.25, 2.0, -7.0, 50.0], dtype=DOUBLE))
    sides = [0.75 + 0.25 * 2, 1, 2, 0.1 + 0.9 * 2]
    assert got.item() == pytest.approx(sum(sides) / 4 * math.log(2), rel=1e-12)


def test_distribution_focal_by_loops() -> None:
    logits, distances = normal(2, 3, 4, BINS, scale=2), normal(2, 3, 4, seed=1, scale=6) + 7
    got = distribution_focal_loss(logits, distances)
    assert got.shape == (2, 3)
    assert (distances < 0).any()
    assert (distances > 16).any()
    for place in ((0, 0), (0, 2), (1, 1), (1, 2)):
        want = 0.0
        for row, distance in zip(logits[place].tolist(), distances[place].tolist(), strict=True):
            distance = min(max(distance, 0.0), 15.9)
            lower = math.floor(distance)
            total = math.log(sum(math.exp(x) for x in row))
            want += (total - row[lower]) * (lower + 1 - distance)
            want += (total - row[lower + 1]) * (distance - lower)
        assert got[place].item() == pytest.approx(want / 4, rel=1e-12)


def test_distribution_focal_of_alike_bins_is_their_logarithm() -> None:
    distances = torch.tensor([[0.0, 0.3, 15.9, 1e9]])
    got = distribution_focal_loss(torch.full((1, 4, BINS), 2.5), distances)
    assert got.tolist() == pytest.approx([math.log(17)])


def test_distribution_focal_gradcheck() -> None:
    logits, distances = normal(3, 4, 6).requires_grad_(), normal(3, 4, seed=1, scale=4) + 2
    assert torch.autograd.gradcheck(lambda z: distribution_focal_loss(z, distances), logits)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_distribution_focal_survives_extreme_logits(dtype: torch.dtype) -> None:
    """A bin that is sure and wrong costs the distance of the logits."""
    logits = torch.full((4, BINS), -1e4, dtype=dtype)
    logits[:, 5] = 1e4
    logits.requires_grad_()
    distances = torch.tensor([5.0, 9.0, 5.5, 1e30], dtype=dtype)
    loss = distribution_focal_loss(logits, distances)
    loss.backward()
    assert loss.item() == pytest.approx((0 + 2e4 + 1e4 + 2e4) / 4)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
