# SPDX-License-Identifier: Apache-2.0
"""Soft anchor weights on other hosts: by hand, by plain loops, in detectors, in two processes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from process_groups import PROCESSES, join
from standin_assigners import PerClassWeights
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from util import excite, loss_sum, make_instances, random_input, tiny_model, without_gradient

from d2_decouple.modeling import (
    ATSSAssigner,
    DDODAssigner,
    FCOSAssigner,
    FocalTerm,
    GFLAssigner,
    PDNetAssigner,
    RetinaNetAssigner,
    SoftWeights,
    WeightedQualityTerm,
    class_score,
)
from d2_decouple.modeling.soft_weights import positive_weights
from d2_decouple.structures import DensePredictions, DenseTargets

K = 3
SIZE = (64, 96)


class Given(nn.Module):
    """An assigner with one answer."""

    def __init__(self, targets: DenseTargets) -> None:
        super().__init__()
        self.targets = targets

    def forward(self, *inputs: Any) -> DenseTargets:
        return self.targets


def predictions_at(points: list[list[float]], dtype: torch.dtype = torch.float32) -> Any:
    count = len(points)
    torch.manual_seed(4)
    return DensePredictions(
        logits=torch.randn(1, count, K, dtype=dtype, requires_grad=True),
        boxes=torch.zeros(1, count, 4, dtype=dtype),
        quality=torch.randn(1, count, dtype=dtype, requires_grad=True),
        locations=torch.tensor(points, dtype=dtype),
        strides=torch.full((count,), 8, dtype=dtype),
        priors=torch.zeros(count, 4, dtype=dtype),
        level_sizes=(count,),
        extras={},
    )


# Of the box (0, 0, 80, 80): off the middle, the middle, near a corner, on the border, outside;
# then background and an ignored cell.
POINTS = [[36.0, 36], [40, 40], [4, 72], [0, 40], [90, 40], [36, 36], [36, 36]]
LABELS = [1, 0, 2, 1, 1, K, -1]
BOX_WEIGHTS = [0.5, 1.0, 1, 1, 1, 0, 0]
# (36 / 44)^2; 1; 4 / 76 * 8 / 72; then nothing, and for the last two what the host says.
FACTORS = [0.6694214876, 1, 0.0058479532, 0, 0, 1, 1]


def targets_of(dtype: torch.dtype = torch.float32, **changes: Any) -> DenseTargets:
    boxes = torch.zeros(1, len(POINTS), 4, dtype=dtype)
    boxes[:, :5] = torch.tensor([0.0, 0, 80, 80], dtype=dtype)
    values: dict[str, Any] = {
        "labels": torch.tensor([LABELS]),
        "boxes": boxes,
        "cls_weights": torch.ones(1, len(POINTS), 1, dtype=dtype),
        "box_weights": torch.tensor([BOX_WEIGHTS], dtype=dtype),
        "quality": torch.full((1, len(POINTS)), 0.25, dtype=dtype),
        "cls_normalizer": torch.tensor(5.0, dtype=dtype),
        "box_normalizer": torch.tensor(4.5, dtype=dtype),
        "extras": {"gt_index": torch.zeros(1, len(POINTS), dtype=torch.int64)},
    }
    return DenseTargets(**{**values, **changes})


def softened(targets: DenseTargets, **options: Any) -> DenseTargets:
    predictions = predictions_at(POINTS, targets.boxes.dtype)
    return SoftWeights(host=Given(targets), **options)([], predictions, [])


def test_by_hand() -> None:
    """Class sum .669421 + 1 + .005848 = 1.675269, box sum .5 * .669421 + 1 + .005848 = 1.340559."""
    host = targets_of()
    found = softened(host)
    assert found.cls_weights[0, :, 0].tolist() == pytest.approx(FACTORS)
    wanted = [x * y for x, y in zip(BOX_WEIGHTS, FACTORS, strict=True)]
    assert found.box_weights[0].tolist() == pytest.approx(wanted)
    assert found.cls_normalizer.item() == pytest.approx(1.675269)
    assert found.box_normalizer.item() == pytest.approx(1.340559)
    for name in ("labels", "boxes", "quality"):
        assert getattr(found, name) is getattr(host, name)
    assert found.extras == host.extras


@pytest.mark.parametrize(("exponent", "factor"), [(0.5, 36 / 44), (2.0, (36 / 44) ** 4), (0, 1)])
def test_exponent(exponent: float, factor: float) -> None:
    found = softened(targets_of(), exponent=exponent)
    assert found.cls_weights[0, 0, 0].item() == pytest.approx(factor)
    assert found.cls_weights[0, 1, 0].item() == 1


def test_sums_below_one_are_not_divided_by() -> None:
    """A single positive of f = .669421; its box counts half of that."""
    labels = torch.full((1, len(POINTS)), K)
    labels[0, 0] = 1
    weights = torch.zeros(1, len(POINTS))
    weights[0, 0] = 0.5
    targets = targets_of(labels=labels, box_weights=weights)
    found = softened(targets)
    assert (found.cls_normalizer.item(), found.box_normalizer.item()) == (1, 1)
    found = softened(targets, box_minimum=1e-12)
    assert found.cls_normalizer.item() == 1
    assert found.box_normalizer.item() == pytest.approx(0.3347107)


def test_weights_of_each_class() -> None:
    """All classes of a row are weighted; what a positive counts is the weight of its own."""
    weights = torch.ones(1, len(POINTS), K)
    weights[..., 1] = 0.25  # of the first, fourth and fifth positive
    found = softened(targets_of(cls_weights=weights))
    assert found.cls_weights[0, 0].tolist() == pytest.approx([0.6694215, 0.1673554, 0.6694215])
    assert found.cls_weights[0, 5].tolist() == [1, 0.25, 1]
    assert found.cls_normalizer.item() == pytest.approx(0.25 * 0.669421 + 1 + 0.005848)


def test_gradients_are_the_hosts_times_the_factor() -> None:
    """Of the focal loss, in float64: rows times f, all times 5 / 1.675269."""
    predictions = predictions_at(POINTS, torch.float64)
    host = targets_of(torch.float64)
    targets = SoftWeights(host=Given(host))([], predictions, [])
    assert not targets.cls_weights.requires_grad
    term = FocalTerm()
    grads = [
        torch.autograd.grad(term(predictions, x), predictions.logits)[0] for x in (host, targets)
    ]
    factors = torch.tensor(FACTORS, dtype=torch.float64)[:, None]
    wanted = grads[0][0] * factors * 5 / (0.6694214876 + 1 + 0.0058479532)
    torch.testing.assert_close(grads[1][0], wanted, rtol=1e-8, atol=1e-12)
    assert (grads[1][0, :3] != 0).all()
    assert (grads[1][0, 5] != 0).all()


def test_quality_is_a_weighted_mean() -> None:
    predictions = predictions_at(POINTS)
    targets = softened(targets_of())
    losses = [
        -(0.25 * F.logsigmoid(z) + 0.75 * F.logsigmoid(-z)).item() for z in predictions.quality[0]
    ]
    total = sum(loss * f for loss, f in zip(losses[:5], FACTORS, strict=False))
    found = WeightedQualityTerm(weight=2.0)(predictions, targets)
    assert found.item() == pytest.approx(2 * total / 1.675269, rel=1e-5)


@pytest.mark.parametrize("missing", ["predictor", "assigner"])
def test_a_missing_quality_is_named(missing: str) -> None:
    predictions, targets = predictions_at(POINTS), targets_of()
    if missing == "predictor":
        predictions = predictions._replace(quality=None)
    else:
        targets = targets._replace(quality=None)
    with pytest.raises(ValueError, match=r"WeightedQualityTerm wants.*remove this term"):
        WeightedQualityTerm()(predictions, targets)


# --- real hosts ---------------------------------------------------------------------------------


def scene(host: str, counts: tuple[int, ...] = (4, 0, 7)) -> tuple[Any, Any, Any]:
    """Maps, predictions and ground truth of a tiny detector."""
    model = excite(tiny_model(host), gain=0.5)
    inputs = [random_input(SIZE, count) for count in counts]
    with torch.no_grad():
        _, features, predictions = model.predict(inputs)
    return features, predictions, [x["instances"] for x in inputs]


def loop_factors(targets: DenseTargets, predictions: DensePredictions, eta: float) -> Tensor:
    """(N, R) f of each positive, 1 of others, one location after the other."""
    rows = []
    for labels, boxes in zip(targets.labels.tolist(), targets.boxes.tolist(), strict=True):
        row = []
        for label, box, (x, y) in zip(labels, boxes, predictions.locations.tolist(), strict=True):
            if not 0 <= label < K:
                row.append(1.0)
                continue
            left, top, right, bottom = x - box[0], y - box[1], box[2] - x, box[3] - y
            if min(left, top, right, bottom) <= 0:
                row.append(0.0)
                continue
            ratio = min(left, right) * min(top, bottom) / (max(left, right) * max(top, bottom))
            row.append(ratio**eta)
        rows.append(row)
    return torch.tensor(rows)


HOSTS: dict[str, tuple[str, Any, float]] = {  # recipe of the predictions, assigner, least sum
    "FCOS": ("fcos_R_50_FPN_1x", lambda: FCOSAssigner(num_classes=K), 1),
    "ATSS": ("atss_R_50_FPN_1x", lambda: ATSSAssigner(num_classes=K), 1),
    "GFL": ("gfl_R_50_FPN_1x", lambda: GFLAssigner(num_classes=K, score=class_score), 1e-12),
    "RetinaNet": ("retinanet_R_50_FPN_1x", lambda: RetinaNetAssigner(num_classes=K), 1),
    "of each class": (
        "fcos_R_50_FPN_1x",
        lambda: PerClassWeights(host=FCOSAssigner(num_classes=K), ignored=1),
        1,
    ),
}


@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("name", HOSTS)
def test_hosts_by_plain_loops(name: str, eta: float) -> None:
    recipe, build, minimum = HOSTS[name]
    inputs = scene(recipe)
    predictions = inputs[1]
    host = build()(*inputs)
    found = SoftWeights(host=build(), exponent=eta, box_minimum=minimum)(*inputs)
    factors = loop_factors(host, predictions, eta)
    positive = (host.labels >= 0) & (host.labels < K)
    assert positive.sum() >= 5
    assert factors[positive].std() > 0.05
    torch.testing.assert_close(found.cls_weights, host.cls_weights * factors[..., None])
    torch.testing.assert_close(found.box_weights, host.box_weights * factors)
    assert torch.equal(found.labels, host.labels)
    sums = [0.0, 0.0]
    for image, row in positive.nonzero().tolist():
        own = host.labels[image, row] if found.cls_weights.shape[-1] > 1 else 0
        sums[0] += found.cls_weights[image, row, own].item()
        sums[1] += found.box_weights[image, row].item()
    assert found.cls_normalizer.item() == pytest.approx(max(sums[0], 1), rel=1e-4)
    assert found.box_normalizer.item() == pytest.approx(max(sums[1], minimum), rel=1e-4)


def test_an_anchor_whose_cell_is_outside_its_object_learns_nothing() -> None:
    """Of three pixels, between the cells at 8 and 16: the nearest anchor is its best match."""
    features, predictions, _ = scene("retinanet_R_50_FPN_1x", (1,))
    truth = [make_instances(SIZE, [[9.0, 9, 12, 12], [34, 2, 62, 30]], [2, 1])]
    found = SoftWeights(host=RetinaNetAssigner(num_classes=K))(features, predictions, truth)
    labels, weights = found.labels[0], found.cls_weights[0, :, 0]
    assert (labels == 2).any()
    assert (weights[labels == 2] == 0).all()
    assert (found.box_weights[0, labels == 2] == 0).all()
    assert (weights[labels == 1] > 0).any()
    assert (weights[labels == K] == 1).all()


def test_second_label_sets() -> None:
    """DDOD's of boxes is weighed where it is named; PDNet's of coarse boxes stays by default."""
    inputs = scene("ddod_R_50_FPN_1x")
    left, taken = (
        SoftWeights(host=DDODAssigner(num_classes=K, num_levels=5), label_sets=names)(*inputs)
        for names in ([], ["box"])
    )
    host = left.extras["box"]
    factors = loop_factors(host, inputs[1], 1.0)
    assert (factors < 0.9).any()
    own = taken.extras["box"]
    torch.testing.assert_close(own.box_weights, host.box_weights * factors)
    torch.testing.assert_close(own.box_normalizer, own.box_weights.sum().clamp(min=1))
    assert torch.equal(taken.cls_weights, left.cls_weights)
    assert torch.equal(taken.extras["level_factors"], left.extras["level_factors"])
    inputs = scene("pdnet_R_50_FPN_1x")
    plain = PDNetAssigner(num_classes=K)(*inputs)
    coarse = SoftWeights(host=PDNetAssigner(num_classes=K))(*inputs).extras["coarse"]
    for name in ("box_weights", "cls_weights", "cls_normalizer", "box_normalizer"):
        assert torch.equal(getattr(coarse, name), getattr(plain.extras["coarse"], name))


def test_a_label_set_that_is_not_there_is_named() -> None:
    inputs = scene("pdnet_R_50_FPN_1x", (1,))
    assigner = SoftWeights(host=PDNetAssigner(num_classes=K), label_sets=["box"])
    message = r"label_sets names \['box'\], PDNetAssigner gives \['coarse'\]"
    with pytest.raises(ValueError, match=message):
        assigner(*inputs)
    # Of the extras that are no label sets, none can be meant.
    with pytest.raises(ValueError, match=r"FCOSAssigner gives \[\]"):
        SoftWeights(host=FCOSAssigner(num_classes=K), label_sets=["gt_index"])(
            *scene("fcos_R_50_FPN_1x", (1,))
        )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"host": FCOSAssigner}, TypeError, r"assigner\.host must be an assigner.*FCOSAssigner"),
        ({"exponent": -0.5}, ValueError, r"assigner\.exponent is -0\.5; wanted is a finite"),
        ({"exponent": math.inf}, ValueError, r"assigner\.exponent is inf"),
        ({"box_minimum": 0.0}, ValueError, r"assigner\.box_minimum is 0\.0; wanted is a positive"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SoftWeights(**{"host": FCOSAssigner(num_classes=K), **options})


# --- detectors ----------------------------------------------------------------------------------

MODELS = ("sapd_fcos_R_50_FPN_1x", "sapd_atss_R_50_FPN_1x", "composed_soft_salt_dpe_R_50_FPN_1x")
TOGETHER = MODELS[::2]  # one that divides by 1 at least, one that does not
COUNTS = {  # objects of each image; the first half goes to the first process
    "unequal": (3, 2, 0, 1),
    "no objects": (0, 0, 0, 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_detectors_learn_from_batches_without_objects(name: str) -> None:
    model = tiny_model(name)
    assert isinstance(model.assigner, SoftWeights)
    for counts in ((2, 0), (0, 0)):
        model.zero_grad()
        losses = model([random_input(SIZE, count) for count in counts])
        assert all(loss.isfinite() for loss in losses.values())
        loss_sum(losses).backward()
        assert without_gradient(model) == []


def fresh(name: str) -> nn.Module:
    torch.manual_seed(5)
    model = excite(tiny_model(name), gain=0.5).double()
    model.head.cls_score.bias.data.fill_(-1.0)
    return model


def gradients(model: nn.Module, wrapped: nn.Module, inputs: list[Any]) -> Any:
    losses = wrapped(inputs)
    loss_sum(losses).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return grads, {name: loss.detach() for name, loss in losses.items()}


def batch(case: str) -> list[Any]:
    torch.manual_seed(3)
    return [random_input((64, 64), count) for count in COUNTS[case]]


def train_half(rank: int, folder: str) -> None:
    join(rank, folder)
    results = {}
    for name in TOGETHER:
        for case in COUNTS:
            model, inputs = fresh(name), batch(case)
            half = len(inputs) // PROCESSES
            own = inputs[rank * half : (rank + 1) * half]
            results[name, case] = gradients(model, DistributedDataParallel(model), own)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gradients and losses of each process, of every model and case."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(train_half, args=(str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.parametrize("case", COUNTS)
@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_learn_what_one_learns(halves: Any, name: str, case: str) -> None:
    model = fresh(name)
    whole, losses = gradients(model, model, batch(case))
    for half, _ in (results[name, case] for results in halves):
        assert half.keys() == whole.keys()
        for parameter, gradient in whole.items():
            atol = 1e-6 * gradient.abs().max().item()
            torch.testing.assert_close(half[parameter], gradient, rtol=1e-6, atol=atol)
    for term, loss in losses.items():
        mean = torch.stack([results[name, case][1][term] for results in halves]).mean()
        torch.testing.assert_close(mean, loss)


def test_positives_own_weights_without_positives() -> None:
    targets = targets_of(labels=torch.full((1, len(POINTS)), K))
    assert positive_weights(targets, K).tolist() == [[0.0] * len(POINTS)]
