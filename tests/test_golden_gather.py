# SPDX-License-Identifier: Apache-2.0
"""Golden numbers of the gather: on each path, and that a wrong gather does not pass."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_tools import OWN_CASES, PUBLIC_CASES, ROOT, TOOL, change_entry, load
from torch import Tensor

from d2_decouple.layers.point_gather import (
    deformable_point_gather,
    dynamic_point_gather,
    reference_point_gather,
)

KINDS = ("pdnet_collect", "deformable_points")
FOLDERS = [OWN_CASES, PUBLIC_CASES] if PUBLIC_CASES.is_dir() else [OWN_CASES]

# (maps, points, groups, sum_points) -> result
Gather = Callable[[Tensor, Tensor, int, bool], Tensor]


@pytest.fixture(scope="module")
def golden() -> Any:
    return load(TOOL)


def exchange(monkeypatch: pytest.MonkeyPatch, gather: Gather) -> None:
    """Let the adapters run ``gather`` in place of the package's two functions."""
    adapters = sys.modules["golden_adapters.point_gather"]

    def dynamic(maps: Tensor, points: Tensor, reduction: str) -> Tensor:
        return gather(maps, points, points.shape[1], reduction == "sum")

    def deformable(maps: Tensor, points: Tensor) -> Tensor:
        return gather(maps, points, 1, False)

    monkeypatch.setattr(adapters, "dynamic_point_gather", dynamic)
    monkeypatch.setattr(adapters, "deformable_point_gather", deformable)


def run(golden: Any, folder: Path, kind: str) -> bool:
    return golden.main([str(folder), "--only", kind]) == 0


def exceeded(table: str) -> set[str]:
    """Names of the outputs, without the problem's, that did not meet their tolerance."""
    lines = [line for line in table.splitlines() if line.endswith("EXCEEDED")]
    return {line.split()[0].rsplit("/", 1)[1] for line in lines}


def public_functions(maps: Tensor, points: Tensor, groups: int, sum_points: bool) -> Tensor:
    if groups == 1 and points.shape[1] > 1:
        return deformable_point_gather(maps, points)
    return dynamic_point_gather(maps, points, "sum" if sum_points else "none")


def channels_last(maps: Tensor, *others: Any) -> Tensor:
    return public_functions(maps.contiguous(memory_format=torch.channels_last), *others)


def points_innermost(maps: Tensor, points: Tensor, *others: Any) -> Tensor:
    """As a channels-last convolution writes them."""
    innermost = points.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    return public_functions(maps, innermost, *others)


PATHS: dict[str, Gather] = {
    "public functions": public_functions,
    "channels last": channels_last,
    "points innermost": points_innermost,
    "reference": reference_point_gather,
}


@pytest.mark.parametrize("path", PATHS)
def test_every_path_passes(
    golden: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    path: str,
) -> None:
    exchange(monkeypatch, PATHS[path])
    for folder in FOLDERS:
        assert run(golden, folder, "pdnet_collect"), capsys.readouterr()
    assert run(golden, OWN_CASES, "deformable_points"), capsys.readouterr()


def test_command_from_another_folder_without_the_extension(tmp_path: Path) -> None:
    """The checkout is not on the path; the script finds its parts and the package by itself."""
    elsewhere = [x for x in sys.path if x and not Path(x).resolve().is_relative_to(ROOT)]
    settings = {"PYTHONPATH": os.pathsep.join(elsewhere), "D2D_USE_EXT": "0"}
    done = subprocess.run(
        [sys.executable, str(TOOL), str(OWN_CASES)],
        env={**os.environ, **settings, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "D2D_USE_EXT=0" in done.stdout.splitlines()[0]
    assert "cases: 3; all within tolerance" in done.stdout


def by_corners(
    maps: Tensor,
    points: Tensor,
    groups: int,
    sum_points: bool,
    *,
    floor: Callable[[Tensor], Tensor] = torch.floor,
    after: Callable[[Tensor, float], Tensor] = torch.gt,
    border: bool = False,
) -> Tensor:
    """A gather cell by cell, which its last three arguments make wrong."""
    images, channels, height, width = maps.shape
    num_points, share = points.shape[1], channels // groups
    x, y = points.unbind(2)
    counted = after(x, -1) & after(y, -1) & (x < width) & (y < height)
    x, y = torch.where(counted, x, 0), torch.where(counted, y, 0)
    left, top = floor(x.detach()), floor(y.detach())
    cells = maps.reshape(images, groups, share, height * width)
    cells = cells.expand(images, num_points, share, -1)
    values = maps.new_zeros(images, num_points, share, *points.shape[3:])
    for row, across in ((top, top + 1 - y), (top + 1, y - top)):
        for column, along in ((left, left + 1 - x), (left + 1, x - left)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            index = index.long().flatten(2)[:, :, None].expand(-1, -1, share, -1)
            weight = across * along * (counted & (inside | border))
            values = values + weight[:, :, None] * cells.gather(3, index).view_as(values)
    return values.sum(1) if sum_points else values.flatten(1, 2)


def channels_in_other_order(maps: Tensor, points: Tensor, groups: int, sum_points: bool) -> Tensor:
    """Point p reads the channels c * P + p; a single group is one channel after another, mixed."""
    mixed = maps.unflatten(1, (-1, groups)).transpose(1, 2).flatten(1, 2)
    return by_corners(mixed if groups > 1 else maps.flip(1), points, groups, sum_points)


def with_points(change: Callable[[Tensor], Tensor]) -> Gather:
    return lambda maps, points, *others: by_corners(maps, change(points), *others)


GRADIENTS = {"grad_location", "grad_points"}
ALL = {"out", "grad_map", *GRADIENTS}

# What is wrong, and the outputs that must show it.
WRONG: dict[str, tuple[Gather, set[str]]] = {
    "left-hand derivative": (partial(by_corners, floor=lambda x: x.ceil() - 1), GRADIENTS),
    "a point on -1 counts": (partial(by_corners, after=torch.ge), GRADIENTS),
    "border continued": (partial(by_corners, border=True), ALL),
    "points moved to the border": (with_points(lambda x: x.clamp(0, 3)), ALL),
    "x and y swapped": (with_points(lambda x: x.flip(2)), ALL),
    "cells begin at whole numbers": (with_points(lambda x: x - 0.5), ALL),
    "coordinates of half precision": (with_points(lambda x: x.bfloat16().to(x.dtype)), ALL),
    "NaN is zero": (with_points(lambda x: x.nan_to_num()), {"out"}),
    "other order of channels": (channels_in_other_order, ALL),
}


def test_the_gather_that_is_made_wrong_is_right(
    golden: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exchange(monkeypatch, by_corners)
    for kind in KINDS:
        assert run(golden, OWN_CASES, kind), capsys.readouterr()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_gather_fails(
    golden: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mistake: str,
    kind: str,
) -> None:
    gather, wanted = WRONG[mistake]
    exchange(monkeypatch, gather)
    assert not run(golden, OWN_CASES, kind)
    seen = exceeded(capsys.readouterr().out)
    absent = "grad_points" if kind == "pdnet_collect" else "grad_location"
    assert seen >= wanted - {absent}
    assert wanted != GRADIENTS or seen <= GRADIENTS  # the values alone would not have shown it


def test_gather_without_gradients_fails(
    golden: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exchange(monkeypatch, with_points(Tensor.detach))
    assert not run(golden, OWN_CASES, "pdnet_collect")
    message = capsys.readouterr().err
    assert "pdnet_collect_sizes.json: cannot be run in float32" in message


DAMAGES: dict[str, tuple[str, Any, list[str]]] = {
    "unknown operator": ("config/concat_row/operator", "median", ["'median'", "concat", "merge"]),
    "no operator": ("config/concat_row/operator", None, ["'operator'"]),
    "no map": ("inputs/concat_row//map", None, ["'concat_row/map'"]),
    "odd coordinates": (
        "inputs/concat_row//location",
        {"value": [[[[0.5]]] * 3]},
        ["cannot be run in float32"],
    ),
    "maps of other channels": (
        "inputs/concat_row//map",
        {"value": [[[[1.0]]] * 5] * 2},
        ["cannot be run in float32", "5 channels", "4"],
    ),
    "no gout": ("inputs/concat_row//gout", None, ["'concat_row/grad_map' is not compared"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_case_fails(
    golden: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    place, value, named = DAMAGES[damage]
    for suffix in (".json", ".npz"):
        shutil.copy(OWN_CASES / f"pdnet_collect_sizes{suffix}", tmp_path)
    path = tmp_path / "pdnet_collect_sizes.json"
    keys = [key.replace("|", "/") for key in place.replace("//", "|").split("/")]
    change_entry(path, keys, value)
    assert not run(golden, tmp_path, "pdnet_collect")
    message = capsys.readouterr().err
    assert "pdnet_collect_sizes" in message
    assert all(part in message for part in named), message
