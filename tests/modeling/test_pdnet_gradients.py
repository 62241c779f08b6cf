# SPDX-License-Identifier: Apache-2.0
"""Which outputs of the network learn from which loss, channel by channel (fact sheet, 5 to 7).

Channels of ``point_pred``: 0-3 coarse box, 4-7 slides (left, top, right, bottom), 8-25 offsets of
nine semantic points, 26-33 level weights of the four sides, the finer level's before the own.
"""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from pdnet_loops import Kinds
from pdnet_parts import CHANNELS, grid_of, predictor_of, random_maps
from torch import Tensor

from d2_decouple.modeling import PDNetPredictor
from d2_decouple.structures import DensePredictions

COARSE, SLIDES = set(range(4)), set(range(4, 8))
SEMANTIC, MIXING = set(range(8, 26)), set(range(26, 34))
SIZES = [(9, 12), (8, 10), (7, 9), (6, 8), (6, 7)]  # so large that on each level points are inside
LEVELS = len(SIZES)


class Scene:
    """A predictor in float64, its inputs as leaves, and what it predicts."""

    def __init__(self, kinds: Kinds | None = None) -> None:
        self.predictor = predictor_of(kinds or Kinds())
        self.features = [x.requires_grad_() for x in random_maps(SIZES, CHANNELS)]
        classes = random_maps(SIZES, self.predictor.class_outputs)
        self.classes = [x.requires_grad_() for x in classes]
        self.predictions = self.predict()
        starts = torch.tensor([0, *self.predictions.level_sizes]).cumsum(0).tolist()
        self.rows = [slice(*pair) for pair in pairwise(starts)]

    def predict(self) -> DensePredictions:
        return self.predictor(self.classes, self.features, grid_of(SIZES))

    def learning(self, output: Tensor) -> set[int]:
        """Channels of ``point_pred`` that learn from an output."""
        gradient = self.bias_gradient(output)
        return {index for index, value in enumerate(gradient.tolist()) if value != 0}

    def bias_gradient(self, output: Tensor) -> Tensor:
        bias = self.predictor.point_pred.bias
        upstream = torch.randn_like(output)
        return torch.autograd.grad(
            (output * upstream).sum(), bias, retain_graph=True, materialize_grads=True
        )[0]


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_each_loss_reaches_its_own_channels(scene: Scene) -> None:
    predictions = scene.predictions
    assert scene.learning(predictions.extras["coarse_boxes"]) == COARSE
    assert scene.learning(predictions.boxes) == SLIDES | MIXING
    assert scene.learning(predictions.logits) == SEMANTIC


def test_level_weights_of_the_finest_level_do_not_learn(scene: Scene) -> None:
    """It has no finer one, so there is nothing to mix; the others all have."""
    for level, rows in enumerate(scene.rows):
        learning = scene.learning(scene.predictions.boxes[:, rows])
        assert learning == SLIDES | (MIXING if level else set())


def test_a_side_moves_its_own_point_and_weighs_its_own_levels(scene: Scene) -> None:
    for side in range(4):
        learning = scene.learning(scene.predictions.boxes[..., side])
        assert learning == {4 + side, 26 + 2 * side, 27 + 2 * side}


def test_level_weights_of_a_side_are_a_softmax(scene: Scene) -> None:
    """Raising both logits of a side changes nothing: their gradients cancel."""
    gradient = scene.bias_gradient(scene.predictions.boxes)[26:].view(4, 2)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(4).double(), rtol=0, atol=1e-9)
    weights = scene.predictions.extras["box_level_weights"]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert weights[0, scene.rows[0]].unique(dim=0).tolist() == [[[1, 0, 0, 0, 0]] * 4]
    assert (weights[0, scene.rows[2]][..., [1, 2]] > 0).all()
    assert (weights[0, scene.rows[2]][..., [0, 3, 4]] == 0).all()


def test_what_is_drawn_has_no_gradient(scene: Scene) -> None:
    for name in ("boundary_points", "class_points", "box_level_weights"):
        assert not scene.predictions.extras[name].requires_grad, name
    assert scene.predictions.extras["coarse_boxes"].requires_grad


def test_regression_maps_of_both_levels_learn(scene: Scene) -> None:
    """A level's boxes read their own map and the next finer one; no other feature matters to the
    value, while points and weights come from the own feature alone.
    """
    for level, rows in enumerate(scene.rows):
        gradients = torch.autograd.grad(
            scene.predictions.boxes[:, rows].sum(),
            scene.features,
            retain_graph=True,
            materialize_grads=True,
        )
        reached = {index for index, x in enumerate(gradients) if x.abs().sum() > 0}
        assert reached == {level, max(level - 1, 0)}


def test_classes_are_read_on_the_own_level(scene: Scene) -> None:
    for level, rows in enumerate(scene.rows):
        gradients = torch.autograd.grad(
            scene.predictions.logits[:, rows].sum(),
            scene.classes,
            retain_graph=True,
            materialize_grads=True,
        )
        assert [x.abs().sum() > 0 for x in gradients] == [i == level for i in range(LEVELS)]


def test_bbox_pred_and_class_bias_learn(scene: Scene) -> None:
    weight, bias = scene.predictor.bbox_pred.weight, scene.predictor.cls_score.bias
    for side in range(4):
        found = torch.autograd.grad(
            scene.predictions.boxes[..., side].sum(), weight, retain_graph=True
        )[0]
        reached = found.abs().flatten(1).sum(1) > 0
        assert reached.tolist() == [index == side for index in range(4)]
    gradient = torch.autograd.grad(scene.predictions.logits.sum(), bias)[0]
    assert gradient.tolist() == [scene.predictions.logits.shape[1]] * len(bias)


OUTPUTS: dict[str, tuple[Callable[[DensePredictions], Tensor], set[int]]] = {
    "semantic offsets": (lambda x: x.logits, SEMANTIC),
    "level weights": (lambda x: x.boxes, MIXING),
    "coarse box": (lambda x: x.extras["coarse_boxes"], COARSE),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_gradients_are_differences(scene: Scene, name: str) -> None:
    """Where no gradient is stopped, it is what a small step of the bias does."""
    output, channels = OUTPUTS[name]
    check_differences(scene, output, sorted(channels))


def check_differences(
    scene: Scene, output: Callable[[DensePredictions], Tensor], channels: list[int]
) -> None:
    bias, step = scene.predictor.point_pred.bias, 1e-8  # so short that no point passes a cell
    upstream = torch.randn_like(output(scene.predictions))
    exact = torch.autograd.grad((output(scene.predictions) * upstream).sum(), bias)[0]
    for channel in channels:
        totals = []
        for sign in (1, -1):
            with torch.no_grad():
                bias[channel] += sign * step
                totals.append((output(scene.predict()) * upstream).sum().item())
                bias[channel] -= sign * step
        difference = (totals[0] - totals[1]) / (2 * step)
        assert exact[channel].item() == pytest.approx(difference, rel=1e-4, abs=1e-4), channel


def test_gradient_of_slides_within_their_limits() -> None:
    scene = Scene()
    with torch.no_grad():  # upright boxes, several cells large, and slides that are short
        scene.predictor.point_pred.weight.mul_(0.1)
        scene.predictor.point_pred.bias.copy_(0.2 * torch.randn(34))
    scene.predictions = scene.predict()
    check_differences(scene, lambda x: x.boxes, sorted(SLIDES))


def test_slides_beyond_their_limits_learn_as_if_there_were_none() -> None:
    """The point stays where the limit put it, and learns from the slope there."""
    scene = Scene(Kinds(box_levels=(0,)))
    bias = scene.predictor.point_pred.bias
    with torch.no_grad():
        scene.predictor.point_pred.weight.mul_(0.1)
        bias.zero_()
        bias[4:8] = 20.0
    beyond = scene.predict()
    gradient = torch.autograd.grad(beyond.boxes.sum(), bias)[0][4:8]
    with torch.no_grad():
        bias[4:8] = 40.0
    torch.testing.assert_close(scene.predict().boxes, beyond.boxes)
    assert (gradient != 0).all()


def test_points_that_do_not_move_learn_nothing() -> None:
    """Without decoupling, only coarse boxes come from this convolution."""
    scene = Scene(Kinds(box="grid", cls="grid", num_points=1, box_levels=(0,)))
    assert scene.predictor.point_pred.out_channels == 4
    for output in (scene.predictions.boxes, scene.predictions.logits):
        assert scene.learning(output) == set()
    assert scene.learning(scene.predictions.extras["coarse_boxes"]) == COARSE
    midpoints = Scene(Kinds(box="midpoints"))
    assert midpoints.learning(midpoints.predictions.boxes) == set(range(22, 30))  # the weights


def test_every_parameter_learns() -> None:
    predictor: PDNetPredictor = Scene().predictor
    classes, features = random_maps(SIZES, predictor.class_outputs), random_maps(SIZES, CHANNELS)
    predictions = predictor(classes, features, grid_of(SIZES))
    total = predictions.boxes.sum() + predictions.logits.sum()
    total = total + predictions.extras["coarse_boxes"].sum()
    total.backward()
    for name, parameter in predictor.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.flatten(1) if parameter.dim() > 1 else parameter.grad).any(), name
