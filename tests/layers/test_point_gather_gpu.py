# SPDX-License-Identifier: Apache-2.0
"""The kernel for GPUs gives what the one for the CPU gives, and what the loops give."""

import itertools
import math
import warnings

import pytest
import torch
from helpers_of_point_gather import (
    GROUPS_AND_SUM,
    MAP_DTYPES,
    Case,
    Results,
    assert_right,
    deterministic,
    make_case,
    needs_gpu,
    points_dtype,
    results_of,
)
from torch import Tensor

from d2_decouple.layers.point_gather import deformable_point_gather, dynamic_point_gather

pytestmark = needs_gpu

LAYOUTS = [torch.contiguous_format, torch.channels_last]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=["planes", "channels_last"])
every_dtype = pytest.mark.parametrize("dtype", MAP_DTYPES, ids=str)


def on_gpu(case: Case, layout: torch.memory_format = torch.contiguous_format) -> Case:
    case = case.to("cuda")
    return case._replace(maps=case.maps.contiguous(memory_format=layout))


@every_layout
@every_dtype
@pytest.mark.parametrize(("own_channels", "sum_points"), GROUPS_AND_SUM)
def test_equal_to_loops(
    own_channels: bool, sum_points: bool, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """Any width of vector loads, more points than are kept at a time, both ways to add."""
    for share, points in (
        (1, 3),
        (2, 20),
        (3, 9),
        (4, 1),
        (7, 2),
        (8, 9),
        (20, 9),
        (80, 9),
        (256, 1),
        (136, 33),
    ):
        options = dict(own_channels=own_channels, sum_points=sum_points, dtype=dtype)
        case = on_gpu(make_case(share=share, num_points=points, **options), layout)  # type: ignore[arg-type]
        assert_right("kernel", case)
        with deterministic():
            assert_right("kernel", case)


@every_layout
@pytest.mark.parametrize("size", [(7, 9), (2, 2), (1, 1), (1, 5), (5, 1), (33, 41)])
def test_small_maps_and_ragged_tiles(size: tuple[int, int], layout: torch.memory_format) -> None:
    for own_channels, sum_points in GROUPS_AND_SUM:
        for out_size in ((6, 7), (1, 1), (17, 3)):
            options = dict(own_channels=own_channels, sum_points=sum_points)
            case = make_case(size=size, out_size=out_size, share=4, **options)  # type: ignore[arg-type]
            assert_right("kernel", on_gpu(case, layout))


def strided(tensor: Tensor) -> dict[str, Tensor]:
    """The same numbers in other layouts."""
    wider = torch.cat((tensor, tensor), 1)
    aside = torch.cat((tensor[:, :1], tensor), 1)
    return {
        "transposed": tensor.mT.contiguous().mT,
        "sliced": wider[:, : tensor.shape[1]],
        "not aligned": aside[:, 1:],
        "expanded": tensor[:1].expand_as(tensor),
    }


@every_dtype
@pytest.mark.parametrize("layout", ["transposed", "sliced", "not aligned", "expanded"])
@pytest.mark.parametrize("which", ["maps", "points", "grad"])
def test_other_layouts(which: str, layout: str, dtype: torch.dtype) -> None:
    for own_channels, sum_points in GROUPS_AND_SUM:
        case = on_gpu(
            make_case(share=8, own_channels=own_channels, sum_points=sum_points, dtype=dtype)
        )
        tensor = getattr(case, which)
        assert_right("kernel", case._replace(**{which: strided(tensor)[layout]}))


@every_layout
def test_layout_of_the_results(layout: torch.memory_format) -> None:
    for own_channels, sum_points in GROUPS_AND_SUM:
        case = on_gpu(make_case(own_channels=own_channels, sum_points=sum_points), layout)
        values, grad_maps, grad_points = results_of("kernel", case)
        assert values.is_contiguous(memory_format=layout)
        assert grad_maps.is_contiguous(memory_format=layout)
        assert grad_points.is_contiguous()


EMPTY = [
    *(dict(images=0), dict(num_points=0), dict(share=0), dict(out_size=(0, 4))),
    *(dict(out_size=(3, 0)), dict(size=(0, 6)), dict(size=(5, 0)), dict(size=(0, 0))),
]


@every_layout
@pytest.mark.parametrize("kind", EMPTY, ids=str)
def test_empty_is_normal(kind: dict[str, int], layout: torch.memory_format) -> None:
    for own_channels, sum_points in GROUPS_AND_SUM:
        case = make_case(own_channels=own_channels, sum_points=sum_points, **kind)  # type: ignore[arg-type]
        assert_right("kernel", on_gpu(case, layout))
        with deterministic():
            assert_right("kernel", on_gpu(case, layout))


def level(dtype: torch.dtype, own_channels: bool, sum_points: bool) -> Case:
    """P3 of a small image, with points within two cells of their own."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(50), torch.arange(84), indexing="ij")
    around = 4 * torch.rand(2, 9, 2, 50, 84, generator=generator) - 2
    groups, kept = 9 if own_channels else 1, 80 if sum_points else 720
    points = (torch.stack((columns, rows)) + around).to(points_dtype(dtype))
    maps = torch.randn(2, groups * 80, 50, 84, generator=generator).to(dtype)
    grad = torch.randn(2, kept, 50, 84, generator=generator).to(dtype)
    return Case(maps, points, groups, sum_points, grad)


@every_layout
@every_dtype
@pytest.mark.parametrize(("own_channels", "sum_points"), GROUPS_AND_SUM)
def test_equal_to_the_cpu_on_a_level(
    own_channels: bool, sum_points: bool, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    case = level(dtype, own_channels, sum_points)
    pairs = zip(results_of("kernel", on_gpu(case, layout)), results_of("kernel", case), strict=True)
    unit = max(torch.finfo(dtype).eps, 256 * torch.finfo(case.points.dtype).eps)
    for got, want in pairs:
        torch.testing.assert_close(got.cpu(), want, rtol=2 * unit, atol=4 * unit)


@every_layout
@every_dtype
@pytest.mark.parametrize(("own_channels", "sum_points"), GROUPS_AND_SUM)
def test_deterministic_when_asked(
    own_channels: bool, sum_points: bool, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """Two runs bit-equal, with hundreds of points in each of a few cells."""
    case = level(dtype, own_channels, sum_points)
    case = on_gpu(case._replace(points=case.points.remainder(3)), layout)
    with deterministic():
        runs = [results_of("kernel", case) for _ in range(3)]
    for run in runs[1:]:
        assert all(a.equal(b) for a, b in zip(runs[0], run, strict=True))


def test_points_that_are_nowhere() -> None:
    nowhere = [math.nan, math.inf, -math.inf, 1e9, -1e9, 2.0**31, 2.0**63, -(2.0**63), 3e38, -1, 4]
    pairs = [*itertools.product(nowhere, nowhere), *((x, 1.5) for x in nowhere)]
    points = torch.tensor(pairs).T.reshape(1, 1, 2, 1, -1)
    for grad in (1.0, math.nan, math.inf):
        maps = torch.full((1, 8, 4, 4), math.nan)
        case = Case(maps, points, 1, False, torch.full((1, 8, 1, len(pairs)), grad))
        assert not any(result.any() for result in results_of("kernel", case.to("cuda")))


@every_layout
def test_cells_that_a_point_does_not_touch(layout: torch.memory_format) -> None:
    for x, y in itertools.product([-0.5, 0.5, 2.5, 3.5], [-0.5, 0.5, 2.5]):
        maps = torch.full((1, 8, 3, 4), math.nan)
        for row, column in itertools.product(range(3), range(4)):
            if abs(x - column) < 1 and abs(y - row) < 1:
                maps[..., row, column] = 1
        points = torch.tensor((x, y)).reshape(1, 1, 2, 1, 1)
        case = Case(maps, points, 1, False, torch.ones(1, 8, 1, 1))
        got = results_of("kernel", on_gpu(case, layout))
        assert all(result.isfinite().all() for result in got)
        assert_right("kernel", case._replace(maps=maps.nan_to_num(7)), got)


def test_map_beyond_32_bits() -> None:
    """4 GiB of bfloat16: the last cells, and the gradient of the point in them."""
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("less than 6 GiB of this GPU are free")
    size = 32769
    maps = torch.empty(1, 2, size, size, dtype=torch.bfloat16, device="cuda")
    maps = maps.as_strided(maps.shape, (maps.numel(), 1, 2 * size, 2))  # channels-last
    assert maps.is_contiguous(memory_format=torch.channels_last)
    corner = torch.tensor([[1.0, 2.0], [3.0, 5.0]], device="cuda")
    maps[0, :, -2:, -2:] = torch.stack((corner, corner + 10)).bfloat16()
    xy = torch.tensor((size - 2 + 0.25, size - 2 + 0.5), device="cuda")
    points = xy.reshape(1, 1, 2, 1, 1).requires_grad_()
    values = deformable_point_gather(maps, points)
    assert values.flatten().tolist() == torch.tensor([2.375, 12.375]).bfloat16().tolist()
    values.float().sum().backward()
    assert points.grad is not None
    assert points.grad.flatten().tolist() == [3.0, 4.5]


def test_runs_on_the_current_stream() -> None:
    case = on_gpu(level(torch.float32, True, True))
    want = results_of("kernel", case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what a launch on another stream would not wait for
        maps = case.maps.clone()
        values = dynamic_point_gather(maps, case.points, "sum")
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(values, want.values)


def test_can_be_captured_in_a_graph() -> None:
    """No launch synchronises, or asks the host for anything."""
    case = on_gpu(level(torch.float32, True, True))
    want = dynamic_point_gather(case.maps, case.points, "sum")
    graph = torch.cuda.CUDAGraph()
    maps = torch.zeros_like(case.maps)
    with torch.cuda.graph(graph):
        values = dynamic_point_gather(maps, case.points, "sum")
    maps.copy_(case.maps)
    graph.replay()
    assert values.equal(want)


@every_layout
@pytest.mark.parametrize(("own_channels", "sum_points"), GROUPS_AND_SUM)
def test_opcheck(own_channels: bool, sum_points: bool, layout: torch.memory_format) -> None:
    case = on_gpu(make_case(own_channels=own_channels, sum_points=sum_points), layout)
    inputs = [t.detach().requires_grad_() for t in case[:2]]
    options = (case.groups, sum_points)
    torch.library.opcheck(torch.ops.d2_decouple.point_gather.default, (*inputs, *options))
    torch.library.opcheck(
        torch.ops.d2_decouple._point_gather_backward.default, (case.grad, *case[:4], [True, True])
    )


def test_autocast_takes_half_points_as_float() -> None:
    case = on_gpu(make_case(dtype=torch.float16))
    half = case.points.nan_to_num(0, 0, 0).clamp(-9, 9).half()
    with torch.autocast("cuda", torch.float16):
        values = dynamic_point_gather(case.maps, half)
    assert values.equal(dynamic_point_gather(case.maps, half.float()))
    with pytest.raises(RuntimeError, match="half precision is too coarse"):
        dynamic_point_gather(case.maps, half)


def test_devices_that_differ() -> None:
    case = make_case(dtype=torch.float32)
    for maps, points in ((case.maps.cuda(), case.points), (case.maps, case.points.cuda())):
        with pytest.raises(RuntimeError, match=r"points are on .*, maps on .*; wanted is one"):
            dynamic_point_gather(maps, points)


def test_no_warning_where_the_kernel_runs() -> None:
    case = on_gpu(make_case())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dynamic_point_gather(case.maps, case.points, "sum")
        deformable_point_gather(case.maps, case.points)


def test_reference_runs_on_a_gpu_as_well() -> None:
    for own_channels, sum_points in GROUPS_AND_SUM:
        case = on_gpu(make_case(own_channels=own_channels, sum_points=sum_points))
        got: Results = results_of("reference", case)
        assert_right("reference", case, got)
