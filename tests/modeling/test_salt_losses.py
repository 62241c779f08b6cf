# SPDX-License-Identifier: Apache-2.0
"""SALT-Net's losses: golden numbers of the fact sheet, self-distillation by hand, odd boxes."""

from typing import Any

import pytest
import salt_sheet
import torch
from gfl_loops import giou_cost, iou
from torch import Tensor
from util import random_input, tiny_model

from d2_decouple.modeling import (
    DistributionFocalTerm,
    GIoUTerm,
    QualityFocalTerm,
    class_score,
    coarse_boxes,
    product_score,
)
from d2_decouple.modeling.salt import SALT, AlignedPoints, SelfDistillationTerm
from d2_decouple.structures import DensePredictions, DenseTargets, foreground

DTYPES = [torch.float32, torch.float64]
K = 3


def made_predictions(
    coarse: Any, refined: Any, scores: Any, dtype: torch.dtype = torch.float64
) -> DensePredictions:
    """One image whose R locations have these coarse and refined boxes and (R, K) scores."""
    refined, scores = torch.tensor([refined], dtype=dtype), torch.tensor([scores], dtype=dtype)
    count = refined.shape[1]
    return DensePredictions(
        logits=scores.logit(),
        boxes=refined.requires_grad_(),
        quality=None,
        locations=torch.zeros(count, 2, dtype=dtype),
        strides=torch.ones(count, dtype=dtype),
        priors=torch.zeros(count, 4, dtype=dtype),
        level_sizes=(count,),
        extras={"coarse_boxes": torch.tensor([coarse], dtype=dtype).requires_grad_()},
    )


def made_targets(
    boxes: Any, labels: list[int], total: float = 1.0, positives: float = 1.0
) -> DenseTargets:
    values = torch.tensor([boxes], dtype=torch.float64)
    named = torch.tensor([labels])
    return DenseTargets(
        labels=named,
        boxes=values,
        cls_weights=torch.ones(1, len(labels), 1, dtype=torch.float64),
        box_weights=foreground(named, K).double() * 7,  # which this loss must not look at
        quality=None,
        cls_normalizer=torch.tensor(positives, dtype=torch.float64),
        box_normalizer=torch.tensor(total, dtype=torch.float64),
        extras={},
    )


def distilled(**options: Any) -> SelfDistillationTerm:
    return SelfDistillationTerm(score=class_score, **options)


# --- the fact sheet -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_golden_losses_of_the_fact_sheet(dtype: torch.dtype) -> None:
    """Section 6: four locations of stride 8, four channels, two objects; all four losses."""
    predictions, targets = salt_sheet.scene(dtype)
    distances = salt_sheet.distances(dtype)
    no_points = distances.new_zeros(1, 2, 2, 0, 2)
    extras = AlignedPoints(distances, distances[..., :0], no_points, no_points)
    aligner = SALT(channels=1, num_levels=1, norm="")
    decoded = aligner.decode([extras], salt_sheet.grid(dtype))
    predictions = predictions._replace(extras={**predictions.extras, **decoded})
    terms: dict[str, Any] = {
        "cls": QualityFocalTerm(),
        "bbox": GIoUTerm(weight=2.0),
        "dfl": DistributionFocalTerm(),
        "init": GIoUTerm(boxes=coarse_boxes),
    }
    losses = {name: term(predictions, targets).item() for name, term in terms.items()}
    assert losses == pytest.approx(salt_sheet.LOSSES, abs=1e-6)
    assert targets.box_normalizer.item() == pytest.approx(0.7)
    # Here the coarse boxes are the better ones.
    assert distilled()(predictions, targets) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_golden_distillation_of_the_fact_sheet(dtype: torch.dtype) -> None:
    """Section 6.1: a score of 0.8, overlaps 0.5 and 0.75, a loss of 1/3; swapped, nothing."""
    half, most = [0.0, 0, 4, 2], [0.0, 0, 4, 3]
    targets = made_targets([[0.0, 0, 4, 4]], [0])
    predictions = made_predictions([half], [most], [[0.8, 0.1, 0.1]], dtype)
    assert distilled()(predictions, targets).item() == pytest.approx(0.2, abs=1e-6)
    swapped = made_predictions([most], [half], [[0.8, 0.1, 0.1]], dtype)
    assert distilled()(swapped, targets).item() == 0


# --- self-distillation --------------------------------------------------------------------------


COARSE = [[0.0, 0, 4, 2], [1, 0, 4, 4], [0, 0, 3, 3], [0, 0, 2, 2], [0, 0, 1, 1]]
REFINED = [[0.0, 0, 4, 3], [0, 1, 4, 4], [0, 0, 4, 3.5], [0, 0, 4, 4], [0, 0, 4, 4]]
SCORES = [[0.8, 0.1, 0.3], [0.6, 0.5, 0.4], [0.2, 0.3, 0.7], [0.9, 0.9, 0.9], [0.9, 0.9, 0.9]]
GT = [[0.0, 0, 4, 4]] * 5
LABELS = [2, 0, 1, K, -1]  # the second has two overlaps alike; the last two have no object


@pytest.mark.parametrize("per_positive", [False, True])
@pytest.mark.parametrize("of_gt_class", [False, True])
def test_which_score_weighs_and_what_divides(of_gt_class: bool, per_positive: bool) -> None:
    predictions = made_predictions(COARSE, REFINED, SCORES)
    targets = made_targets(GT, LABELS, total=1.5, positives=3.0)
    term = distilled(of_gt_class=of_gt_class, per_positive=per_positive)
    total = 0.0
    for place in (0, 2):
        score = SCORES[place][LABELS[place]] if of_gt_class else max(SCORES[place])
        overlap = iou(REFINED[place], GT[place])
        total += score * overlap * giou_cost(COARSE[place], REFINED[place])
    wanted = total / (3.0 if per_positive else 1.5)
    assert term(predictions, targets).item() == pytest.approx(wanted, rel=1e-9)


def test_by_default_the_best_score_over_the_sum_of_weights() -> None:
    assert distilled() == distilled(of_gt_class=False, per_positive=False, weight=1.0)


@pytest.mark.parametrize("width", [1, K])
def test_a_positive_is_weighed_as_its_class_is(width: int) -> None:
    """Soft weights make the sums that are divided by smaller, so what is divided must be, too."""
    weights = torch.tensor([0.25, 1.0, 0.5, 1.0, 1.0]).double()[:, None].repeat(1, width)
    if width == K:
        weights[0] = torch.tensor([9.0, 9.0, 0.25])  # its label is 2
        weights[2] = torch.tensor([9.0, 0.5, 9.0])  # and 1
    predictions = made_predictions(COARSE, REFINED, SCORES)
    targets = made_targets(GT, LABELS, total=1.5)._replace(cls_weights=weights[None])
    total = 0.0
    for place, weight in ((0, 0.25), (2, 0.5)):
        overlap = iou(REFINED[place], GT[place])
        total += weight * max(SCORES[place]) * overlap * giou_cost(COARSE[place], REFINED[place])
    assert distilled()(predictions, targets).item() == pytest.approx(total / 1.5, rel=1e-9)


def test_autoassigns_class_weights_are_those_of_negatives() -> None:
    """They are 0 where a box fits best; the prior of the location counts in their place."""
    predictions, targets = made_predictions(COARSE, REFINED, SCORES), made_targets(GT, LABELS)
    of_negatives = torch.tensor([0.0, 1, 1, 1, 1]).double()[:, None].expand(-1, K)
    prior = torch.tensor([[0.9, 0.5, 0.2, 0, 0]]).double()
    weighed = targets._replace(
        cls_weights=of_negatives[None], box_weights=prior, extras={"inside": None}
    )
    likewise = targets._replace(cls_weights=prior[..., None])
    assert distilled()(predictions, weighed) == distilled()(predictions, likewise) > 0


def test_weight() -> None:
    predictions, targets = made_predictions(COARSE, REFINED, SCORES), made_targets(GT, LABELS)
    once, thrice = (distilled(weight=x)(predictions, targets) for x in (1.0, 3.0))
    torch.testing.assert_close(thrice, 3 * once)


def test_equal_overlaps_teach_nothing() -> None:
    """The gate is strict; nobody who has no object is taught, however good the refined box."""
    predictions = made_predictions(COARSE, REFINED, SCORES)
    distilled()(predictions, made_targets(GT, LABELS)).backward()
    grad = predictions.extras["coarse_boxes"].grad
    assert grad[0].any(-1).tolist() == [True, False, True, False, False]
    assert predictions.boxes.grad is None
    assert iou(COARSE[1], GT[1]) == iou(REFINED[1], GT[1])


def test_coarse_boxes_move_towards_the_refined() -> None:
    predictions, targets = made_predictions(COARSE, REFINED, SCORES), made_targets(GT, LABELS)
    distilled()(predictions, targets).backward()
    grad = predictions.extras["coarse_boxes"].grad[0, 0]
    assert grad[3] < 0  # its lower side is too high
    assert grad[:3].abs().max() < grad[3].abs()


@pytest.mark.parametrize(
    "coarse",
    [[2.0, 2, 2, 2], [2, 0, 2, 4], [3, 3, 1, 1], [-9, -9, -8, -8], [0, 0, 4, 4]],
    ids=["a point", "a line", "inverted", "far away", "perfect"],
)
@pytest.mark.parametrize(
    "refined",
    [[0.0, 0, 4, 3], [2, 2, 2, 2], [3, 3, 1, 1], [50, 50, 60, 60]],
    ids=["good", "a point", "inverted", "far away"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_boxes_stay_finite(coarse: Any, refined: Any, dtype: torch.dtype) -> None:
    predictions = made_predictions([coarse], [refined], [[0.5, 0.4, 0.3]], dtype)
    loss = distilled()(predictions, made_targets([[0.0, 0, 4, 4]], [0]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(predictions.extras["coarse_boxes"].grad).all()
    assert (loss > 0) == (iou_or_zero(refined) > iou_or_zero(coarse))


def iou_or_zero(box: list[float]) -> float:
    return iou(box, [0, 0, 4, 4]) if box[2] > box[0] and box[3] > box[1] else 0.0


def test_the_score_is_the_selection_s() -> None:
    """With a quality, the product: as the assigner weighs the other boxes."""
    model = tiny_model("salt_R_50_FPN_1x")
    term = model.losses["loss_self_distillation"]
    assert term.score is model.assigner.score is model.selection.score is product_score
    predictions = made_predictions(COARSE, REFINED, SCORES)
    quality = torch.full_like(predictions.boxes[..., 0], 0.25).logit()
    with_quality = predictions._replace(quality=quality)
    targets = made_targets(GT, LABELS)
    got = SelfDistillationTerm(score=product_score)(with_quality, targets)
    torch.testing.assert_close(got, 0.25 * distilled()(predictions, targets))


def weighed_as_gfl(predictions: DensePredictions, targets: DenseTargets) -> Tensor:
    """Its default: the assigner's own weight of a positive's box."""
    loss = 0.0
    for place in map(tuple, (targets.box_weights > 0).nonzero().tolist()):
        gt = targets.boxes[place].tolist()
        coarse, refined = (
            x[place].tolist() for x in (coarse_boxes(predictions), predictions.boxes)
        )
        if iou(refined, gt) > iou(coarse, gt):
            weight = targets.box_weights[place].item() * iou(refined, gt)
            loss += weight * giou_cost(coarse, refined)
    return loss / targets.box_normalizer


def test_in_the_network_it_weighs_as_the_assigner_does() -> None:
    model = tiny_model("salt_R_50_FPN_1x")
    inputs = [random_input((96, 128), 5), random_input((96, 128), 3)]
    _, features, predictions = model.double().predict(inputs)
    targets = model.assigner(features, predictions, [x["instances"] for x in inputs])
    got = model.losses["loss_self_distillation"](predictions, targets)
    assert got > 0
    torch.testing.assert_close(got, weighed_as_gfl(predictions, targets), rtol=1e-6, atol=0)


def test_terms_do_not_change() -> None:
    with pytest.raises(AttributeError):
        distilled().weight = 3.0  # type: ignore[misc]


# --- parts that do not fit ----------------------------------------------------------------------


def test_a_score_that_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match=r"score must be callable, such as product_score, got 'pr"):
        SelfDistillationTerm(score="product_score")  # type: ignore[arg-type]


def test_a_network_without_coarse_boxes_is_named() -> None:
    predictions = made_predictions(COARSE, REFINED, SCORES)._replace(extras={"levels": [1]})
    with pytest.raises(ValueError, match=r"coarse boxes are wanted.*only \['levels'\]"):
        distilled()(predictions, made_targets(GT, LABELS))
