# SPDX-License-Identifier: Apache-2.0
"""The kernel's results do not depend on how the work is split: bit for bit."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers_of_point_gather import (
    GROUPS_AND_SUM,
    Case,
    Results,
    deterministic,
    needs_kernel,
    points_dtype,
    results_of,
    threads,
)
from util import environment

pytestmark = needs_kernel

LAYOUTS = [torch.contiguous_format, torch.channels_last]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=["planes", "channels_last"])
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
GATHERED = (60, 80)
"""Locations of a case: 4800, and 9 points each, are enough to be split among threads."""


def crowded(
    own_channels: bool,
    sum_points: bool,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
    *,
    share: int = 20,
    images: int = 1,
) -> Case:
    """Half the points lie in one cell, where every thread adds; the others are all over the map."""
    generator = torch.Generator().manual_seed(3)
    groups, kept = 9 if own_channels else 1, share if sum_points else 9 * share
    points = torch.rand(images, 9, 2, *GATHERED, generator=generator)
    everywhere = points * torch.tensor((42.0, 27.0))[:, None, None] - 1
    points = torch.where(torch.rand(points[:, :, :1].shape, generator=generator) < 0.5, 7, 0) + (
        torch.where(torch.arange(9)[:, None, None, None] % 2 == 0, points, everywhere)
    )
    maps = torch.randn(images, groups * share, 25, 40, generator=generator).to(dtype)
    grad = torch.randn(images, kept, *GATHERED, generator=generator).to(dtype)
    return Case(
        maps.contiguous(memory_format=layout),
        points.to(points_dtype(dtype)),
        groups,
        sum_points,
        grad.contiguous(memory_format=layout),
    )


def same_bits(one: Results, other: Results) -> bool:
    return all(a.equal(b) for a, b in zip(one, other, strict=True))


@every_layout
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("own_channels", "sum_points"), GROUPS_AND_SUM)
def test_any_number_of_threads_gives_the_same_bits(
    own_channels: bool, sum_points: bool, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    case = crowded(own_channels, sum_points, dtype, layout)
    with threads(1):
        alone = results_of("kernel", case)
    assert all(result.isfinite().all() for result in alone)
    for count in (2, 3):
        with threads(count):
            assert same_bits(alone, results_of("kernel", case)), count


@every_layout
@pytest.mark.parametrize("own_channels", [True, False])
@pytest.mark.parametrize("share", [1, 33, 64])
def test_other_widths_and_two_images(
    share: int, own_channels: bool, layout: torch.memory_format
) -> None:
    """A block of channels may end in the middle of a vector, or at an image's end."""
    case = crowded(own_channels, own_channels, layout=layout, share=share, images=2)
    with threads(1):
        alone = results_of("kernel", case)
    for count in (2, 3):
        with threads(count):
            assert same_bits(alone, results_of("kernel", case)), count


@every_layout
@pytest.mark.parametrize(("own_channels", "sum_points"), GROUPS_AND_SUM)
def test_deterministic_algorithms_are_allowed(
    own_channels: bool, sum_points: bool, layout: torch.memory_format
) -> None:
    """PyTorch raises where an operator would not be; this one needs no other path."""
    case = crowded(own_channels, sum_points, layout=layout)
    usual = results_of("kernel", case)
    with deterministic(), threads(2):
        assert same_bits(usual, results_of("kernel", case))


@every_layout
@pytest.mark.parametrize(("own_channels", "sum_points"), GROUPS_AND_SUM)
def test_crowded_points_equal_the_reference(
    own_channels: bool, sum_points: bool, layout: torch.memory_format
) -> None:
    """Thousands of terms in one cell: in float64, where their order does not show."""
    case = crowded(own_channels, sum_points, torch.float64, layout, share=5)
    with threads(2):
        got = results_of("kernel", case)
    assert want_is_crowded(case)
    for value, want in zip(got, results_of("reference", case), strict=True):
        torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-10)


def want_is_crowded(case: Case) -> bool:
    x, y = case.points.floor().unbind(2)
    inside = (x >= 0) & (x < 39) & (y >= 0) & (y < 24)
    cells = (y * 40 + x)[inside].long()
    return int(cells.bincount().max()) > 5000


def test_half_precision_adds_in_float32() -> None:
    """4800 times 1 in one cell: bfloat16 sums would stop at 256, those of float16 at 2048."""
    for dtype in (torch.bfloat16, torch.float16):
        for layout in LAYOUTS:
            maps = torch.ones(1, 3, 2, 2, dtype=dtype).contiguous(memory_format=layout)
            points = torch.zeros(1, 1, 2, *GATHERED)
            case = Case(maps, points, 1, True, torch.ones(1, 3, *GATHERED, dtype=dtype))
            got = results_of("kernel", case)
            want = torch.tensor(4800.0).to(dtype)
            assert got.grad_maps[:, :, 0, 0].eq(want).all()


INSTRUCTION_SETS = {
    "default": "",
    "avx2": "avx2 fma f16c",
    "avx512": "avx512f avx512bw avx512vl avx512dq",
}
COMPARE = """
import torch
from helpers_of_point_gather import GROUPS_AND_SUM, MAP_DTYPES, assert_right, make_case, results_of
for dtype in MAP_DTYPES:
    for own_channels, sum_points in GROUPS_AND_SUM:
        for share in (1, 8, 33, 161):
            options = dict(own_channels=own_channels, sum_points=sum_points, dtype=dtype)
            case = make_case(share=share, out_size=(2, 5), images=1, **options)
            assert_right("kernel", case)
            maps = case.maps.contiguous(memory_format=torch.channels_last)
            assert_right("kernel", case._replace(maps=maps))
print(results_of("kernel", make_case(share=80)).values.flatten().tolist())
"""


def processor_lacks(instruction_set: str) -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    return [flag for flag in INSTRUCTION_SETS[instruction_set].split() if flag not in flags]


def run_with(instruction_set: str, code: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the variable is read once."""
    env = environment() | {"D2D_CPU_CAPABILITY": instruction_set}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), env["PYTHONPATH"]])
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


@cache
def results_with(instruction_set: str) -> str:
    done = run_with(instruction_set, COMPARE)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_each_instruction_set_is_right(instruction_set: str) -> None:
    if lacking := processor_lacks(instruction_set):
        pytest.skip(f"this processor has no {', '.join(lacking)}")
    assert results_with(instruction_set)


def test_instruction_set_can_be_chosen() -> None:
    """A product and a sum in one instruction round once, so the last bits tell what ran."""
    if lacking := processor_lacks("avx2"):
        pytest.skip(f"this processor has no {', '.join(lacking)}")
    assert results_with("default") != results_with("avx2")


def test_other_names_of_instruction_sets_are_an_error() -> None:
    code = "import torch, helpers_of_point_gather as h; h.results_of('kernel', h.make_case())"
    done = run_with("sse", code)
    assert "D2D_CPU_CAPABILITY is 'sse'; wanted is default, avx2 or avx512" in done.stderr
