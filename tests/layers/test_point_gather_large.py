# SPDX-License-Identifier: Apache-2.0
"""Large maps: indices beyond 32 bits, and memory that is not taken."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers_of_point_gather import (
    Case,
    gather_by,
    needs_kernel,
    peak_growth,
    resident,
    threads,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from d2_decouple.layers.point_gather import dynamic_point_gather

MIB = 1 << 20
LAYOUTS = {"planes": torch.contiguous_format, "channels_last": torch.channels_last}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@needs_kernel
@every_layout
def test_shapes_beyond_32_bits(layout: str) -> None:
    """Shapes only: nothing of this size is made."""
    wanted = LAYOUTS[layout]
    with FakeTensorMode():
        maps = torch.empty(2, 9 * 80, 2000, 3000, device="cpu").contiguous(memory_format=wanted)
        points = torch.empty(2, 9, 2, 2000, 3000, device="cpu")
        assert maps.numel() > 2**33
        values = torch.ops.d2_decouple.point_gather(maps, points, 9, False)
        assert values.shape == maps.shape
        assert values.is_contiguous(memory_format=wanted)
        grads = torch.ops.d2_decouple._point_gather_backward(
            values, maps, points, 9, False, [True, True]
        )
        assert [grad.shape for grad in grads] == [maps.shape, points.shape]


@contextmanager
def little_memory() -> Iterator[None]:
    """A copy of the map is refused at once, instead of filling the machine."""
    resource = pytest.importorskip("resource", reason="only Unix limits memory")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (resident("VmSize") + 500 * MIB, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


HEIGHT, WIDTH, CHANNELS = 32769, 32769, 2


def large_map(layout: str) -> Tensor:
    """2^31 numbers and more, 4 GiB, of which the system hands out only pages that are written."""
    shape = (1, CHANNELS, HEIGHT, WIDTH)
    try:
        maps = torch.empty(shape, dtype=torch.bfloat16, memory_format=LAYOUTS[layout])
    except RuntimeError as error:
        pytest.skip(f"this system does not lend 4 GiB that nobody writes to: {error}")
    assert maps.numel() > 2**31
    return maps


def corner_case(maps: Tensor, *, sum_points: bool) -> Case:
    """Points in the first and the last cells, whose four neighbours are all that is written."""
    for row, column in ((0, 0), (HEIGHT - 2, WIDTH - 2)):
        for channel in range(CHANNELS):
            start = 100 * channel + (50 if row else 0)
            maps[0, channel, row : row + 2, column : column + 2] = torch.tensor(
                [[start + 1, start + 2], [start + 3, start + 5]]
            )
    # Far numbers have few bits behind the point in float32: a quarter and a half are exact.
    last_x, last_y = WIDTH - 2 + 0.25, HEIGHT - 2 + 0.5
    points = torch.tensor([[0.25, 0.5], [last_x, last_y]]).T.reshape(1, 1, 2, 1, 2)
    points = torch.cat((points, points.flip(-1)), 1)
    groups = 2 if sum_points else 1
    channels = 1 if sum_points else 2 * CHANNELS
    return Case(maps, points, groups, sum_points, torch.ones(1, channels, 1, 2).bfloat16())


# By hand, from 1, 2, 3, 5 at a quarter and a half: 0.375 + 0.125 * 2 + 0.375 * 3 + 0.125 * 5.
FIRST, DX, DY = 2.375, 1.5, 2.25


@needs_kernel
@every_layout
@pytest.mark.parametrize("sum_points", [True, False])
def test_map_beyond_32_bits(sum_points: bool, layout: str) -> None:
    case = corner_case(large_map(layout), sum_points=sum_points)
    results = []

    def call() -> None:
        with threads(1), little_memory():
            operator = gather_by("kernel")
            results.append(operator(case.maps, case.points, case.groups, case.sum_points))

    assert peak_growth(call) < 100 * MIB
    first, last = FIRST, FIRST + 50
    if sum_points:  # channel 0 at the first point, channel 1 at the second
        want = [[first + 100 + last, last + 100 + first]]
    else:
        want = [[first, last], [first + 100, last + 100], [last, first], [last + 100, first + 100]]
    assert results[0].flatten(2).tolist() == [torch.tensor(want).bfloat16().tolist()]


@needs_kernel
@every_layout
def test_gradient_of_points_beyond_32_bits(layout: str) -> None:
    """The gradient of such a map is not computed where nobody asks for it, nor allocated."""
    case = corner_case(large_map(layout), sum_points=True)
    points = case.points.requires_grad_()
    results = []

    def call() -> None:
        with threads(1), little_memory():
            values = dynamic_point_gather(case.maps, points, "sum")
            results.extend(torch.autograd.grad(values, points, case.grad))

    assert peak_growth(call) < 100 * MIB
    assert results[0][0, :, 0].flatten().tolist() == [DX] * 4
    assert results[0][0, :, 1].flatten().tolist() == [DY] * 4


SMALL = Case(torch.zeros(1, 18, 4, 4), torch.zeros(1, 9, 2, 4, 4), 9, True, torch.zeros(1, 2, 4, 4))


def class_collection(layout: str) -> Case:
    """The class maps of one image's finest level: 48 MB, of which a ninth remains."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(100), torch.arange(168), indexing="ij")
    around = 4 * torch.rand(1, 9, 2, 100, 168, generator=generator) - 2
    maps = torch.empty(1, 720, 100, 168, memory_format=LAYOUTS[layout]).fill_(1)
    grad = torch.ones(1, 80, 100, 168).contiguous(memory_format=LAYOUTS[layout])
    return Case(maps, torch.stack((columns, rows)) + around, 9, True, grad)


@needs_kernel
@every_layout
def test_sum_takes_no_memory_for_each_point(layout: str) -> None:
    case = class_collection(layout)
    result_size, map_size = (t.numel() * t.element_size() for t in (case.grad, case.maps))
    keep: list[Tensor] = []

    def call(case: Case) -> Callable[[], None]:
        operator = gather_by("kernel")
        return lambda: keep.append(operator(*case[:2], case.groups, case.sum_points))

    with threads(1):
        call(SMALL)()  # what only the first call takes
        grown = peak_growth(call(case))
    assert grown > 0.9 * result_size, "the peak is not seen"
    assert grown < result_size + map_size / 4


@needs_kernel
@every_layout
def test_backward_takes_no_memory_for_each_point(layout: str) -> None:
    """The gradient of the maps, that of the points, and little else."""
    case = class_collection(layout)
    map_size = case.maps.numel() * 4
    keep: list[Tensor] = []
    backward = torch.ops.d2_decouple._point_gather_backward

    def call(case: Case) -> Callable[[], None]:
        return lambda: keep.extend(backward(case.grad, *case[:4], [True, True]))

    with threads(1):
        for _ in range(6):  # holds all memory that is kept from one backward for the next
            call(case)()
        grown = peak_growth(call(case))
    assert grown > 0.9 * map_size, "the peak is not seen"
    assert grown < map_size * 1.25


@needs_kernel
@every_layout
def test_memory_is_used_again_only_when_nobody_has_it(layout: str) -> None:
    case = class_collection(layout)
    backward = torch.ops.d2_decouple._point_gather_backward

    def gradient(factor: float) -> Tensor:
        return backward(factor * case.grad, *case[:4], [True, False])[0]

    first, second = gradient(1), gradient(2)
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(2 * first, second)
    wanted, address, part = first.clone(), first.data_ptr(), first[0, 0]
    del first
    assert gradient(1).data_ptr() != address, "a part of it was still in use"
    assert torch.equal(part, wanted[0, 0])
    del part
    again = gradient(1)
    assert address == again.data_ptr(), "memory was not used again"
    assert torch.equal(again, wanted)


@needs_kernel
@pytest.mark.parametrize("channels", [256, 192])
def test_gradients_hold_no_more_than_themselves(channels: int) -> None:
    """The first one's memory would be large enough for the second one's as well."""
    points = 31 * torch.rand(1, 9, 2, 32, 32)
    for width in (channels, channels - 16):
        maps = torch.rand(1, width, 48, 48).contiguous(memory_format=torch.channels_last)
        grad = torch.ones(1, 9 * width, 32, 32)
        backward = torch.ops.d2_decouple._point_gather_backward
        for gradient in backward(grad, maps, points, 1, False, [True, True]):
            assert gradient.untyped_storage().nbytes() == gradient.nbytes
