# SPDX-License-Identifier: Apache-2.0
"""TSCODE's ablations against their formulas, and what it says about wrong input."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import instantiate
from omegaconf import OmegaConf
from standins import IdentityAligner
from test_tscode import STRIDES, plain, random_maps, tiny_host, with_tscode
from torch import Tensor, nn
from tscode_loops import (
    FORMULAS,
    Map,
    Pyramid,
    average,
    greatest,
    second_cells,
    semantics,
    strided,
)
from util import WIDTH, loss_sum, make_instances, random_input, tiny, without_gradient

from d2_decouple.config import get_config
from d2_decouple.modeling import (
    FPN,
    TSCODE,
    ATSSPredictor,
    ClassPredictor,
    DenseHead,
    FCOSPredictor,
    TSCODEOptions,
)

DOUBLE = torch.float64


def check(found: list[Tensor], wanted: list[Map]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, torch.tensor([other], dtype=DOUBLE))


def lists(maps: list[Tensor]) -> list[Map]:
    return [x[0].tolist() for x in maps]


def convolved(conv: nn.Conv2d, relu: bool = True) -> Any:
    return lambda x: strided(x, conv.weight, conv.bias, relu)


# --- DPE ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("terms", FORMULAS, ids="+".join)
def test_chosen_terms(terms: tuple[str, ...]) -> None:
    context = plain(use_sce=False, dpe_terms=terms)
    finer = "low" in terms
    assert (context.finer_levels, context.options.reads_finer) == (int(finer), finer)
    assert bool(list(context.parameters())) == finer
    low, *levels = maps = random_maps(2)
    classes, found = context(maps if finer else levels)
    assert all(one is other for one, other in zip(classes, levels, strict=True))
    down = convolved(context.dpe_down[0]) if finer else (lambda x: x)
    pyramid = Pyramid(lists([low])[0], lists(levels), down)
    check(found, [FORMULAS[terms](pyramid, index) for index in range(5)])


def test_chosen_terms_of_a_configuration_file() -> None:
    """There they are one of OmegaConf's lists, in any order."""
    terms = OmegaConf.create(["low", "up1", "self"])
    found, wanted = (
        TSCODE(channels=64, options=TSCODEOptions(dpe_terms=x)) for x in (terms, ("self", "low"))
    )
    assert found.finer_levels == wanted.finer_levels == 1


@torch.no_grad()
def test_bilinear_enlargement_by_hand() -> None:
    """Two cells 0 and 4 become 0, 1, 3, 4: cells lie a quarter of a coarse one off its middle."""
    context = plain(use_sce=False, dpe_terms=("self", "up1"), upsample="bilinear")
    levels = [
        torch.zeros(1, 2, 2, 4).double(),
        torch.tensor([0.0, 4.0]).double().expand(1, 2, 1, 2),
    ]
    assert context(levels)[1][0][0].tolist() == [[[0, 1, 3, 4]] * 2] * 2
    nearest = plain(use_sce=False, dpe_terms=("self", "up1"))
    assert nearest(levels)[1][0][0].tolist() == [[[0, 0, 4, 4]] * 2] * 2


@torch.no_grad()
def test_as_a_neck_both_tasks_read_the_detail() -> None:
    """Table 6: DPE's output for classes too, which keep the host's tower and predictor."""
    context = plain(use_sce=False, dpe_as_neck=True)
    maps = random_maps(2)
    classes, boxes = context(maps)
    assert all(one is other for one, other in zip(classes, boxes, strict=True))
    pyramid = Pyramid(*(lists(maps)[0], lists(maps)[1:]), convolved(context.dpe_down[0]))
    formula = FORMULAS["self", "up1", "low"]
    check(boxes, [formula(pyramid, index) for index in range(5)])
    assert type(context.class_predictor(2, 3, 3, True)) is ClassPredictor


# --- SCE ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("kind", ["conv", "avg", "max"])
@pytest.mark.parametrize("upper", [True, False])
def test_what_halves_the_size(kind: str, kernel: int, upper: bool) -> None:
    context = plain(use_dpe=False, sce_down=kind, sce_kernel=kernel, sce_use_upper=upper)
    levels = random_maps(2)[1:]
    classes, boxes = context(levels)
    assert boxes == levels
    if kind == "conv":
        halve = convolved(context.sce_down[0])
    else:
        assert not list(context.sce_down.parameters())
        pool = {"avg": average, "max": greatest}[kind]

        def halve(x: Map) -> Map:
            return pool(x, kernel)

    reduced = [halve(x) for x in lists(levels)]
    assert context.cls_channels == (4 if upper else 2)
    if not upper:
        assert not hasattr(context, "sce_top")
        return check(classes, reduced)
    top = convolved(context.sce_top, relu=False)(lists(levels)[-1])
    return check(classes, semantics(lists(levels), reduced, top))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["maxpool", "dup", "zeros"])
def test_what_stands_above_the_last_level(kind: str) -> None:
    context = plain(use_dpe=False, top_level=kind)
    assert [name for name, _ in context.named_children()] == ["sce_down"]
    levels = random_maps(2, sizes=[(11, 9), (6, 5), (3, 3)])
    reduced = [convolved(context.sce_down[0])(x) for x in lists(levels)]
    top = {
        "maxpool": second_cells(lists(levels)[-1]),
        "dup": reduced[-1],
        "zeros": torch.zeros(2, 2, 2).tolist(),
    }[kind]
    check(context(levels)[0], semantics(lists(levels), reduced, top))


@torch.no_grad()
def test_levels_that_are_not_rounded_up_are_fitted() -> None:
    """P_{l+1} of 2 x 2 cells under a P_l of 5 x 5, as a network without padding makes it."""
    context = plain(use_dpe=False)
    levels = random_maps(2, sizes=[(5, 5), (2, 2)])
    classes, _ = context(levels)
    assert [x.shape[-2:] for x in classes] == [(3, 3), (1, 1)]
    rows = torch.tensor([0, 0, 1])
    assert torch.equal(classes[0][:, 2:], levels[1][..., rows[:, None], rows])


@pytest.mark.parametrize("norm", ["GN", ""])
@pytest.mark.parametrize("act", [True, False])
def test_norm_and_activation_of_the_convolutions(norm: str, act: bool) -> None:
    context = TSCODE(channels=64, options=TSCODEOptions(down_norm=norm, down_act=act))
    wanted = [nn.Conv2d, *[nn.GroupNorm] * bool(norm), *[nn.ReLU] * act]
    for part in (context.sce_down, context.dpe_down):
        assert len(part) == len(wanted)
        assert all(isinstance(x, kind) for x, kind in zip(part, wanted, strict=True))
        assert (part[0].bias is None) == bool(norm)


# --- the finer map ------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("finer", "wanted", "projected"),
    [(2, "auto", False), (3, "auto", True), (2, "always", True), (2, "never", False)],
)
def test_projection_of_the_finer_map(finer: int, wanted: str, projected: bool) -> None:
    options = TSCODEOptions(use_sce=False, down_norm="", c2_projection=wanted)
    context = TSCODE(channels=2, finer_channels=finer, options=options).double()
    for parameter in context.parameters():
        nn.init.normal_(parameter, std=0.5)
    projection = context.c2_projection
    assert isinstance(projection, nn.Conv2d) == projected
    c2, *levels = [*random_maps(finer)[:1], *random_maps(2)[1:]]
    low = c2
    if projected:
        assert projection.weight.shape == (2, finer, 1, 1)
        low = F.conv2d(c2, projection.weight, projection.bias)
    pyramid = Pyramid(lists([low])[0], lists(levels), convolved(context.dpe_down[0]))
    formula = FORMULAS["self", "up1", "low"]
    check(context([c2, *levels])[1], [formula(pyramid, index) for index in range(5)])


def test_a_projection_that_is_forbidden_and_needed() -> None:
    options = TSCODEOptions(c2_projection="never")
    with pytest.raises(ValueError, match=r"32 channels, the pyramid 64.*c2_projection=auto"):
        TSCODE(channels=64, finer_channels=32, options=options)
    TSCODE(channels=64, finer_channels=32, options=TSCODEOptions(use_dpe=False))


def test_finer_map_of_other_channels_in_a_detector() -> None:
    """The error names the key; with it, the map is projected."""
    cfg = tiny(get_config("fcos_R_50_FPN_1x"))
    with_tscode()(cfg.model)
    cfg.model.backbone.out_channels = cfg.model.head.context.channels = 96
    cfg.model.head.predictor.in_channels = cfg.model.head.box_conv_dims[0]
    with pytest.raises(ValueError, match=r"'res2': 64.*TSCODE expects 96; set") as error:
        instantiate(cfg.model)
    key, value = re.findall(r"set (\S+)=(\d+)", str(error.value))[0]
    assert key == "model.head.context.finer_channels"
    cfg.model.head.context.finer_channels = int(value)
    model = instantiate(cfg.model)
    assert model.head.context.c2_projection.weight.shape == (96, 64, 1, 1)
    loss_sum(model([random_input((64, 96), 3)])).backward()
    assert without_gradient(model) == []


def test_sizes_that_do_not_fit_are_named() -> None:
    """The maps of two levels in the other's place, or one that is not twice as large."""
    context = plain()
    c2, p3, *rest = random_maps(2)
    for wrong, message in [
        ([p3, c2, *rest], r"level of \(21, 18\) cells has a map of \(11, 9\)"),
        ([rest[0], *rest], r"level of \(6, 5\) cells.*\(6, 5\).*twice.*head_in_features"),
        # Such maps could be added: one cell fits to any size.
        ([c2, p3, *rest[:3], rest[2]], r"level of \(2, 2\) cells has a map of \(2, 2\)"),
        ([c2, p3, *rest[:2], rest[3]], r"level of \(1, 1\) cells has a map of \(3, 3\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            context(wrong)


# --- detectors ----------------------------------------------------------------------------------


def test_forgotten_res2_names_the_key() -> None:
    def forgetful(model: Any) -> None:
        with_tscode()(model)
        model.head_in_features = [name for name in model.head_in_features if name != "res2"]

    with pytest.raises(ValueError, match=r"model\.head_in_features.*1 finer maps for TSCODE.*res2"):
        tiny_host("fcos", forgetful)


def test_superfluous_res2_names_the_key() -> None:
    def too_many(model: Any) -> None:
        with_tscode(use_dpe=False)(model)
        model.head_in_features = ["res2", *model.head_in_features]

    with pytest.raises(ValueError, match=r"model\.head_in_features.*0 finer maps for TSCODE"):
        tiny_host("fcos", too_many)


def test_backbone_without_res2_names_it() -> None:
    def kept_back(model: Any) -> None:
        with_tscode()(model)
        model.backbone.passed_on = []

    with pytest.raises(ValueError, match=r"names \['res2'\], the backbone gives .*'p7'"):
        tiny_host("fcos", kept_back)

    bottom_up = instantiate(tiny(get_config("fcos_R_50_FPN_1x")).model.backbone.bottom_up)
    bottom_up._out_features = ["res3", "res4", "res5"]
    with pytest.raises(ValueError, match=r"\['res2'\] shall be passed on.*out_features"):
        FPN(bottom_up, in_features=["res3", "res4", "res5"], out_channels=64)


def test_a_hosts_checkpoint_gives_all_but_the_class_half() -> None:
    """The class tower has other shapes: it is left out and starts anew."""
    host, model = tiny_host("atss"), tiny_host("atss", with_tscode())
    found = model.load_state_dict(host.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert {name.rsplit(".", 1)[0] for name in found.missing_keys} == {
        *("head.cls_subnet.0", "head.cls_score"),
        *(f"head.context.{part}.{k}" for part in ("sce_down", "dpe_down") for k in (0, 1)),
        "head.context.sce_top",
    }
    shared = [name for name in host.state_dict() if name not in found.missing_keys]
    assert all(torch.equal(model.state_dict()[x], host.state_dict()[x]) for x in shared)


def test_swapped_maps_are_noticed() -> None:
    def swapped(model: Any) -> None:
        with_tscode()(model)
        model.head_in_features = ["p3", "res2", "p4", "p5", "p6", "p7"]

    with pytest.raises(ValueError, match=r"\(4, 16, 32, 64, 128\).*\(8, 16, 32, 64, 128\)"):
        tiny_host("fcos", swapped)


def test_an_aligner_wants_full_resolution() -> None:
    def arguments(**options: Any) -> dict[str, Any]:
        return {
            "context": TSCODE(channels=WIDTH, options=TSCODEOptions(**options)),
            "predictor": FCOSPredictor(num_classes=3, in_channels=WIDTH),
            "strides": STRIDES,
            "offset": 0.5,
            "cls_conv_dims": [],
            "box_conv_dims": [],
            "aligner": IdentityAligner(),
        }

    message = r"IdentityAligner samples both tasks.*TSCODE makes class features at 1/2.*box half"
    with pytest.raises(ValueError, match=message):
        DenseHead(**arguments())
    assert DenseHead(**arguments(use_sce=False)).aligner is not None


@pytest.mark.parametrize("count", [2, 3, 6, 7])
def test_any_number_of_levels(count: int) -> None:
    sizes = [(-(-64 >> k), -(-96 >> k)) for k in range(count + 2)]
    head = DenseHead(
        context=TSCODE(channels=WIDTH),
        predictor=ATSSPredictor(num_classes=3, in_channels=WIDTH, num_levels=count),
        strides=[8 << k for k in range(count)],
        offset=0.0,
        cls_conv_dims=[WIDTH],
        box_conv_dims=[WIDTH],
    )
    *maps, further = [x.float() for x in random_maps(WIDTH, sizes=sizes)]
    predictions = head(maps)
    assert predictions.level_sizes == tuple(h * w for h, w in sizes[1:-1])
    for wrong in ([*maps, further], maps[1:], maps[:-1]):
        with pytest.raises(ValueError):  # noqa: PT011 - whatever words, it must not go on
            head(wrong)


@pytest.mark.parametrize("host", ["fcos", "atss"])
def test_three_levels_in_a_detector(host: str) -> None:
    def fewer(model: Any) -> None:
        with_tscode()(model)
        model.head_in_features = ["res2", "p3", "p4", "p5"]
        model.head.strides = [8, 16, 32]

    if host == "atss":
        with pytest.raises(ValueError, match=r"5 levels and got 3.*predictor\.num_levels=3"):
            tiny_host(host, fewer)([random_input((64, 64), 1)])

    def with_scales(model: Any) -> None:
        fewer(model)
        if host == "atss":
            model.head.predictor.num_levels = 3

    model = tiny_host(host, with_scales)
    one = random_input((64, 96), 0)
    one["instances"] = make_instances((64, 96), [[8, 8, 40, 40]], [1])
    loss_sum(model([one])).backward()
    assert without_gradient(model.head) == []


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sce_down": "pool"}, r"sce_down is 'pool'; wanted is one of \('conv', 'avg', 'max'\)"),
        ({"sce_kernel": 4}, r"sce_kernel is 4; wanted is one of \(3, 5, 7\)"),
        ({"top_level": "p8"}, r"top_level is 'p8'.*'maxpool'"),
        ({"upsample": "bicubic"}, r"upsample is 'bicubic'.*'nearest'"),
        ({"c2_projection": True}, r"c2_projection is True.*'auto'"),
        ({"dpe_terms": ()}, r"dpe_terms is \[\].*'self' or 'low'"),
        ({"dpe_terms": ("up1",)}, r"dpe_terms is \['up1'\].*'self' or 'low'"),
        ({"dpe_terms": ("self", "self")}, r"dpe_terms.*each once"),
        ({"dpe_terms": ("self", "down1")}, r"dpe_terms.*'down1'.*some of"),
        ({"dpe_terms": "self"}, r"dpe_terms is \['s', 'e'"),
        ({"dpe_as_neck": True}, r"dpe_as_neck.*use_sce=False, not with.*use_sce=True"),
        ({"dpe_as_neck": True, "use_sce": False, "use_dpe": False}, r"not with use_dpe=False"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TSCODEOptions(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"use_sce": False, "dpe_as_neck": True},
        {"dpe_terms": ["self", "up1"]},
        {"dpe_terms": ["self", "up1", "up2", "low"], "upsample": "bilinear"},
        {"sce_down": "max", "sce_kernel": 5, "top_level": "zeros"},
        {"sce_use_upper": False, "down_norm": "", "c2_projection": "always"},
    ],
    ids=lambda options: " ".join(options),
)
def test_every_variant_trains(options: dict[str, Any]) -> None:
    model = tiny_host("fcos", with_tscode(**options))
    loss_sum(model([random_input((64, 96), 3), random_input((33, 47), 0)])).backward()
    assert without_gradient(model) == []
