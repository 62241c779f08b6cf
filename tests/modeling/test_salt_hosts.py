# SPDX-License-Identifier: Apache-2.0
"""SALT, and free points, in the slot of every host: they train, and the pictures find them."""

from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import transforms as T
from torch import nn
from util import WIDTH, excite, loss_sum, make_instances, random_input, tiny, without_gradient

from d2_decouple.config import get_config
from d2_decouple.engine.predictor import Predictor
from d2_decouple.modeling import TSCODE, GIoUTerm, TSCODEOptions, coarse_boxes, predicted_boxes
from d2_decouple.modeling.free_points import FreePoints
from d2_decouple.modeling.salt import SALT, SALTOptions, SelfDistillationTerm
from d2_decouple.visualization import draw_points

HOSTS = ["fcos", "atss", "gfl", "gflv2"]
CHANNELS = "${...backbone.out_channels}"
BATCHES = {
    "half empty": [((64, 96), 3), ((64, 96), 0)],
    "odd sizes": [((33, 47), 0), ((101, 67), 4), ((1, 1), 0)],
    "no objects": [((64, 64), 0), ((40, 64), 0)],
}


def aligned(kind: Any = SALT, **options: Any) -> Any:
    """What a recipe says."""

    def change(model: Any) -> None:
        levels = {"num_levels": 5} if kind is SALT else {}
        model.head.aligner = L(kind)(channels=CHANNELS, **levels, **options)
        model.losses.loss_box_coarse = L(GIoUTerm)(boxes=coarse_boxes)
        score = "${...selection.score}"
        model.losses.loss_self_distillation = L(SelfDistillationTerm)(score=score)

    return change


def below_tscode(**options: Any) -> Any:
    def change(model: Any) -> None:
        model.head.context = L(TSCODE)(channels=WIDTH, options=L(TSCODEOptions)(**options))
        model.head_in_features = ["res2", *model.head_in_features]

    return change


def tiny_host(host: str, *changes: Any) -> nn.Module:
    """A host's shrunken detector after the functions ``model -> None``, drawn from one seed."""
    cfg = tiny(get_config(f"{host}_R_50_FPN_1x"))
    for change in changes:
        change(cfg.model)
    torch.manual_seed(7)
    return instantiate(cfg.model)


COMPOSITIONS = {
    **{f"SALT on {host}": (host, aligned()) for host in HOSTS},
    **{
        f"SALT and DPE on {host}": (host, below_tscode(use_sce=False), aligned())
        for host in ("fcos", "gflv2")
    },
    **{f"free points on {host}": (host, aligned(FreePoints)) for host in ("fcos", "gflv2")},
}


@pytest.fixture(params=COMPOSITIONS)
def composed(request: pytest.FixtureRequest) -> nn.Module:
    host, *changes = COMPOSITIONS[request.param]
    return tiny_host(host, *changes)


def test_trains_with_every_kind_of_batch(composed: nn.Module) -> None:
    """Also when nobody has an object; the new losses are then zero, not undefined."""
    for prepare in (lambda model: model, lambda model: excite(model, gain=0.5)):
        prepare(composed)
        for case, batch in BATCHES.items():
            composed.zero_grad()
            losses = composed([random_input(*item) for item in batch])
            assert all(torch.isfinite(loss) for loss in losses.values()), losses
            assert (losses["loss_box_coarse"] == 0) == (case == "no objects")
            if case == "no objects":
                assert losses["loss_self_distillation"] == 0
            loss_sum(losses).backward()
            assert without_gradient(composed) == []


def test_every_part_moves(composed: nn.Module) -> None:
    """Not only a gradient, but one that is not zero."""
    excite(composed, gain=0.5)
    loss_sum(composed([random_input((128, 160), 12), random_input((128, 160), 6)])).backward()
    assert [n for n, p in composed.named_parameters() if p.requires_grad and not p.grad.any()] == []


def test_a_step_in_bfloat16(composed: nn.Module) -> None:
    """Losses near those of float32, and every parameter has a finite gradient."""
    inputs = [random_input((64, 96), 3), random_input((64, 64), 0)]
    exact = {term: loss.item() for term, loss in composed(inputs).items()}
    with torch.autocast("cpu", torch.bfloat16):
        losses = composed(inputs)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    found = {term: loss.item() for term, loss in losses.items()}
    assert found == pytest.approx(exact, rel=0.05, abs=0.02)
    loss_sum(losses).backward()
    assert without_gradient(composed) == []


@torch.no_grad()
def test_extras_are_pixels_of_every_prediction(composed: nn.Module) -> None:
    """In a level's own cells they lie where the aligner read, whatever the host's offset."""
    excite(composed, gain=0.5).eval()
    seen: list[Any] = []
    composed.head.aligner.register_forward_hook(lambda _, inputs, out: seen.append(out[2]))
    predictions = composed.predict([random_input((64, 96), 0), random_input((64, 96), 0)])[2]
    names = {name for name in predictions.extras if name.endswith("points")}
    free = isinstance(composed.head.aligner, FreePoints)
    assert names == ({"free_points"} if free else {"box_points", "class_points"})
    assert predictions.extras["coarse_boxes"].shape == predictions.boxes.shape
    for name in names:
        points = predictions.extras[name]
        assert points.shape == (*predictions.boxes.shape[:2], 9, 2)
        cells = points - predictions.locations[:, None]
        cells = cells / predictions.strides[:, None, None]
        wanted = [(level if free else getattr(level, name)).flatten(1, 2) for level in seen]
        torch.testing.assert_close(cells, torch.cat(wanted, 1), rtol=1e-4, atol=1e-4)
    points = predictions.extras["free_points" if free else "box_points"]
    low, high = points.amin(2), points.amax(2)
    coarse = predictions.extras["coarse_boxes"]
    torch.testing.assert_close(coarse, torch.cat((low, high), -1), rtol=1e-4, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("host", HOSTS)
def test_the_plug_in_adds_parameters_and_renames_nothing(host: str) -> None:
    plain, model = tiny_host(host), tiny_host(host, aligned())
    names, own = plain.state_dict().keys(), model.state_dict().keys()
    assert names <= own
    assert all(name.startswith("head.aligner.") for name in own - names)
    inputs = [random_input((64, 96), 3)]
    added = model(inputs).keys() - plain(inputs).keys()
    assert added == {"loss_box_coarse", "loss_self_distillation"}


@torch.no_grad()
def test_boxes_of_either_stage_are_selected() -> None:
    """S1 and S2 of the paper: the same scores, other boxes."""
    model = excite(tiny_host("gflv2", aligned()), gain=0.5).eval()
    model.head.cls_score.bias.zero_()
    inputs = [random_input((96, 128), 0)]
    images, features, predictions = model.predict(inputs)
    for boxes, wanted in (
        (predicted_boxes, predictions.boxes),
        (coarse_boxes, predictions.extras["coarse_boxes"]),
    ):
        model.selection.boxes = boxes
        (found,) = model.forward_inference(images, features, predictions)
        assert len(found) > 5
        chosen = wanted[0, found.location_index]
        limits = torch.tensor([128, 96, 128, 96])
        torch.testing.assert_close(
            found.pred_boxes.tensor, torch.minimum(chosen.clamp(min=0), limits)
        )
        scores = model.selection.score(predictions)[0]
        assert torch.equal(found.scores, scores[found.location_index, found.pred_classes])


@pytest.mark.parametrize("kind", [SALT, FreePoints])
@pytest.mark.parametrize("host", ["fcos", "gflv2"])
def test_with_semantic_context_it_says_why_not(host: str, kind: Any) -> None:
    message = rf"{kind.__name__} samples both tasks.*TSCODE makes.*1/2.*box half alone"
    with pytest.raises(ValueError, match=message):
        tiny_host(host, below_tscode(), aligned(kind))


def test_channels_that_do_not_fit_are_named_by_the_first_forward() -> None:
    model = tiny_host("gflv2", aligned())
    model.head.aligner.channels = 96
    with pytest.raises(ValueError, match=r"class tower has 64 channels, SALT expects 96"):
        model([random_input((64, 64), 1)])


def test_free_points_learn_slowly_from_what_is_read_there() -> None:
    """A tenth of the gradient through the features; the whole of the coarse box's own."""
    torch.manual_seed(2)
    whole = excite(FreePoints(channels=3, norm="", gradient_factor=1.0)).double()
    tenth = FreePoints(channels=3, norm="").double()
    tenth.load_state_dict(whole.state_dict())
    maps = [torch.rand(1, 3, 4, 5, dtype=torch.float64) for _ in range(3)]
    found = []
    for aligner in (whole, tenth):
        cls, box, points = aligner(*maps, 0)
        through = torch.autograd.grad(
            cls.sum() + 2 * box.sum(), aligner.point_pred.bias, retain_graph=True
        )
        own = torch.autograd.grad(points.square().sum(), aligner.point_pred.bias)
        found.append((cls, box, points, through[0], own[0]))
    for ours, theirs in zip(found[0][:3], found[1][:3], strict=True):
        assert torch.equal(ours, theirs)
    assert found[0][3].abs().max() > 0.1
    torch.testing.assert_close(found[1][3], found[0][3] / 10)
    torch.testing.assert_close(found[1][4], found[0][4])


def test_few_positives_and_small_levels_train_together() -> None:
    """One object in all, on maps of which all but two have fewer than nine cells."""
    model = tiny_host("gflv2", aligned())
    item = random_input((64, 64), 0)
    item["instances"] = make_instances((64, 64), [[5, 3, 62, 58]], [1])
    losses = model([item])
    assert losses["loss_box_coarse"] > 0
    loss_sum(losses).backward()
    assert without_gradient(model) == []


@pytest.mark.parametrize("name", ["salt_R_18_FPN_bccd", "salt_R_18_FPN_bccd_free"])
def test_points_are_drawn(name: str) -> None:
    """Those of the detections, in pixels of the image, in the picture's legend and panels."""
    torch.manual_seed(0)
    model = excite(instantiate(tiny(get_config(name)).model), 0.5)
    model.head.cls_score.bias.data.zero_()
    predictor = Predictor(model, augmentations=[T.ResizeShortestEdge(96, 160)], device="cpu")
    image = np.random.default_rng(0).integers(256, size=(75, 110, 3), dtype=np.uint8)
    seen = predictor.points(image)
    found = seen.instances
    assert len(found) > 5
    with torch.no_grad():
        predictions = predictor.model.predict([predictor._input(image)])[2]
    scale = torch.tensor([110 / 141, 75 / 96])
    for kind in [x for x in predictions.extras if x.endswith("points")]:
        wanted = predictions.extras[kind][0, found.location_index] * scale
        torch.testing.assert_close(found.get(kind), wanted)
    picture = draw_points(image, seen, ["a", "b", "c"], limit=2)
    found.remove(kind)
    without = draw_points(image, seen, ["a", "b", "c"], limit=2)
    assert picture.shape != without.shape or (picture != without).any()


def test_options_reach_the_aligner() -> None:
    options = L(SALTOptions)(class_points="free", use_skip=False)
    model = tiny_host("gflv2", aligned(num_points=5, options=options))
    assert model.head.aligner.options == SALTOptions(class_points="free", use_skip=False)
    assert model.head.aligner.fraction_pred.out_channels == 6
    loss_sum(model([random_input((64, 96), 3)])).backward()
    assert without_gradient(model) == []
