# SPDX-License-Identifier: Apache-2.0
"""Loss arithmetic against plain formulas and torchvision, and where it could break."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from d2_decouple.layers.losses import generalized_iou_loss, loss_normalizer, sigmoid_focal_loss


def plain_focal(logit: float, positive: bool, alpha: float, gamma: float) -> float:
    """The paper's Eq. 5, a number at a time."""
    p = 1 / (1 + math.exp(-logit))
    p_t, alpha_t = (p, alpha) if positive else (1 - p, 1 - alpha)
    return -alpha_t * (1 - p_t) ** gamma * math.log(p_t)


LABELS = torch.tensor([0, 2, 3, -1, 1, 3])  # of three classes: 3 is background, -1 ignored


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 0.0), (0.9, 1.0), (0.1, 1.5)])
def test_focal_against_the_formula(alpha: float, gamma: float) -> None:
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    got = sigmoid_focal_loss(logits, LABELS, alpha, gamma)
    want = [
        [plain_focal(z, k == label, alpha, gamma) for k, z in enumerate(row)]
        for row, label in zip(logits.tolist(), LABELS.tolist(), strict=True)
    ]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=0)


def test_focal_by_hand() -> None:
    """At logit 0, p = 1/2: weight * (1/2)^2 * ln 2, weight 1/4 for the class and 3/4 for others."""
    got = sigmoid_focal_loss(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([1]), 0.25, 2.0)
    unit = math.log(2) / 16
    torch.testing.assert_close(got, torch.tensor([[3 * unit, unit]], dtype=torch.float64))


def test_focal_takes_batches() -> None:
    logits = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1))
    labels = torch.stack((LABELS, LABELS.flip(0)))
    got = sigmoid_focal_loss(logits, labels, 0.25, 2.0)
    for image in range(2):
        alone = sigmoid_focal_loss(logits[image], labels[image], 0.25, 2.0)
        torch.testing.assert_close(got[image], alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 2.5])
def test_focal_gradcheck(gamma: float) -> None:
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: sigmoid_focal_loss(z, LABELS, 0.25, gamma), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("size", [50.0, 90.0, 104.0, 1e4])
def test_focal_survives_extreme_logits(size: float, gamma: float, dtype: torch.dtype) -> None:
    """Certain and right costs nothing; certain and wrong costs its logit, with slope 1."""
    logits = torch.tensor([[size, -size], [size, -size]], dtype=dtype, requires_grad=True)
    losses = sigmoid_focal_loss(logits, torch.tensor([0, 1]), 0.25, gamma)
    want = torch.tensor([[0, 0], [0.75 * size, 0.25 * size]], dtype=dtype)
    torch.testing.assert_close(losses, want, rtol=1e-5, atol=1e-9)
    losses.sum().backward()
    assert logits.grad is not None
    slopes = torch.tensor([[0, 0], [0.75, -0.25]], dtype=dtype)
    torch.testing.assert_close(logits.grad, slopes, rtol=1e-5, atol=1e-9)


def random_boxes(count: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=dtype) * 60
    size = torch.rand(count, 2, generator=generator, dtype=dtype) * 50 + 1
    return torch.cat((corner, corner + size), dim=-1)


def gradients(boxes: Tensor, gt_boxes: Tensor) -> tuple[Tensor, Tensor]:
    boxes = boxes.clone().requires_grad_()
    losses = generalized_iou_loss(boxes, gt_boxes)
    (gradient,) = torch.autograd.grad(losses.sum(), boxes)
    return losses.detach(), gradient


def test_giou_by_hand() -> None:
    gt_boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]]).expand(4, 4)
    boxes = torch.tensor(
        [
            [0.0, 0.0, 2.0, 2.0],  # equal: 0
            [1.0, 1.0, 3.0, 3.0],  # overlap 1, union 7, hull 9: 1 - (1/7 - 2/9)
            [4.0, 0.0, 6.0, 2.0],  # apart: union 8, hull 12: 1 + 4/12
            [0.0, 0.0, 1.0, 2.0],  # half of it: 1 - 1/2
        ]
    )
    want = torch.tensor([0, 1 - (1 / 7 - 2 / 9), 4 / 3, 0.5])
    torch.testing.assert_close(generalized_iou_loss(boxes, gt_boxes), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_giou_equals_torchvision(dtype: torch.dtype) -> None:
    boxes, gt_boxes = random_boxes(500, 0, dtype), random_boxes(500, 1, dtype)
    boxes[:20] = gt_boxes[:20]
    losses, gradient = gradients(boxes, gt_boxes)
    theirs = boxes.clone().requires_grad_()
    want = generalized_box_iou_loss(theirs, gt_boxes)
    (want_gradient,) = torch.autograd.grad(want.sum(), theirs)
    torch.testing.assert_close(losses, want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient[20:], want_gradient[20:], rtol=1e-4, atol=1e-6)
    assert losses.min() >= -1e-6
    assert losses.max() <= 2


def test_giou_gradcheck() -> None:
    boxes, gt_boxes = random_boxes(12, 2), random_boxes(12, 3)
    boxes[-1] = boxes[-1, [2, 3, 0, 1]]  # inverted
    boxes.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: generalized_iou_loss(x, gt_boxes), boxes)


@pytest.mark.parametrize(
    "box",
    [
        [8.0, 2.0, 4.0, 9.0],  # x2 < x1
        [4.0, 9.0, 8.0, 2.0],  # y2 < y1
        [8.0, 9.0, 4.0, 2.0],  # both: its area would be positive
        [1e30, 1e30, -1e30, -1e30],
    ],
)
def test_inverted_box_costs_one_without_gradient(box: list[float]) -> None:
    gt_boxes = torch.tensor([[3.0, 1.0, 9.0, 10.0]])
    losses, gradient = gradients(torch.tensor([box]), gt_boxes)
    assert losses.tolist() == [1]
    assert gradient.tolist() == [[0, 0, 0, 0]]


ZERO_AREAS = {
    "a point inside": ([5.0, 5.0, 5.0, 5.0], [3.0, 1.0, 9.0, 10.0]),
    "a line inside": ([5.0, 5.0, 5.0, 8.0], [3.0, 1.0, 9.0, 10.0]),
    "a point far away": ([500.0, 5.0, 500.0, 5.0], [3.0, 1.0, 9.0, 10.0]),
    "a point on the corner": ([3.0, 1.0, 3.0, 1.0], [3.0, 1.0, 9.0, 10.0]),
    "truth a point": ([3.0, 1.0, 9.0, 10.0], [5.0, 5.0, 5.0, 5.0]),
    "both the same point": ([5.0, 5.0, 5.0, 5.0], [5.0, 5.0, 5.0, 5.0]),
    "two points": ([5.0, 5.0, 5.0, 5.0], [7.0, 7.0, 7.0, 7.0]),
    "two points in a row": ([5.0, 5.0, 5.0, 5.0], [7.0, 5.0, 7.0, 5.0]),
    "the zeros of background": ([3.0, 1.0, 9.0, 10.0], [0.0, 0.0, 0.0, 0.0]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("boxes", ZERO_AREAS.values(), ids=ZERO_AREAS)
def test_zero_area_has_finite_gradients(
    boxes: tuple[list[float], list[float]], dtype: torch.dtype
) -> None:
    box, gt_box = (torch.tensor([x], dtype=dtype) for x in boxes)
    losses, gradient = gradients(box, gt_box)
    assert (losses >= 0).all()
    assert (losses <= 2).all()
    assert gradient.isfinite().all()


def test_touching_boxes_have_no_overlap() -> None:
    losses, gradient = gradients(
        torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[2.0, 0.0, 4.0, 2.0]])
    )
    assert losses.tolist() == [1]  # union and hull are both 8
    assert gradient.isfinite().all()


def test_smoothed_giou_by_hand() -> None:
    """Boxes of 6 x 4 and 4 x 4 share 2 x 4 = 8: union 32, hull 8 x 4 = 32; then one without area.

    Smoothed by 1 the overlap is 9 / 33. A point on itself has 1 / 1, and its hull is all margin.
    """
    boxes = torch.tensor([[0, 0, 6, 4], [5, 5, 5, 5], [5, 5, 5, 5]], dtype=torch.float64)
    gt_boxes = torch.tensor([[4, 0, 8, 4], [5, 5, 5, 5], [5, 5, 8, 9]], dtype=torch.float64)
    got = generalized_iou_loss(boxes, gt_boxes, smoothing=1.0)
    want = torch.tensor([1 - 9 / 33, 1.0, 1 - 1 / 13], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=0)
    assert generalized_iou_loss(boxes, gt_boxes)[0].item() == pytest.approx(1 - 8 / 32)


def test_smoothed_giou_keeps_inverted_boxes_apart() -> None:
    boxes = torch.tensor([[8.0, 2.0, 4.0, 9.0]], requires_grad=True)
    losses = generalized_iou_loss(boxes, torch.tensor([[3.0, 1.0, 9.0, 10.0]]), smoothing=1.0)
    losses.sum().backward()
    assert losses.tolist() == [1]
    assert boxes.grad is not None
    assert boxes.grad.tolist() == [[0, 0, 0, 0]]


def test_giou_does_not_hide_nan() -> None:
    """A prediction that is not a number must stop the training, not count as an inverted box."""
    gt_boxes = torch.tensor([[3.0, 1.0, 9.0, 10.0]])
    losses = generalized_iou_loss(torch.full((1, 4), math.nan), gt_boxes)
    assert losses.isnan().all()


def test_normalizer_of_one_process() -> None:
    for total, want in ((7.5, 7.5), (1.0, 1.0), (0.25, 1.0), (0.0, 1.0)):
        given = torch.tensor(total, requires_grad=True)
        got = loss_normalizer(given)
        assert got.shape == ()
        assert got.item() == want
        assert not got.requires_grad
        assert given.item() == total


@pytest.mark.parametrize(
    ("totals", "want"),
    [
        ([3.0, 5.0], 4.0),  # the mean, as of one process with the whole batch
        ([0.0, 8.0], 4.0),  # one process without objects
        ([0.0, 0.0], 0.5),  # max(0, 1) / 2, not max(mean, 1): two halves of one loss over 1
        ([0.5, 0.25], 0.5),  # max(0.75, 1) / 2
    ],
)
def test_normalizer_of_two_processes(
    monkeypatch: pytest.MonkeyPatch, totals: list[float], want: float
) -> None:
    def all_reduce(tensor: Tensor) -> None:
        tensor.add_(totals[1])

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    total = torch.tensor(totals[0])
    assert loss_normalizer(total).item() == want
    assert total.item() == totals[0]
