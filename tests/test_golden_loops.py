# SPDX-License-Identifier: Apache-2.0
"""The numbers of ``tests/data/golden``: made by its script, exact, and gradients of its values."""

import ast
import json
import math
import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from golden_tools import OWN_CASES, load

loops: Any = load(OWN_CASES / "make_cases.py")
PROBLEMS = [problem for problems in loops.CASES.values() for problem in problems]
FINITE = [problem for problem in PROBLEMS if problem.where != "nonfinite"]
STEP = loops.NEAR / 2  # of a difference: no point lies nearer to a whole number, unless on it


def names(problem: Any) -> str:
    return f"{problem.operator}-{problem.label}"


def total(gout: list[Any], out: list[Any]) -> float:
    """sum(out * gout), of nested lists."""
    if isinstance(out, list):
        return sum(total(a, b) for a, b in zip(gout, out, strict=True))
    return gout * out


@pytest.mark.parametrize("name", loops.CASES)
def test_script_makes_the_committed_files(name: str) -> None:
    header, arrays = loops.make(name)
    text = (OWN_CASES / f"{name}.json").read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(json.dumps(header))
    with np.load(OWN_CASES / f"{name}.npz") as stored:
        assert set(stored.files) == set(arrays)
        for key, array in arrays.items():
            assert stored[key].dtype == array.dtype
            assert stored[key].shape == array.shape
            assert stored[key].tobytes() == array.tobytes(), key  # -0.0 and NaN included


def test_folder_is_small_and_holds_nothing_else() -> None:
    files = {path.name for path in OWN_CASES.iterdir() if path.name != "__pycache__"}
    cases = {f"{name}.{suffix}" for name in loops.CASES for suffix in ("json", "npz")}
    assert files == cases | {"README.md", "make_cases.py"}
    assert sum((OWN_CASES / name).stat().st_size for name in files) < 300_000


def test_script_shares_no_code_with_the_package() -> None:
    tree = ast.parse((OWN_CASES / "make_cases.py").read_text(encoding="utf-8"))
    imported = {
        x.name for node in ast.walk(tree) if isinstance(node, ast.Import) for x in node.names
    }
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {
        "collections.abc",
        "json",
        "math",
        "numpy",
        "pathlib",
        "random",
        "sys",
        "typing",
    }


def test_cases_have_something_to_tell() -> None:
    for operator in ("merge", "concat", "deformable"):
        own = [problem for problem in PROBLEMS if problem.operator == operator]
        assert {1, 3, 20} <= {problem.channels for problem in own}
        assert any(problem.where == "limits" for problem in own)
        assert any(problem.where == "nonfinite" for problem in own)
    assert {problem.bias for problem in PROBLEMS if problem.operator == "concat"} == {True, False}
    sizes = {problem.map_size for problem in PROBLEMS}
    assert any(height == 1 < width for height, width in sizes)
    assert any(width == 1 < height for height, width in sizes)
    for size, limits in zip((3, 4), (loops.LIMIT_ROWS, loops.LIMIT_COLUMNS), strict=True):
        near = {n + side for n in (-1, 0, size - 1, size) for side in (-(2**-10), 0, 2**-10)}
        assert near | {1, 1e9, -1e9} <= set(limits)
    for problem in PROBLEMS:
        points = np.array(loops.inputs_of(problem)[1])
        nonfinite = (np.isnan(points).any(), np.isposinf(points).any(), np.isneginf(points).any())
        assert nonfinite == ((problem.where == "nonfinite",) * 3)
        assert (points == np.floor(points)).any()
        assert (points != np.floor(points)).any()
        assert (np.abs(points[np.isfinite(points)]) < max(problem.map_size)).any()


@pytest.mark.parametrize("problem", FINITE, ids=names)
def test_expected_numbers_are_exact(problem: Any) -> None:
    """Fractions give the same: neither rounding nor the order of a sum is in them."""

    def exact(numbers: Any) -> Any:
        return [exact(x) for x in numbers] if isinstance(numbers, list) else Fraction(numbers)

    maps, points, bias, gout = loops.inputs_of(problem)
    inputs = exact(maps), exact(points)
    assert loops.collect(problem, *inputs, bias and exact(bias)) == loops.collect(
        problem, maps, points, bias
    )
    assert loops.gradients(problem, *inputs, exact(gout)) == loops.gradients(
        problem, maps, points, gout
    )


@pytest.mark.parametrize("problem", PROBLEMS, ids=names)
def test_gradient_of_points_is_a_difference_of_values(problem: Any) -> None:
    """On both sides between two cells, to the right on a whole number, zero where ignored."""
    maps, points, _, gout = loops.inputs_of(problem)
    _, of_points, _ = loops.gradients(problem, maps, points, gout)

    def value(n: int, p: int, i: int, j: int, y: float, x: float) -> float:
        return sum(
            gout[n][problem.output_channel(p, c)][i][j]
            * loops.read(maps[n][problem.input_channel(p, c)], y, x)
            for c in range(problem.channels)
        )

    places = {(n, p, i, j) for n, p, i, j, _ in loops.visits(problem)}
    kinks, smooth, ignored = 0, 0, 0
    for n, p, i, j in places:
        y, x = (points[n][p][axis][i][j] for axis in (0, 1))
        got = [of_points[n][p][axis][i][j] for axis in (0, 1)]
        height, width = problem.map_size
        if not (-1 < y < height and -1 < x < width):
            ignored += 1
            assert value(n, p, i, j, y, x) == 0
            assert got == [0, 0]
            continue
        for axis, coordinate in enumerate((y, x)):
            back = 0 if coordinate == math.floor(coordinate) else STEP
            kinks, smooth = kinks + (back == 0), smooth + (back > 0)
            ends = [(y + side, x) if axis == 0 else (y, x + side) for side in (STEP, -back)]
            after, before = (value(n, p, i, j, *end) for end in ends)
            assert got[axis] == (after - before) / (STEP + back), (n, p, i, j, axis)
    assert min(kinks, smooth, ignored) > 0


@pytest.mark.parametrize("problem", PROBLEMS, ids=names)
def test_gradients_of_map_and_bias_are_those_of_a_sum(problem: Any) -> None:
    """Both enter linearly: along any direction, the result's change is its own value there."""
    maps, points, _, gout = loops.inputs_of(problem)
    of_map, _, of_bias = loops.gradients(problem, maps, points, gout)
    generator = random.Random(0)
    direction = loops.draw(generator, problem.batch, problem.map_channels, *problem.map_size)
    change = loops.collect(problem, direction, points, None)
    assert total(gout, change) == total(of_map, direction) != 0
    nothing = loops.zeros(problem.batch, problem.map_channels, *problem.map_size)
    shift = loops.draw(generator, problem.out_channels)
    assert total(gout, loops.collect(problem, nothing, points, shift)) == total(of_bias, shift)
