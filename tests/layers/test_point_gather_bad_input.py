# SPDX-License-Identifier: Apache-2.0
"""Points that are nowhere, maps without cells, and calls that do not fit: kernel and reference."""

import itertools
import math
import re
import warnings
from typing import Any

import pytest
import torch
from helpers_of_point_gather import (
    GROUPS_AND_SUM,
    MAP_DTYPES,
    Case,
    assert_right,
    both_paths,
    by_loops,
    deterministic,
    gather_by,
    make_case,
    needs_kernel,
    points_dtype,
    pretend,
    results_of,
    special_coordinates,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from util import TORCH

from d2_decouple.layers import point_gather as module
from d2_decouple.layers.point_gather import deformable_point_gather, dynamic_point_gather


def along_both_axes(coordinates: list[float], dtype: torch.dtype) -> Tensor:
    """(1, 1, 2, n, n): every pair of the coordinates."""
    axis = torch.tensor(coordinates, dtype=dtype)
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"))[None, None]


def ones_like_result(maps: Tensor, points: Tensor) -> Tensor:
    return maps.new_ones(maps.shape[0], maps.shape[1] * points.shape[1], *points.shape[3:])


@both_paths
@pytest.mark.parametrize("dtype", MAP_DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels_last"])
def test_points_that_are_nowhere(channels_last: bool, dtype: torch.dtype, path: str) -> None:
    """Each of them on x, on y and on both, beside a good coordinate: zero, and no gradient."""
    of = points_dtype(dtype)
    length = 4
    nowhere = [
        *(math.nan, math.inf, -math.inf, 1e9, -1e9, 2.0**31, -(2.0**31), 2.0**63, -(2.0**63)),
        *(torch.finfo(of).max, torch.finfo(of).min, -1.0, -1.5, float(length), length + 0.5),
    ]
    good = 1.5
    pairs = [(bad, good) for bad in nowhere] + [(good, bad) for bad in nowhere]
    pairs += list(itertools.product(nowhere, nowhere))
    points = torch.tensor(pairs, dtype=of).T.reshape(1, 1, 2, 1, -1)
    maps = torch.randn(1, 17, length, length).to(dtype)
    if channels_last:
        maps = maps.contiguous(memory_format=torch.channels_last)
    with deterministic():
        got = results_of(path, Case(maps, points, 1, False, ones_like_result(maps, points)))
    assert not any(result.any() for result in got)


@both_paths
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [(4, 4), (1, 1), (3, 1), (1, 6)])
def test_edges(size: tuple[int, int], dtype: torch.dtype, path: str) -> None:
    """-1, the size, zero of both signs, denormal numbers and what lies just beside them."""
    for length in size:
        points = along_both_axes(special_coordinates(length, dtype), dtype)
        maps = torch.randn(1, 3, *size, dtype=dtype)
        case = Case(maps, points, 1, False, torch.rand_like(ones_like_result(maps, points)))
        assert_right(path, case)


@both_paths
def test_zero_of_both_signs_is_the_first_cell(path: str) -> None:
    maps = torch.tensor([[[[3.0, 5.0], [7.0, 11.0]]]])
    points = along_both_axes([0.0, -0.0], torch.float32)
    got = results_of(path, Case(maps, points, 1, False, torch.ones(1, 1, 2, 2)))
    torch.testing.assert_close(got.values, torch.full((1, 1, 2, 2), 3.0))
    torch.testing.assert_close(got.grad_points[0, 0, 0], torch.full((2, 2), 2.0))
    torch.testing.assert_close(got.grad_points[0, 0, 1], torch.full((2, 2), 4.0))


NON_FINITE = [math.nan, math.inf, -math.inf]


@both_paths
@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize("poison", NON_FINITE)
@pytest.mark.parametrize("share", [1, 17])
def test_cells_that_a_point_does_not_touch(
    share: int, poison: float, channels_last: bool, path: str
) -> None:
    """Everything is NaN but the cells around one point, and the channels that it reads."""
    height, width = 3, 4
    places = itertools.product([-0.5, 0.5, 2.5, 3.5, -7.0], [-0.5, 0.5, 2.5, math.nan])
    for (x, y), groups in itertools.product(places, (1, 2)):
        maps = torch.full((1, groups * share, height, width), poison)
        points = torch.full((1, groups, 2, 1, 1), -5.0)
        points[0, -1, :, 0, 0] = torch.tensor((x, y))  # the other point, if any, is ignored
        touched = [
            (row, column)
            for row, column in itertools.product(range(height), range(width))
            if abs(x - column) < 1 and abs(y - row) < 1
        ]
        for row, column in touched:
            maps[0, -share:, row, column] = torch.randn(share)
        if channels_last:
            maps = maps.contiguous(memory_format=torch.channels_last)
        case = Case(maps, points, groups, True, torch.ones(1, share, 1, 1))
        got = results_of(path, case)
        assert all(result.isfinite().all() for result in got), (x, y, groups)
        # Loops do the rest, on maps where what may not be touched does not harm.
        finite = case._replace(maps=maps.nan_to_num(1e3, 1e3, 1e3))
        assert_right(path, finite, got)


@both_paths
@pytest.mark.parametrize("poison", NON_FINITE)
def test_non_finite_cells_that_a_point_touches(poison: float, path: str) -> None:
    maps = torch.ones(1, 1, 3, 3)
    maps[0, 0, 1, 1] = poison
    points = along_both_axes([0.5, 1.5], torch.float32)
    values = gather_by(path)(maps, points, 1, False)
    assert values.eq(poison).all() or (math.isnan(poison) and values.isnan().all())


@both_paths
@pytest.mark.parametrize("poison", NON_FINITE)
@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels_last"])
def test_ignored_points_have_no_gradient_whatever_comes_back(
    channels_last: bool, poison: float, path: str
) -> None:
    """Scaled losses overflow: an infinite gradient must not become one of a point not used."""
    for own_channels, sum_points in GROUPS_AND_SUM:
        case = make_case(share=18, own_channels=own_channels, sum_points=sum_points)
        maps = case.maps
        if channels_last:
            maps = maps.contiguous(memory_format=torch.channels_last)
        points = torch.where(case.points > 0, 1e9, torch.nan).to(case.points.dtype)
        case = case._replace(maps=maps, points=points, grad=torch.full_like(case.grad, poison))
        got = results_of(path, case)
        assert not any(result.any() for result in got)


EMPTY = {
    "no image": dict(images=0),
    "no point": dict(num_points=0),
    "no channel": dict(share=0),
    "no row of points": dict(out_size=(0, 4)),
    "no column of points": dict(out_size=(3, 0)),
    "no row": dict(size=(0, 6)),
    "no column": dict(size=(5, 0)),
    "no cell": dict(size=(0, 0)),
    "nothing": dict(images=0, num_points=0, share=0, size=(0, 0), out_size=(0, 0)),
}


@both_paths
@pytest.mark.parametrize("dtype", MAP_DTYPES, ids=str)
@pytest.mark.parametrize("kind", EMPTY)
def test_empty_is_normal(kind: str, dtype: torch.dtype, path: str) -> None:
    for own_channels, sum_points in GROUPS_AND_SUM:
        options: dict[str, Any] = dict(own_channels=own_channels, sum_points=sum_points)
        case = make_case(**options, **EMPTY[kind], dtype=dtype)
        with deterministic():
            got = results_of(path, case)
            assert_right(path, case, got)
            last = case.maps.contiguous(memory_format=torch.channels_last)
            assert_right(path, case._replace(maps=last))
        assert not any(result.any() for result in got)


def good_call() -> dict[str, Any]:
    return dict(maps=torch.zeros(2, 18, 4, 5), points=torch.zeros(2, 9, 2, 3, 4), groups=9)


POINTS = torch.zeros(2, 9, 2, 3, 4)
BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "maps without images": (
        dict(maps=torch.zeros(18, 4, 5)),
        "maps have shape (18, 4, 5); wanted is (N, groups * C, H, W)",
    ),
    "points without an axis": (
        dict(points=torch.zeros(2, 9, 3, 4)),
        "points have shape (2, 9, 3, 4); wanted is (N, P, 2, Ho, Wo)",
    ),
    "three coordinates": (
        dict(points=torch.zeros(2, 9, 3, 3, 4)),
        "points have shape (2, 9, 3, 3, 4); wanted is (N, P, 2, Ho, Wo)",
    ),
    "other images": (
        dict(points=torch.zeros(3, 9, 2, 3, 4)),
        "points are of 3 images, maps of 2; wanted are as many",
    ),
    "other groups": (dict(groups=3), "groups are 3; wanted is 1 or the number of points, 9"),
    "negative groups": (dict(groups=-9), "groups are -9; wanted is 1 or the number of points, 9"),
    "no groups": (dict(groups=0), "groups are 0; wanted is 1 or the number of points, 9"),
    "channels that do not divide": (
        dict(maps=torch.zeros(2, 20, 4, 5)),
        "maps have 20 channels; wanted is a multiple of 9 groups",
    ),
    "channels for no point": (
        dict(points=torch.zeros(2, 0, 2, 3, 4), groups=0),
        "maps have 18 channels; wanted is a multiple of 0 groups",
    ),
    "whole numbers": (
        dict(maps=torch.zeros(2, 18, 4, 5, dtype=torch.int32)),
        "maps are torch.int32; wanted is float32, float64, bfloat16 or float16",
    ),
    "complex maps": (
        dict(maps=torch.zeros(2, 18, 4, 5, dtype=torch.complex64)),
        "maps are torch.complex64; wanted is float32, float64, bfloat16 or float16",
    ),
    "double points for float maps": (
        dict(points=POINTS.double()),
        "points are torch.float64; wanted is torch.float32 with torch.float32 maps",
    ),
    "float points for double maps": (
        dict(maps=torch.zeros(2, 18, 4, 5).double()),
        "points are torch.float32; wanted is torch.float64 with torch.float64 maps",
    ),
    "half points": (
        dict(points=POINTS.bfloat16(), maps=torch.zeros(2, 18, 4, 5).bfloat16()),
        "points are torch.bfloat16; wanted is torch.float32 with torch.bfloat16 maps",
    ),
    "whole points": (dict(points=POINTS.long()), "points are torch.int64; wanted is torch.float32"),
    "points elsewhere": (
        dict(points=POINTS.to("meta")),
        "points are on meta, maps on cpu; wanted is one",
    ),
    "maps elsewhere": (
        dict(maps=torch.zeros(2, 18, 4, 5, device="meta")),
        "points are on cpu, maps on meta; wanted is one",
    ),
}


@both_paths
@pytest.mark.parametrize("kind", BAD_CALLS)
def test_calls_that_do_not_fit(kind: str, path: str) -> None:
    """Kernel and reference say the same, word for word."""
    change, message = BAD_CALLS[kind]
    call = good_call() | change
    with pytest.raises(RuntimeError) as raised:
        gather_by(path)(call["maps"], call["points"], call["groups"], True)
    assert message in in_python(str(raised.value))


def in_python(message: str) -> str:
    """Shapes and dtypes as Python writes them; C++ has other brackets and names."""
    names = dict(Float="float32", Double="float64", BFloat16="bfloat16", Int="int32", Long="int64")
    for name, ours in (names | dict(Half="float16", ComplexFloat="complex64")).items():
        message = re.sub(rf"\b{name}\b", f"torch.{ours}", message)
    return re.sub(r"\[([\d, ]*)\]", r"(\1)", message.splitlines()[0])


def test_good_call_fits() -> None:
    """The calls above are wrong in one thing only."""
    call = good_call()
    assert dynamic_point_gather(call["maps"], call["points"], "sum").shape == (2, 2, 3, 4)


@needs_kernel
@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.zeros(2, 2, 3, 5), "(2, 2, 3, 5); wanted is (2, 2, 3, 4)"),
        (torch.zeros(2, 18, 3, 4), "(2, 18, 3, 4); wanted is (2, 2, 3, 4)"),
        (torch.zeros(2, 2, 3, 4).double(), "torch.float64 on cpu; wanted is torch.float32 on cpu"),
    ],
    ids=["shape", "not summed", "dtype"],
)
def test_gradient_that_does_not_fit(grad: Tensor, message: str) -> None:
    call = good_call()
    with pytest.raises(RuntimeError) as raised:
        torch.ops.d2_decouple._point_gather_backward(
            grad, call["maps"], call["points"], 9, True, [True, True]
        )
    assert message in in_python(str(raised.value))


def test_public_functions_say_what_is_wrong() -> None:
    maps, points = torch.zeros(2, 18, 4, 5), POINTS
    with pytest.raises(
        ValueError, match=r"reduction is 'mean'; wanted is one of \['none', 'sum'\]"
    ):
        dynamic_point_gather(maps, points, "mean")
    with pytest.raises(
        RuntimeError, match="maps have 17 channels; wanted is a multiple of 9 groups"
    ):
        dynamic_point_gather(maps[:, 1:], points)
    with pytest.raises(RuntimeError, match=r"points have shape .2, 9, 3, 4.; wanted is"):
        dynamic_point_gather(maps, points[:, :, 0])
    with pytest.raises(RuntimeError, match=r"maps have shape .18, 4, 5.; wanted is"):
        deformable_point_gather(maps[0], points)
    with pytest.raises(RuntimeError, match="half precision is too coarse"):
        deformable_point_gather(maps.half(), points.half())


@pytest.mark.skipif(TORCH < (2, 6), reason="fake tensors of older torch ask for the GPU")
def test_one_warning_where_a_gpu_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have the device without needing it; the warning points at the caller."""
    pretend(monkeypatch, cpu=True, cuda=False, reason="built where there was no nvcc")
    module._warn_once.cache_clear()
    with FakeTensorMode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        maps = torch.zeros(2, 18, 4, 5, device="cuda")
        points = torch.zeros(2, 9, 2, 3, 4, device="cuda")
        for _ in range(2):
            assert dynamic_point_gather(maps, points, "sum").device.type == "cuda"
            assert deformable_point_gather(maps, points).shape == (2, 162, 3, 4)
    module._warn_once.cache_clear()
    (warning,) = caught
    assert "gathered by grid_sample on this GPU" in str(warning.message)
    assert "built where there was no nvcc" in str(warning.message)
    assert warning.filename == __file__


def test_other_devices_take_the_reference_in_silence(recwarn: pytest.WarningsRecorder) -> None:
    assert dynamic_point_gather(POINTS[:, :, 0].to("meta"), POINTS.to("meta")).shape == (2, 9, 3, 4)
    assert not recwarn.list


@needs_kernel
def test_loops_find_fault() -> None:
    """The comparison with loops is not one that anything passes."""
    case = make_case(dtype=torch.float32)
    got = results_of("kernel", case)
    want, _ = by_loops(case)
    far = want.values.abs().argmax()
    for change in (1e-4, math.nan):
        values = got.values.clone()
        values.view(-1)[far] += change
        with pytest.raises(AssertionError, match="values is wrong in 1 of"):
            assert_right("kernel", case, got._replace(values=values))


@needs_kernel
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_infinite_gradient_at_the_border_is_no_matter_of_layout(
    layout: torch.memory_format,
) -> None:
    maps = torch.ones(1, 2, 3, 3).contiguous(memory_format=layout).requires_grad_()
    points = torch.tensor([-0.5, 0.5]).reshape(1, 1, 2, 1, 1).requires_grad_()
    value = deformable_point_gather(maps, points)
    (grad,) = torch.autograd.grad(value, points, torch.full_like(value, float("inf")))
    assert grad[0, 0, 0].item() == float("inf")


@needs_kernel
def test_subnormal_halves_are_read_where_the_processor_flushes_such_floats() -> None:
    maps = torch.full((1, 35, 2, 2), 5e-7, dtype=torch.half)
    maps = maps.contiguous(memory_format=torch.channels_last)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush")
    try:
        values = deformable_point_gather(maps, torch.zeros(1, 1, 2, 1, 1))
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(values.flatten(), maps[0, :, 0, 0])
