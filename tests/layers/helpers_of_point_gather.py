# SPDX-License-Identifier: Apache-2.0
"""The gather of points in plain loops, from its definition alone, and cases to compare it on."""

import ctypes
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from d2_decouple import extension
from d2_decouple.layers import point_gather
from d2_decouple.layers.point_gather import reference_point_gather

needs_kernel = pytest.mark.skipif(
    not extension.status().cpu, reason=f"no kernel for the CPU: {extension.status().reason}"
)
NO_GPU = None if torch.cuda.is_available() else "there is no GPU"
if NO_GPU is None and not extension.status().cuda:
    NO_GPU = f"no kernel for the GPU: {extension.status().reason}"
needs_gpu = pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))

KERNEL = pytest.param("kernel", marks=needs_kernel)
both_paths = pytest.mark.parametrize("path", [KERNEL, "reference"])

MAP_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
GROUPS_AND_SUM = list(itertools.product([False, True], [False, True]))

Gather = Callable[[Tensor, Tensor, int, bool], Tensor]


def gather_by(path: str) -> Gather:
    if path == "kernel":
        return torch.ops.d2_decouple.point_gather
    return reference_point_gather


def points_dtype(maps: torch.dtype) -> torch.dtype:
    return torch.float64 if maps == torch.float64 else torch.float32


class Case(NamedTuple):
    """One call: groups is P where each point has channels of its own, else 1."""

    maps: Tensor
    points: Tensor
    groups: int
    sum_points: bool
    grad: Tensor  # of the result

    def to(self, device: str) -> "Case":
        maps, points, grad = (t.to(device) for t in (self.maps, self.points, self.grad))
        return self._replace(maps=maps, points=points, grad=grad)


class Results(NamedTuple):
    values: Tensor
    grad_maps: Tensor
    grad_points: Tensor


def results_of(path: str, case: Case) -> Results:
    """Results on the device of the case."""
    maps, points = (t.detach().requires_grad_() for t in (case.maps, case.points))
    values = gather_by(path)(maps, points, case.groups, case.sum_points)
    grads = torch.autograd.grad(values, (maps, points), case.grad)
    return Results(values.detach(), *grads)


def by_loops(case: Case) -> tuple[Results, Results]:
    """What the definition gives, in float64, and how large the terms are that it adds up.

    The second bounds the error of rounding: that of a sum is a few units in the last place of
    the sum of its terms' sizes. It is zero where nothing may be written.
    """
    maps, points, grad = (t.double().cpu().numpy() for t in (case.maps, case.points, case.grad))
    images, channels, height, width = maps.shape
    num_points = points.shape[1]
    share = channels // case.groups if case.groups else 0
    values, grad_maps, grad_points = (np.zeros(a.shape) for a in (grad, maps, points))
    sizes = [np.zeros(a.shape) for a in (grad, maps, points)]
    cells = itertools.product(range(images), range(num_points), *map(range, points.shape[3:]))
    for n, p, i, j in cells:
        x, y = points[n, p, :, i, j].tolist()
        if not (-1 < x < width and -1 < y < height):
            continue
        read = slice(p * share, (p + 1) * share) if case.groups == num_points else slice(0, share)
        written = slice(0, share) if case.sum_points else slice(p * share, (p + 1) * share)
        g = grad[n, written, i, j]
        left, top = math.floor(x), math.floor(y)
        for column, row in itertools.product((left, left + 1), (top, top + 1)):
            if not (0 <= column < width and 0 <= row < height):
                continue  # a cell outside is zero, and takes no gradient
            along = 1 - (x - left) if column == left else x - left
            down = 1 - (y - top) if row == top else y - top
            v = maps[n, read, row, column]
            values[n, written, i, j] += along * down * v
            grad_maps[n, read, row, column] += along * down * g
            grad_points[n, p, 0, i, j] += (down if column > left else -down) * (g @ v)
            grad_points[n, p, 1, i, j] += (along if row > top else -along) * (g @ v)
            sizes[0][n, written, i, j] += abs(v)
            sizes[1][n, read, row, column] += abs(g)
            sizes[2][n, p, :, i, j] += abs(g) @ abs(v)
    tensors = [torch.from_numpy(array) for array in (values, grad_maps, grad_points, *sizes)]
    return Results(*tensors[:3]), Results(*tensors[3:])


def assert_right(path: str, case: Case, got: Results | None = None) -> None:
    """The path's values and gradients are those of the loops, with dtypes and shapes.

    Sums are made in the points' dtype: 16 units in the last place of the terms' sizes is what
    weights, products and sums can lose. The reference computes its coordinates in another frame,
    and loses as many units more as there are cells. Half precision rounds once, at the end: half
    a unit of the result, which no sum in half precision could keep.
    """
    got = got or results_of(path, case)
    want, sizes = by_loops(case)
    units = 16 if path == "kernel" else 16 + 4 * max(case.maps.shape[-2:])
    slack = units * torch.finfo(case.points.dtype).eps
    for name, value, expected, size in zip(Results._fields, got, want, sizes, strict=True):
        dtype = case.points.dtype if name == "grad_points" else case.maps.dtype
        assert value.dtype == dtype, name
        assert value.shape == expected.shape, name
        allowed = slack * size
        if dtype in (torch.bfloat16, torch.float16):
            kind = torch.finfo(dtype)
            allowed = allowed + kind.eps / 2 * expected.abs() + kind.tiny * kind.eps * (size > 0)
        wrong = ~((value.double().cpu() - expected).abs() <= allowed)  # NaN is wrong, too
        assert not wrong.any(), (
            f"{path}: {name} is wrong in {int(wrong.sum())} of {wrong.numel()} places, first "
            f"{wrong.nonzero()[0].tolist()}: {value[wrong][0]} instead of {expected[wrong][0]}"
        )


def scattered(
    shape: tuple[int, ...], size: tuple[int, int], generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """Points (N, P, 2, Ho, Wo) in and around a map (H, W): between cells, on cells, ignored."""
    height, width = size
    images, num_points, _, rows, columns = shape
    points = torch.empty(images, num_points, 2, rows, columns, dtype=dtype)
    for axis, length in enumerate((width, height)):
        place = torch.rand(shape[:2] + shape[3:], generator=generator, dtype=dtype)
        place = place * (length + 4) - 2.5
        kind = torch.rand(place.shape, generator=generator)
        place = torch.where(kind < 0.25, place.round(), place)
        odd = torch.tensor(special_coordinates(length, dtype), dtype=dtype)
        drawn = odd[torch.randint(len(odd), place.shape, generator=generator)]
        points[:, :, axis] = torch.where(kind > 0.85, drawn, place)
    return points


def special_coordinates(length: int, dtype: torch.dtype) -> list[float]:
    """Where a comparison, a rounding or an index could go wrong along an axis of that length."""
    edges = torch.tensor([-1.0, -1.0, 0.0, 0.0, length - 1.0, length, length], dtype=dtype)
    towards = torch.tensor([-2.0, 0.0, -1.0, 1.0, length, 0.0, length + 1.0], dtype=dtype)
    beside = torch.nextafter(edges, towards).tolist()  # denormal numbers at zero
    return [
        *(-1.0, -0.0, 0.0, length - 1.0, float(length), *beside),
        *(math.nan, math.inf, -math.inf, 1e9, -1e9, 2.0**31, -(2.0**31), 2.0**63, -(2.0**63)),
        *(3e38, -3e38),
    ]


def make_case(
    *,
    seed: int = 0,
    images: int = 2,
    share: int = 3,
    num_points: int = 3,
    size: tuple[int, int] = (5, 6),
    out_size: tuple[int, int] = (3, 4),
    own_channels: bool = True,
    sum_points: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """A case with random maps and gradient; ``share`` channels are read at each point."""
    generator = torch.Generator().manual_seed(seed)
    groups = num_points if own_channels else 1
    share = share if groups else 0  # no point, and so no channel of its own
    shape = (images, num_points, 2, *out_size)
    points = scattered(shape, size, generator, points_dtype(dtype))
    channels = share if sum_points else num_points * share
    maps = torch.randn(images, groups * share, *size, generator=generator, dtype=torch.float64)
    grad = torch.randn(images, channels, *out_size, generator=generator, dtype=torch.float64)
    return Case(maps.to(dtype), points, groups, sum_points, grad.to(dtype))


def pretend(monkeypatch: pytest.MonkeyPatch, *, cpu: bool, cuda: bool, reason: str) -> None:
    """Let the functions believe that this is what was built."""
    status = extension.Status(loaded=cpu or cuda, cpu=cpu, cuda=cuda, reason=reason)
    monkeypatch.setattr(point_gather, "_EXTENSION", status)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms; memory that nobody wrote to is NaN meanwhile."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def resident(field: str = "VmRSS") -> int:
    """Bytes of memory that this process holds, or has held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(field)]
    return int(line.split()[1]) * 1024


def peak_growth(call: Callable[[], object]) -> int:
    """Bytes that a call takes beyond what is held before it, at its worst moment."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or it would take what was freed before, unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now on
        before = resident()
    except (AttributeError, OSError, TypeError) as error:
        pytest.skip(f"the peak of memory cannot be read on this system: {error}")
    call()
    return resident("VmHWM") - before
