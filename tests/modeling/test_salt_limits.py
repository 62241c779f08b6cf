# SPDX-License-Identifier: Apache-2.0
"""SALT where numbers are large, zero or of half precision, and parts that do not fit."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from util import WIDTH, excite

from d2_decouple.layers.points import make_grid
from d2_decouple.modeling import DenseHead, GFLv2Predictor, SharedContext
from d2_decouple.modeling.free_points import FreePoints
from d2_decouple.modeling.salt import SALT, SALTOptions

STRIDES = [8, 16, 32, 64, 128]


def random_maps(size: tuple[int, int], channels: int = WIDTH) -> list[Tensor]:
    return [torch.randn(2, channels, *size, requires_grad=True) for _ in range(3)]


def planted(class_points: str = "product", vector: float = 0.0, side: float = 2.0) -> SALT:
    """Every side and every vector the same at all cells."""
    aligner = SALT(channels=WIDTH, num_levels=1, options=SALTOptions(class_points=class_points))
    for conv, bias in ((aligner.coarse_pred, side), (aligner.vector_pred, vector)):
        nn.init.zeros_(conv.weight)
        nn.init.constant_(conv.bias, bias)
    return aligner


def backward(aligner: nn.Module, maps: list[Tensor]) -> Any:
    """The extras; everything that came out and every gradient is finite."""
    cls, box, extras = aligner(*maps, 0)
    grid = make_grid([maps[0].shape[-2:]], [128], 0.0, device=cls.device, dtype=torch.float32)
    decoded = aligner.decode([extras], grid)
    values = [cls, box, *decoded.values(), *(extras if isinstance(extras, tuple) else [extras])]
    assert all(torch.isfinite(x).all() for x in values)
    (cls.square().sum() + box.square().sum() + decoded["coarse_boxes"].sum()).backward()
    for name, parameter in aligner.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert all(x.grad is None or torch.isfinite(x.grad).all() for x in maps)
    return extras


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", [15.0, 60.0, 1e4, 1e30])
def test_large_vectors_stay_finite(vector: float) -> None:
    """Points beyond any map: nothing is read there, and nothing overflows on the way to pixels."""
    maps = random_maps((5, 6))
    extras = backward(planted(vector=vector), maps)
    away = extras.class_points[..., :2, :].abs().amax(-1)
    assert (away > 1e5).all()


@pytest.mark.parametrize("vector", [-1e30, -200.0, -30.0])
def test_small_vectors_bring_points_to_the_cell(vector: float) -> None:
    extras = backward(planted(vector=vector), random_maps((5, 6)))
    assert extras.class_points.abs().max() < 1e-6


@pytest.mark.parametrize("vector", [-5.0, 0.0, 3.0, 11.0, 20.0, 31.5])
def test_ordinary_vectors_are_not_changed(vector: float) -> None:
    """Up to points a thousand million times as far away as the box's."""
    aligner = planted(vector=vector).double()
    points = torch.randn(2, 3, 3, 9, 2, dtype=torch.float64)
    found = aligner._class_points(torch.randn(2, WIDTH, 3, 3, dtype=torch.float64), points)
    torch.testing.assert_close(found, points * math.exp(vector), rtol=1e-12, atol=0)


@pytest.mark.parametrize("class_points", ["product", "sum", "free"])
@pytest.mark.parametrize("sides", [(0, 0, 0, 0), (0, 3, 0, 3), (2, 0, 0, 0), (0, 0, 0, 4)])
def test_sides_of_zero(sides: tuple[float, ...], class_points: str) -> None:
    """Points collapse onto a line or onto the cell, also under large vectors."""
    aligner = planted(class_points, vector=50.0)
    aligner.coarse_pred.bias.data = torch.tensor(sides, dtype=torch.float32) - 1e-9
    extras = backward(aligner, random_maps((3, 4)))
    width, height = sides[0] + sides[2], sides[1] + sides[3]
    for axis, size in enumerate((width, height)):
        assert extras.box_points[..., axis].any() == (size > 0)
        if class_points == "product" and not size:
            assert not extras.class_points[..., axis].any()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 2), (2, 4)])
@pytest.mark.parametrize("kind", [SALT, FreePoints])
def test_fewer_cells_than_points(size: tuple[int, int], kind: Any) -> None:
    levels = {"num_levels": 1} if kind is SALT else {}
    aligner = excite(kind(channels=WIDTH, **levels))
    backward(aligner, random_maps(size))


@pytest.mark.parametrize("num_points", [4, 6, 16])
@pytest.mark.parametrize("class_points", ["product", "sum", "free", "box"])
def test_every_variant_trains(num_points: int, class_points: str) -> None:
    options = SALTOptions(class_points=class_points)
    aligner = SALT(channels=WIDTH, num_levels=1, num_points=num_points, options=options)
    backward(excite(aligner, gain=0.5), random_maps((4, 5)))


# --- half precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("class_points", ["product", "sum", "free", "box"])
def test_coordinates_are_those_of_float32(class_points: str) -> None:
    """From the bfloat16 maps on that they are predicted from, to the last bit."""
    options = SALTOptions(class_points=class_points)
    aligner = excite(SALT(channels=WIDTH, num_levels=1, options=options), gain=0.5)
    hidden: dict[str, Tensor] = {}
    for name in ("coarse_subnet", "vector_subnet"):
        if hasattr(aligner, name):
            keep = lambda _, inputs, out, name=name: hidden.update({name: out})  # noqa: E731
            getattr(aligner, name).register_forward_hook(keep)
    maps = [x.detach() for x in random_maps((9, 12))]
    with torch.no_grad():
        exact_cls, exact_box, exact = aligner(*maps, 0)
        with torch.autocast("cpu", torch.bfloat16):
            cls, box, extras = aligner(*maps, 0)
        assert {x.dtype for x in extras} == {torch.float32}
        given = hidden["coarse_subnet"].float()
        distances = aligner.coarse_pred(given).relu().permute(0, 2, 3, 1)
        fractions = aligner.fraction_pred(given).sigmoid().permute(0, 2, 3, 1)
        assert torch.equal(extras.distances, distances)
        assert torch.equal(extras.fractions, fractions)
        if class_points == "product":
            vectors = aligner.vector_pred(hidden["vector_subnet"].float()).permute(0, 2, 3, 1)
            scaled = vectors.unflatten(-1, (9, 2)).exp() * extras.box_points
            assert torch.equal(extras.class_points, scaled)
    assert not torch.equal(extras.distances, exact.distances)  # the maps were not float32's
    torch.testing.assert_close(extras.distances, exact.distances, rtol=0.05, atol=0.1)
    for half, whole in ((cls, exact_cls), (box, exact_box)):
        assert (half.float() - whole).abs().mean() < 0.1 * whole.abs().mean()


# --- parts that do not fit ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_points": "mul"}, r"class_points is 'mul'; wanted is one of \('product', 'sum'"),
        ({"class_points": True}, r"class_points is True; wanted"),
        ({"coarse_bias": -1.0}, r"coarse_bias is -1\.0; wanted are cells, from 0"),
        ({"coarse_bias": math.nan}, r"coarse_bias is nan"),
        ({"coarse_bias": math.inf}, r"coarse_bias is inf"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SALTOptions(**options)


@pytest.mark.parametrize("num_points", [3, 0, -1, 9.0, True])
def test_too_few_points_are_named(num_points: Any) -> None:
    with pytest.raises(ValueError, match=rf"num_points is {num_points}; wanted are 4 or more.*9"):
        SALT(channels=4, num_levels=1, num_points=num_points)


def test_free_points_that_span_nothing_are_named() -> None:
    with pytest.raises(ValueError, match=r"num_points is 1; wanted are 2 or more"):
        FreePoints(channels=4, num_points=1)
    with pytest.raises(ValueError, match=r"gradient_factor is -0\.1; wanted is a number from 0"):
        FreePoints(channels=4, gradient_factor=-0.1)


@pytest.mark.parametrize("aligner", [SALT(channels=64, num_levels=1), FreePoints(channels=64)])
@pytest.mark.parametrize(("which", "name"), [(1, "class tower"), (2, "box tower"), (0, "pyramid")])
def test_other_channels_are_named(aligner: nn.Module, which: int, name: str) -> None:
    maps = [torch.randn(1, 64, 2, 2) for _ in range(3)]
    maps[which] = torch.randn(1, 96, 2, 2)
    if which == 0 and isinstance(aligner, FreePoints):
        aligner(*maps, 0)  # it does not read the pyramid
        return
    match = (
        rf"the {name} has 96 channels, {type(aligner).__name__} expects 64; make .*cls_conv_dims"
    )
    with pytest.raises(ValueError, match=match):
        aligner(*maps, 0)


def test_without_the_skip_the_pyramid_may_be_wider() -> None:
    aligner = SALT(channels=64, num_levels=1, options=SALTOptions(use_skip=False))
    aligner(torch.randn(1, 96, 2, 2), torch.randn(1, 64, 2, 2), torch.randn(1, 64, 2, 2), 0)


@pytest.mark.parametrize(("num_levels", "found"), [(1, "more"), (4, "more"), (6, "5")])
def test_levels_without_a_scale_are_named(num_levels: int, found: str) -> None:
    head = DenseHead(
        context=SharedContext(channels=WIDTH),
        aligner=SALT(channels=WIDTH, num_levels=num_levels),
        predictor=GFLv2Predictor(num_classes=2, in_channels=WIDTH, num_levels=5),
        strides=STRIDES,
        offset=0.0,
        cls_conv_dims=[WIDTH],
        box_conv_dims=[WIDTH],
    )
    maps = [torch.randn(1, WIDTH, size, size) for size in (8, 4, 2, 1, 1)]
    with pytest.raises(
        ValueError,
        match=rf"scales for {num_levels} levels, the head predicts {found}; set model\.h",
    ):
        head(maps)
