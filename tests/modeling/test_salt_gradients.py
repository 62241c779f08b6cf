# SPDX-License-Identifier: Apache-2.0
"""Which part of SALT-Net learns from what: a test for each stop, and for each that is none."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from util import WIDTH, excite, random_input, tiny_model

from d2_decouple.modeling import GFLAssigner, coarse_boxes
from d2_decouple.modeling.salt import SALT, AlignedPoints, SALTOptions
from d2_decouple.structures import DensePredictions, DenseTargets

COARSE = {"coarse_subnet", "coarse_pred", "scales"}
VECTORS = {"vector_subnet", "vector_pred"}
STRATEGIES = ["product", "sum", "free"]


def small(class_points: str = "product", channels: int = 3) -> SALT:
    """Without norms, in float64, with numbers that matter."""
    options = SALTOptions(class_points=class_points)
    aligner = SALT(channels=channels, num_levels=1, norm="", options=options)
    excite(aligner, gain=0.5)
    return aligner.double()


def maps(channels: int = 3, size: tuple[int, int] = (4, 5)) -> dict[str, Tensor]:
    """The aligner's inputs by name; all positive, as behind a ReLU."""
    names = ("feature", "cls_feature", "box_feature")
    return {
        name: torch.rand(1, channels, *size, dtype=torch.float64).requires_grad_() for name in names
    }


def reached(value: Tensor, module: nn.Module, inputs: dict[str, Tensor]) -> set[str]:
    """Parts of a module, and inputs, that have a gradient from a value which is not zero."""
    leaves = {**inputs, **dict(module.named_parameters())}
    found = torch.autograd.grad(
        value.square().sum(), list(leaves.values()), retain_graph=True, materialize_grads=True
    )
    return {name.split(".")[0] for name, x in zip(leaves, found, strict=True) if x.any()}


# --- the aligner alone --------------------------------------------------------------------------


@pytest.mark.parametrize("class_points", STRATEGIES)
def test_box_points_are_detached_in_class_points(class_points: str) -> None:
    """The class feature teaches the class branch alone: neither coarse box nor fractions."""
    aligner, inputs = small(class_points), maps()
    cls, _, extras = aligner(*inputs.values(), 0)
    assert reached(cls, aligner, inputs) == {"cls_align", "feature", "cls_feature", *VECTORS}
    assert reached(extras.class_points, aligner, inputs) == {"feature", "cls_feature", *VECTORS}


def test_box_points_are_detached_where_classes_share_them() -> None:
    aligner, inputs = small("box"), maps()
    cls, box, _ = aligner(*inputs.values(), 0)
    assert reached(cls, aligner, inputs) == {"cls_align", "feature", "cls_feature"}
    assert reached(box, aligner, inputs) == {"box_align", "box_feature", "fraction_pred", *COARSE}


def test_box_points_are_not_detached_in_the_box_feature() -> None:
    """What is predicted from it teaches coarse box, fractions and the tower before them."""
    aligner, inputs = small(), maps()
    _, box, extras = aligner(*inputs.values(), 0)
    assert reached(box, aligner, inputs) == {"box_align", "box_feature", "fraction_pred", *COARSE}
    assert reached(extras.box_points, aligner, inputs) == {"box_feature", "fraction_pred", *COARSE}


def test_the_coarse_box_does_not_teach_fractions() -> None:
    aligner, inputs = small(), maps()
    _, _, extras = aligner(*inputs.values(), 0)
    assert reached(extras.distances, aligner, inputs) == {"box_feature", *COARSE}


def test_coordinates_pass_gradients_as_differences_tell() -> None:
    """Of the box feature by the coarse box and fractions, of the class feature by its vectors."""
    aligner, inputs = small(channels=2), maps(2, (3, 4))
    upstream = [torch.randn(1, 2, 3, 4, dtype=torch.float64) for _ in range(2)]

    def outputs(biases: dict[str, Tensor]) -> Tensor:
        found = torch.func.functional_call(aligner, biases, (*inputs.values(), 0))
        return torch.stack([(x * y).sum() for x, y in zip(found[:2], upstream, strict=True)])

    names = ("coarse_pred.bias", "fraction_pred.bias", "vector_pred.bias", "scales")
    biases = {name: aligner.get_parameter(name).detach().clone() for name in names}
    for value in biases.values():
        value.requires_grad_()
    found = outputs(biases)
    step = 1e-6
    for name, value in biases.items():
        wanted = torch.zeros(2, value.numel(), dtype=torch.float64)
        for index in range(value.numel()):
            moves = []
            for sign in (1, -1):
                moved = {key: x.detach().clone() for key, x in biases.items()}
                moved[name].view(-1)[index] += sign * step
                moves.append(outputs(moved).detach())
            wanted[:, index] = (moves[0] - moves[1]) / (2 * step)
        if name != "vector_pred.bias":
            assert wanted[0].any(), name  # the class feature would move, and yet teaches nothing
            wanted[0] = 0
        got = [
            torch.autograd.grad(x, value, retain_graph=True, materialize_grads=True)[0].flatten()
            for x in found
        ]
        torch.testing.assert_close(torch.stack(got), wanted, rtol=1e-4, atol=1e-5)


def test_decoded_points_are_for_pictures() -> None:
    model = excite(tiny_model("salt_R_50_FPN_1x"), gain=0.5)
    extras = model.predict([random_input((64, 64), 0)])[2].extras
    assert extras["coarse_boxes"].requires_grad
    assert not extras["box_points"].requires_grad
    assert not extras["class_points"].requires_grad


# --- in the network -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, DensePredictions, DenseTargets]:
    """A tiny SALT-Net, its predictions and targets of a batch with objects."""
    torch.manual_seed(3)
    model = excite(tiny_model("salt_R_50_FPN_1x"), gain=0.5)
    model.head.cls_score.bias.data.zero_()
    inputs = [random_input((128, 160), 12), random_input((128, 160), 6)]
    _, features, predictions = model.predict(inputs)
    targets = model.assigner(features, predictions, [x["instances"] for x in inputs])
    return model, predictions, targets


def parts(model: nn.Module, loss: Tensor) -> set[str]:
    """Parts of the head that a loss reaches, those of its slots by their own names."""
    named = [(n, p) for n, p in model.head.named_parameters()]
    found = torch.autograd.grad(
        loss, [p for _, p in named], retain_graph=True, materialize_grads=True
    )
    names = {n for (n, _), x in zip(named, found, strict=True) if x.any()}
    return {n.split(".")[n.startswith(("aligner.", "predictor."))] for n in names}


BOX_BRANCH = {"bbox_subnet", "fraction_pred", "box_align", *COARSE}
CLASS_BRANCH = {"cls_subnet", "cls_align", "cls_score", *VECTORS}


def test_class_loss_reaches_boxes_through_the_quality_alone(trained: Any) -> None:
    """The statistics of distributions are not detached, and so are the points they come from."""
    model, predictions, targets = trained
    term = model.losses["loss_cls"]
    own = CLASS_BRANCH | {"reg_conf", "bbox_pred"} | BOX_BRANCH
    assert parts(model, term(predictions, targets)) >= own
    sure = predictions._replace(quality=predictions.quality.detach())
    assert parts(model, term(sure, targets)) == CLASS_BRANCH


@pytest.mark.parametrize("name", ["loss_box_reg", "loss_box_distribution"])
def test_final_boxes_teach_the_whole_box_branch(trained: Any, name: str) -> None:
    """Of the two scales one belongs to the predictor; classes learn nothing from boxes."""
    model, predictions, targets = trained
    assert parts(model, model.losses[name](predictions, targets)) == BOX_BRANCH | {"bbox_pred"}


@pytest.mark.parametrize("name", ["loss_box_coarse", "loss_self_distillation"])
def test_coarse_boxes_teach_what_makes_them(trained: Any, name: str) -> None:
    """The better boxes that they learn from do not learn to be like them."""
    model, predictions, targets = trained
    loss = model.losses[name](predictions, targets)
    assert loss > 0
    assert parts(model, loss) == {"bbox_subnet", *COARSE}


def test_scores_and_overlaps_that_weigh_are_detached(trained: Any) -> None:
    model, predictions, targets = trained
    assert type(model.assigner) is GFLAssigner
    for value in (targets.box_weights, targets.quality, targets.box_normalizer):
        assert not value.requires_grad
    score = torch.autograd.grad(
        model.losses["loss_self_distillation"](predictions, targets),
        [predictions.logits, predictions.quality, predictions.boxes],
        retain_graph=True,
        materialize_grads=True,
    )
    assert not any(x.any() for x in score)


def test_only_positives_teach_coarse_boxes(trained: Any) -> None:
    model, predictions, targets = trained
    coarse = coarse_boxes(predictions)
    positive = targets.box_weights > 0
    assert 10 < positive.sum() < positive.numel() / 2
    for name in ("loss_box_coarse", "loss_self_distillation"):
        loss = model.losses[name](predictions, targets)
        (found,) = torch.autograd.grad(loss, coarse, retain_graph=True)
        taught = found.any(-1)
        assert taught.any()
        assert not (taught & ~positive).any()


def test_each_scale_learns_from_its_level() -> None:
    aligner = excite(SALT(channels=WIDTH, num_levels=3))
    extras: list[AlignedPoints] = []
    for level in range(3):
        extras.append(aligner(*[torch.randn(1, WIDTH, 3, 3) for _ in range(3)], level)[2])
    extras[1].distances.sum().backward()
    assert aligner.scales.grad.nonzero().flatten().tolist() == [1]
