# SPDX-License-Identifier: Apache-2.0
"""GFL's targets and losses: golden numbers of the fact sheet, plain loops, and what could break."""

import math
from typing import Any

import pytest
import salt_sheet
import torch
from detectron2.structures import Instances
from gfl_loops import assign, cells_of, giou_cost, iou
from torch import Tensor, nn
from util import make_instances

from d2_decouple.layers.points import make_grid
from d2_decouple.modeling import (
    ATSSAssigner,
    DistributionFocalTerm,
    FCOSAssigner,
    FocalTerm,
    GFLAssigner,
    GFLPredictor,
    GFLv2Predictor,
    GIoUTerm,
    QualityFocalTerm,
    class_score,
    product_score,
)
from d2_decouple.structures import DensePredictions, DenseTargets, foreground

K = 3
STRIDES = [8, 16, 32]
SIZES = [(12, 16), (6, 8), (3, 4)]
TERMS: dict[str, Any] = {
    "loss_cls": QualityFocalTerm(),
    "loss_box_reg": GIoUTerm(weight=2.0),
    "loss_box_distribution": DistributionFocalTerm(),
}
SCORES = {GFLPredictor: class_score, GFLv2Predictor: product_score}


def predicted(
    kind: Any = GFLPredictor, dtype: torch.dtype = torch.float64, images: int = 2
) -> tuple[DensePredictions, nn.Module, list[Tensor]]:
    """Predictions of a predictor whose box outputs differ much, it, and its class maps."""
    torch.manual_seed(1)
    predictor = kind(num_classes=K, in_channels=4, num_levels=3).to(dtype)
    for name, parameter in predictor.named_parameters():
        if not name.endswith("scales"):
            nn.init.normal_(parameter, std=0.5)
    class_maps = [
        (torch.randn(images, K, *size, dtype=dtype) - 2).requires_grad_() for size in SIZES
    ]
    box_maps = [torch.randn(images, 4, *size, dtype=dtype) for size in SIZES]
    grid = make_grid(SIZES, STRIDES, 0.0, device=torch.device("cpu"), dtype=dtype)
    return predictor(class_maps, box_maps, grid), predictor, class_maps


OBJECTS = [
    [[10.5, 8.25, 70.0, 60.75], [30.0, 20.5, 90.25, 80.0], [99.25, 3.5, 107.0, 12.75]],
    [[12.5, 30.0, 41.75, 47.25]],
]
SIZES_ALONE = [(96, 128), (60, 50)]


def ground_truth(objects: list[list[list[float]]]) -> list[Instances]:
    return [
        make_instances(size, boxes, [index % K for index in range(len(boxes))])
        for size, boxes in zip(SIZES_ALONE, objects, strict=True)
    ]


def assigned(
    predictions: DensePredictions, objects: list[list[list[float]]], assigner: Any = None
) -> DenseTargets:
    if assigner is None:
        score = class_score if predictions.quality is None else product_score
        assigner = GFLAssigner(num_classes=K, score=score)
    features = [torch.zeros(2, 0, *size) for size in SIZES]
    return assigner(features, predictions, ground_truth(objects))


# The fact sheet's numbers.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_golden_numbers_of_the_fact_sheet(dtype: torch.dtype) -> None:
    """SALT-Net's: four locations of stride 8, four channels, two objects."""
    predictions, targets = salt_sheet.scene(dtype)
    assert targets.box_weights.sum().item() == pytest.approx(0.7)
    losses = [term(predictions, targets).item() for term in TERMS.values()]
    assert losses == pytest.approx([salt_sheet.LOSSES[x] for x in ("cls", "bbox", "dfl")], abs=1e-6)


# Targets.


@pytest.mark.parametrize("kind", SCORES)
def test_targets_by_loops(kind: Any) -> None:
    predictions, _, _ = predicted(kind)
    targets = assigned(predictions, OBJECTS)
    scores = SCORES[kind](predictions)
    total, count = 0.0, 0
    for image, (boxes, (height, width)) in enumerate(zip(OBJECTS, SIZES_ALONE, strict=True)):
        padded = (-(-height // 32) * 32, -(-width // 32) * 32)
        owners = assign(cells_of(SIZES, STRIDES), boxes, padded).objects
        assert targets.extras["gt_index"][image].tolist() == [max(x, -1) for x in owners]
        count += max(sum(x >= 0 for x in owners), 1)
        for row, owner in enumerate(owners):
            weight, quality = targets.box_weights[image, row], targets.quality[image, row]
            if owner < 0:
                assert weight == quality == 0
                continue
            best = max(scores[image, row].tolist())
            assert weight.item() == pytest.approx(best, rel=1e-12)
            overlap = iou(predictions.boxes[image, row].tolist(), boxes[owner])
            assert quality.item() == pytest.approx(overlap, rel=1e-12)
            total += best
    assert count > 10
    assert targets.cls_normalizer == count
    assert targets.box_normalizer.item() == pytest.approx(total, rel=1e-12)
    assert (targets.cls_weights == 1).all()
    for value in (targets.box_weights, targets.quality, targets.box_normalizer):
        assert not value.requires_grad


def test_few_scores_are_not_taken_for_one() -> None:
    """The normaliser is the sum of the weights also where that is next to nothing."""
    predictions, _, _ = predicted()
    timid = predictions._replace(logits=predictions.logits.detach() - 12)
    targets = assigned(timid, OBJECTS)
    assert 0 < targets.box_normalizer < 1e-3
    assert targets.box_normalizer == targets.box_weights.sum()
    weights = targets.box_weights / targets.box_normalizer
    positive = foreground(targets.labels, K)
    costs = [
        giou_cost(timid.boxes[place].tolist(), targets.boxes[place].tolist()) * weights[place]
        for place in map(tuple, positive.nonzero().tolist())
    ]
    assert TERMS["loss_box_reg"](timid, targets).item() == pytest.approx(2 * sum(costs).item())


# Losses.


def test_class_weights_and_ignored_rows() -> None:
    predictions, _, _ = predicted(GFLv2Predictor)
    targets = assigned(predictions, OBJECTS)
    assert (targets.labels == -1).any()
    plain = TERMS["loss_cls"](predictions, targets)
    predictions.logits.retain_grad()
    plain.backward(retain_graph=True)
    silent = (predictions.logits.grad == 0).all(-1)
    assert torch.equal(silent, targets.labels == -1)
    heavier = targets._replace(cls_weights=targets.cls_weights * 3)
    torch.testing.assert_close(TERMS["loss_cls"](predictions, heavier), 3 * plain)
    torch.testing.assert_close(QualityFocalTerm(weight=3.0)(predictions, targets), 3 * plain)
    of_class = torch.zeros(1, 1, K, dtype=torch.float64)
    parts = []
    for index in range(K):
        weights = of_class.index_fill(-1, torch.tensor([index]), 1).expand_as(predictions.logits)
        parts.append(TERMS["loss_cls"](predictions, targets._replace(cls_weights=weights)))
    torch.testing.assert_close(torch.stack(parts).sum(), plain)
    assert min(parts) > 0


def test_the_quality_is_part_of_the_score() -> None:
    """A quality that is sure adds nothing; one of one half makes another loss."""
    predictions, _, _ = predicted()
    targets = assigned(predictions, OBJECTS)
    plain = TERMS["loss_cls"](predictions, targets)
    sure = predictions._replace(quality=torch.full_like(predictions.boxes[..., 0], 50.0))
    torch.testing.assert_close(TERMS["loss_cls"](sure, targets), plain)
    half = predictions._replace(quality=torch.zeros_like(predictions.boxes[..., 0]))
    assert abs(TERMS["loss_cls"](half, targets) - plain) > 0.01


@pytest.mark.parametrize("kind", SCORES)
def test_which_loss_teaches_what(kind: Any) -> None:
    """The score's loss reaches boxes through GFLv2's quality alone; boxes teach no class."""
    predictions, predictor, class_maps = predicted(kind)
    targets = assigned(predictions, OBJECTS)
    leaves = {"class": class_maps[0], "box": predictor.bbox_pred.weight}
    reached = {}
    for name, term in TERMS.items():
        found = torch.autograd.grad(
            term(predictions, targets),
            list(leaves.values()),
            retain_graph=True,
            materialize_grads=True,
        )
        reached[name] = {leaf for leaf, x in zip(leaves, found, strict=True) if x.any()}
    assert reached == {
        "loss_cls": {"class", "box"} if kind is GFLv2Predictor else {"class"},
        "loss_box_reg": {"box"},
        "loss_box_distribution": {"box"},
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", SCORES)
def test_nothing_to_learn_is_zero_with_a_gradient(kind: Any, dtype: torch.dtype) -> None:
    predictions, predictor, class_maps = predicted(kind, dtype)
    targets = assigned(predictions, [[], []])
    assert targets.cls_normalizer == 2  # one for each image
    assert targets.box_normalizer > 0
    losses = {name: term(predictions, targets) for name, term in TERMS.items()}
    assert losses["loss_box_reg"] == losses["loss_box_distribution"] == 0
    assert losses["loss_cls"] > 0
    torch.stack(list(losses.values())).sum().backward()
    for parameter in (*predictor.parameters(), *class_maps):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kind", SCORES)
def test_extreme_logits_stay_finite(kind: Any, sign: int) -> None:
    """Of classes and distributions, in float32."""
    _, predictor, class_maps = predicted(kind, torch.float32)
    grid = make_grid(SIZES, STRIDES, 0.0, device=torch.device("cpu"), dtype=torch.float32)
    box_maps = [torch.randn(2, 4, *size, requires_grad=True) for size in SIZES]
    raised = [x + sign * 1e4 for x in class_maps]
    predictions = predictor(raised, [x * 1e4 for x in box_maps], grid)
    targets = assigned(predictions, OBJECTS)
    losses = {name: term(predictions, targets) for name, term in TERMS.items()}
    torch.stack(list(losses.values())).sum().backward()
    assert all(loss.isfinite() for loss in losses.values()), losses
    if kind is GFLPredictor:  # in GFLv2 a quality softens them
        assert losses["loss_cls"] > 100
    for x in (*predictor.parameters(), *class_maps, *box_maps):
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_terms_do_not_change() -> None:
    for term in TERMS.values():
        with pytest.raises(AttributeError):
            term.weight = 3.0


# Parts that do not fit are named.


def test_a_score_that_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match=r"score must be callable, such as class_score, got 'cl"):
        GFLAssigner(num_classes=3, score="class_score")  # type: ignore[arg-type]


@pytest.mark.parametrize("beta", [-1.0, 0.5, math.inf, math.nan])
def test_a_beta_without_slope_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=r"beta is .*; wanted is 0 or a number from 1, such as 2"):
        QualityFocalTerm(beta=beta)


def test_a_predictor_without_distributions_is_named() -> None:
    predictions, _, _ = predicted()
    targets = assigned(predictions, OBJECTS)
    plain = predictions._replace(extras={"coarse_boxes": predictions.boxes})
    with pytest.raises(ValueError, match=r"only \['coarse_boxes'\].*GFLPredictor"):
        TERMS["loss_box_distribution"](plain, targets)


def test_an_assigner_without_quality_is_named() -> None:
    predictions, _, _ = predicted()
    targets = assigned(predictions, OBJECTS)._replace(quality=None)
    with pytest.raises(ValueError, match=r"QualityFocalTerm wants .*GFLAssigner, or FocalTerm"):
        TERMS["loss_cls"](predictions, targets)


def test_other_assigners_serve_the_terms() -> None:
    """Their quality is a target, too: centerness."""
    predictions, _, _ = predicted()
    for assigner in (ATSSAssigner(num_classes=K), FCOSAssigner(num_classes=K)):
        targets = assigned(predictions, OBJECTS, assigner)
        losses = [term(predictions, targets) for term in (*TERMS.values(), FocalTerm())]
        assert all(loss > 0 for loss in losses)
