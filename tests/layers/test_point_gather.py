# SPDX-License-Identifier: Apache-2.0
"""Values and gradients at points are those of plain loops: kernel and reference alike."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers_of_point_gather import (
    GROUPS_AND_SUM,
    KERNEL,
    MAP_DTYPES,
    Case,
    assert_right,
    both_paths,
    deterministic,
    gather_by,
    make_case,
    needs_kernel,
    results_of,
    scattered,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from d2_decouple.layers.point_gather import (
    deformable_point_gather,
    dynamic_point_gather,
    reference_point_gather,
)


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    with deterministic():
        yield


@both_paths
@pytest.mark.parametrize("dtype", MAP_DTYPES, ids=str)
@pytest.mark.parametrize(("own_channels", "sum_points"), GROUPS_AND_SUM)
def test_equal_to_loops(
    own_channels: bool, sum_points: bool, dtype: torch.dtype, path: str
) -> None:
    for seed in range(3):
        case = make_case(seed=seed, own_channels=own_channels, sum_points=sum_points, dtype=dtype)
        assert_right(path, case)


MASKS = list(itertools.product([True, False], repeat=2))
CHANNELS = [0, 1, 3, 4, 7, 8, 15, 16, 17, 20, 32, 33, 64, 80, 256]


@both_paths
@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", CHANNELS)
def test_any_number_of_channels(
    share: int, dtype: torch.dtype, channels_last: bool, path: str
) -> None:
    """Each width leaves another remainder to a loop over vectors."""
    for own_channels, sum_points in GROUPS_AND_SUM:
        case = make_case(
            share=share,
            images=1,
            out_size=(2, 9),
            own_channels=own_channels,
            sum_points=sum_points,
            dtype=dtype,
        )
        if channels_last:
            case = case._replace(maps=LAYOUTS["channels_last"](case.maps))
        assert_right(path, case)


def spread(maps: Tensor, dim: int, step: int) -> Tensor:
    """The same numbers in every ``step``-th place along an axis of something larger."""
    shape = list(maps.shape)
    shape[dim] = shape[dim] * step + 1
    larger = maps.new_full(shape, torch.nan)
    view = larger[(slice(None),) * dim + (slice(1, None, step),)]
    return view.copy_(maps)


def part_of_channels_last(maps: Tensor) -> Tensor:
    """Channels of a wider convolution's result."""
    before, after = (
        maps.new_full((*maps.shape[:1], n, *maps.shape[2:]), torch.nan) for n in (2, 3)
    )
    wide = torch.cat((before, maps, after), 1).contiguous(memory_format=torch.channels_last)
    return wide[:, 2:-3]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda maps: maps.contiguous(),
    "channels_last": lambda maps: maps.contiguous(memory_format=torch.channels_last),
    "transposed": lambda maps: maps.mT.contiguous().mT,
    "images_last": lambda maps: maps.movedim(0, -1).contiguous().movedim(-1, 0),
    "one_image": lambda maps: maps[:1].expand_as(maps),
    "one_channel": lambda maps: maps[:, :1].expand_as(maps),
    "one_cell": lambda maps: maps[:, :, :1, :1].expand_as(maps),
    "every_second_image": lambda maps: spread(maps, 0, 2),
    "some_channels": lambda maps: spread(maps, 1, 1),
    "every_second_column": lambda maps: spread(maps, 3, 2),
    "every_third_row": lambda maps: spread(maps, 2, 3),
    "part_of_channels_last": part_of_channels_last,
}
POINT_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda points: points.contiguous(),
    "x_y_innermost": lambda points: (
        points.movedim((1, 2), (3, 4)).contiguous().movedim((3, 4), (1, 2))
    ),
    "part_of_channels_last": lambda points: part_of_channels_last(points.flatten(1, 2)).unflatten(
        1, points.shape[1:3]
    ),
    "transposed": lambda points: points.mT.contiguous().mT,
    "y_before_x": lambda points: (
        torch.stack((points[:, :, 1], points[:, :, 0]), -1).movedim(-1, 0)[[1, 0]].movedim(0, 2)
    ),
    "one_for_all_images": lambda points: points[:1].expand_as(points),
    "one_for_all_points": lambda points: points[:, :1].expand_as(points),
    "one_for_all_cells": lambda points: points[..., :1, :1].expand_as(points),
}
GRAD_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: LAYOUTS[name] for name in ("contiguous", "channels_last", "transposed")},
    **{name: LAYOUTS[name] for name in ("images_last", "one_channel", "every_second_column")},
    "of_a_sum": lambda grad: grad.flatten()[0].expand_as(grad),
}


@both_paths
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_any_layout_of_maps(dtype: torch.dtype, layout: str, path: str) -> None:
    for own_channels, sum_points in GROUPS_AND_SUM:
        case = make_case(share=5, own_channels=own_channels, sum_points=sum_points, dtype=dtype)
        maps = LAYOUTS[layout](case.maps)
        assert maps.shape == case.maps.shape
        assert_right(path, case._replace(maps=maps))


@both_paths
@pytest.mark.parametrize("layout", POINT_LAYOUTS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels_last"])
def test_any_layout_of_points(channels_last: bool, layout: str, path: str) -> None:
    for own_channels, sum_points in GROUPS_AND_SUM:
        case = make_case(share=4, own_channels=own_channels, sum_points=sum_points)
        points = POINT_LAYOUTS[layout](case.points)
        assert points.shape == case.points.shape
        maps = LAYOUTS["channels_last"](case.maps) if channels_last else case.maps
        assert_right(path, case._replace(maps=maps, points=points))


@both_paths
@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_any_layout_of_the_gradient(
    dtype: torch.dtype, channels_last: bool, layout: str, path: str
) -> None:
    for own_channels, sum_points in GROUPS_AND_SUM:
        case = make_case(share=4, own_channels=own_channels, sum_points=sum_points, dtype=dtype)
        maps = LAYOUTS["channels_last"](case.maps) if channels_last else case.maps
        assert_right(path, case._replace(maps=maps, grad=GRAD_LAYOUTS[layout](case.grad)))


@needs_kernel
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_the_results(layout: str) -> None:
    """Planes for contiguous maps, channels-last for others; the points' gradient is contiguous."""
    for own_channels, sum_points in GROUPS_AND_SUM:
        case = make_case(share=2, own_channels=own_channels, sum_points=sum_points)
        case = case._replace(
            maps=LAYOUTS[layout](case.maps), points=POINT_LAYOUTS["x_y_innermost"](case.points)
        )
        planes = layout == "contiguous"
        assert case.maps.is_contiguous() == planes
        wanted = torch.contiguous_format if planes else torch.channels_last
        values, grad_maps, grad_points = results_of("kernel", case)
        assert values.is_contiguous(memory_format=wanted)
        assert grad_maps.is_contiguous(memory_format=wanted)
        assert grad_points.is_contiguous()


@both_paths
@pytest.mark.parametrize("size", [(7, 9), (2, 2), (1, 1), (1, 5), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_small_maps(dtype: torch.dtype, size: tuple[int, int], path: str) -> None:
    for own_channels, sum_points in GROUPS_AND_SUM:
        case = make_case(
            size=size,
            out_size=(6, 7),
            own_channels=own_channels,
            sum_points=sum_points,
            dtype=dtype,
        )
        assert_right(path, case)


sizes = st.integers(0, 7)


@pytest.mark.parametrize("path", [KERNEL, "reference"])
@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    images=st.integers(0, 3),
    share=st.integers(0, 37),
    num_points=st.integers(0, 5),
    size=st.tuples(sizes, sizes),
    out_size=st.tuples(sizes, sizes),
    own_channels=st.booleans(),
    sum_points=st.booleans(),
    dtype=st.sampled_from(MAP_DTYPES),
    layouts=st.tuples(
        st.sampled_from(["contiguous", "channels_last", "transposed", "part_of_channels_last"]),
        st.sampled_from(["contiguous", "x_y_innermost", "part_of_channels_last"]),
        st.sampled_from(["contiguous", "channels_last", "transposed"]),
    ),
)
def test_any_case(path: str, layouts: tuple[str, str, str], **kwargs: object) -> None:
    case = make_case(**kwargs)  # type: ignore[arg-type]
    case = case._replace(
        maps=LAYOUTS[layouts[0]](case.maps),
        points=POINT_LAYOUTS[layouts[1]](case.points),
        grad=GRAD_LAYOUTS[layouts[2]](case.grad),
    )
    assert_right(path, case)


@needs_kernel
@pytest.mark.parametrize("dtype", MAP_DTYPES, ids=str)
def test_kernel_equals_reference_on_a_pyramid_level(dtype: torch.dtype) -> None:
    """More than the loops could do; points within 2 cells of their own."""
    generator = torch.Generator().manual_seed(1)
    rows, columns = torch.meshgrid(torch.arange(25), torch.arange(42), indexing="ij")
    own = torch.stack((columns, rows))
    points = own + 4 * torch.rand(2, 9, 2, 25, 42, generator=generator) - 2
    for own_channels, sum_points in GROUPS_AND_SUM:
        groups = 9 if own_channels else 1
        maps = torch.randn(2, groups * 20, 25, 42, generator=generator).to(dtype)
        grad = torch.randn(2, 20 if sum_points else 180, 25, 42, generator=generator).to(dtype)
        of = points.double() if dtype == torch.float64 else points
        case = Case(maps, of, groups, sum_points, grad)
        unit = max(torch.finfo(dtype).eps, 256 * torch.finfo(of.dtype).eps)
        pairs = zip(results_of("kernel", case), results_of("reference", case), strict=True)
        for got, want in pairs:
            torch.testing.assert_close(got, want, rtol=2 * unit, atol=4 * unit)


@both_paths
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 100, 167, 1333])
def test_right_hand_derivative_on_whole_numbers(length: int, dtype: torch.dtype, path: str) -> None:
    """At column k the derivative is v[k + 1] - v[k]; beyond the last column the map is zero."""
    generator = torch.Generator().manual_seed(length)
    row = torch.randint(-9, 10, (length + 1,), generator=generator).to(dtype)
    row[length] = 0
    whole = torch.arange(length).to(dtype)
    for axis in (0, 1):
        points = torch.zeros(1, 1, 2, 1, length, dtype=dtype)
        points[0, 0, axis, 0] = whole
        points.requires_grad_()
        maps = row[:length].reshape((1, 1, 1, length) if axis == 0 else (1, 1, length, 1))
        values = gather_by(path)(maps, points, 1, False)
        (grad,) = torch.autograd.grad(values.sum(), points)
        close = dict(rtol=0, atol=100 * length * torch.finfo(dtype).eps)
        torch.testing.assert_close(values.flatten(), row[:length], **close)
        torch.testing.assert_close(grad[0, 0, axis, 0], row.diff(), **close)


@pytest.mark.parametrize("own_channels", [True, False])
def test_reference_adds_what_it_would_stack(own_channels: bool) -> None:
    case = make_case(own_channels=own_channels, share=4)
    apart = reference_point_gather(case.maps, case.points, case.groups)
    added = reference_point_gather(case.maps, case.points, case.groups, sum_points=True)
    torch.testing.assert_close(apart.unflatten(1, (3, 4)).sum(1), added)


def test_public_functions_by_hand() -> None:
    """One row (1, 2, 4, 8) for the first point and its tenfold for the second."""
    row = torch.tensor([1.0, 2.0, 4.0, 8.0])
    maps = torch.stack((row, 10 * row))[None, :, None]
    points = torch.zeros(1, 2, 2, 1, 2)
    points[0, 0, 0, 0] = torch.tensor([0.5, 2.25])
    points[0, 1, 0, 0] = torch.tensor([3.0, 3.5])

    def close(got: Tensor, want: list[list[float]]) -> None:
        torch.testing.assert_close(got[0, :, 0], torch.tensor(want), rtol=1e-5, atol=1e-5)

    close(dynamic_point_gather(maps, points), [[1.5, 5], [80, 40]])
    close(dynamic_point_gather(maps, points, "none"), [[1.5, 5], [80, 40]])
    close(dynamic_point_gather(maps, points, "sum"), [[81.5, 45]])
    close(deformable_point_gather(maps, points), [[1.5, 5], [15, 50], [8, 4], [80, 40]])


@needs_kernel
def test_public_functions_take_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> Tensor:
        raise AssertionError("the reference was called")

    monkeypatch.setattr("d2_decouple.layers.point_gather.reference_point_gather", refused)
    case = make_case()
    for reduction, sum_points in (("none", False), ("sum", True)):
        got = dynamic_point_gather(case.maps, case.points, reduction)
        assert got.equal(gather_by("kernel")(case.maps, case.points, case.groups, sum_points))
    deformable_point_gather(case.maps, case.points)


@both_paths
@pytest.mark.parametrize("wanted", MASKS)
def test_only_the_gradient_that_is_asked_for(wanted: tuple[bool, bool], path: str) -> None:
    case = make_case(sum_points=True)
    full = results_of(path, case)
    inputs = [t.detach().requires_grad_(w) for t, w in zip(case[:2], wanted, strict=True)]
    values = gather_by(path)(*inputs, case.groups, case.sum_points)
    assert values.requires_grad == any(wanted)
    if any(wanted):
        values.backward(case.grad)
    for tensor, want, grad in zip(inputs, wanted, full[1:], strict=True):
        assert (tensor.grad is not None) == want
        assert not want or tensor.grad.equal(grad)


@needs_kernel
@pytest.mark.parametrize("mask", MASKS)
def test_masked_gradient_is_an_empty_tensor(mask: tuple[bool, bool]) -> None:
    for dtype in MAP_DTYPES:
        case = make_case(sum_points=True, dtype=dtype)
        grads = torch.ops.d2_decouple._point_gather_backward(
            case.grad, case.maps, case.points, case.groups, case.sum_points, mask
        )
        full = results_of("kernel", case)[1:]
        for got, asked, whole in zip(grads, mask, full, strict=True):
            assert got.dtype == whole.dtype
            assert got.equal(whole) if asked else got.shape == (0,)


def test_scattered_points_are_of_every_kind() -> None:
    """The tests above would prove little if they were all inside, or all ignored."""
    case = make_case(out_size=(20, 20))
    x = scattered((2, 3, 2, 20, 20), (5, 6), torch.Generator().manual_seed(0), torch.float64)[
        :, :, 0
    ]
    for kind in (x.isnan(), x.isinf(), x == -1, x == 6, x == 5, (x > -1) & (x < 0), x > 1e8):
        assert kind.sum() > 5
    inside = (case.points > -1) & (case.points < case.points.new_tensor((6, 5))[:, None, None])
    assert 0.3 < inside.all(2).double().mean() < 0.7
