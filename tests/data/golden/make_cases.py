# SPDX-License-Identifier: Apache-2.0
"""Make the golden cases of this folder by plain loops: ``python make_cases.py [FOLDER]``.

Nothing of the package, nor torch, is imported: it is what these numbers are to judge. A point
reads a map by *tents*: each cell counts with ``max(0, 1 - |distance|)`` per axis, which is what
bilinear means, without looking for a point's neighbours. Derivatives are those of a tent, from the
right where it has a kink.

All inputs are multiples of a power of two, so small that every product and sum below is exact in
float64: the expected numbers hold no rounding, and the order of the sums does not matter.
"""

import json
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FOLDER = Path(__file__).resolve().parent
NEAR = 2.0**-10  # how far beside a limit
FAR = (-1000.0, 1e4, 1e9, -1e9)
NOT_FINITE = (math.nan, math.inf, -math.inf)

Nested = list[Any]  # a tensor as lists of lists of numbers


class Problem(NamedTuple):
    """One entry of a case's ``config``."""

    label: str
    operator: str  # merge, concat or deformable
    batch: int
    num_points: int
    channels: int  # that a point reads
    map_size: tuple[int, int]  # rows, columns
    points_size: tuple[int, int]
    bias: bool = False
    where: str = "near"  # how points are chosen: near, limits or nonfinite

    def input_channel(self, point: int, channel: int) -> int:
        """Where ``point`` reads its ``channel``."""
        return channel if self.operator == "deformable" else point * self.channels + channel

    def output_channel(self, point: int, channel: int) -> int:
        """Where its value goes."""
        return channel if self.operator == "merge" else point * self.channels + channel

    @property
    def map_channels(self) -> int:
        """Of the map that is read."""
        return self.channels * (1 if self.operator == "deformable" else self.num_points)

    @property
    def out_channels(self) -> int:
        """Of the result."""
        return self.channels * (1 if self.operator == "merge" else self.num_points)


# The values on both sides of each limit and on whole numbers, for a map of 3 rows and 4 columns.
LIMIT_ROWS, LIMIT_COLUMNS = (
    [n + side for n in (-1.0, 0.0, 1.0, size - 1.0, size) for side in (-NEAR, 0.0, NEAR)]
    + [-0.0, 0.5, *FAR]
    for size in (3.0, 4.0)
)
LIMITS = (len(LIMIT_ROWS), len(LIMIT_COLUMNS))

CASES: dict[str, list[Problem]] = {
    "pdnet_collect_sizes": [
        Problem("merge", "merge", 2, 9, 3, (5, 6), (5, 6), bias=True),
        Problem("merge_c20", "merge", 1, 3, 20, (3, 4), (3, 4)),
        Problem("merge_twice", "merge", 1, 4, 3, (8, 10), (4, 5), bias=True),
        Problem("merge_coarser", "merge", 2, 9, 1, (3, 2), (5, 4), bias=True),
        Problem("merge_column", "merge", 2, 4, 3, (6, 1), (6, 1), bias=True),
        Problem("merge_one_cell", "merge", 1, 9, 3, (1, 1), (4, 4)),
        Problem("concat", "concat", 2, 4, 1, (5, 6), (5, 6)),
        Problem("concat_c3", "concat", 1, 2, 3, (4, 5), (3, 7), bias=True),
        Problem("concat_c20", "concat", 1, 2, 20, (4, 3), (4, 3), bias=True),
        Problem("concat_odd", "concat", 2, 4, 1, (7, 9), (4, 5), bias=True),
        Problem("concat_row", "concat", 2, 4, 3, (1, 7), (1, 7), bias=True),
    ],
    "pdnet_collect_limits": [
        Problem("concat", "concat", 1, 1, 2, (3, 4), LIMITS, where="limits"),
        Problem("merge", "merge", 1, 2, 1, (3, 4), LIMITS, bias=True, where="limits"),
        Problem("merge_nonfinite", "merge", 2, 3, 3, (4, 5), (4, 5), True, "nonfinite"),
        Problem("concat_nonfinite", "concat", 2, 3, 1, (4, 5), (2, 3), False, "nonfinite"),
    ],
    "deformable_points_sizes": [
        Problem("square", "deformable", 2, 9, 3, (5, 6), (5, 6)),
        Problem("c20", "deformable", 1, 2, 20, (3, 4), (2, 5)),
        Problem("c1", "deformable", 1, 4, 1, (7, 9), (4, 5)),
        Problem("column", "deformable", 1, 3, 3, (6, 1), (6, 1)),
        Problem("row", "deformable", 1, 3, 3, (1, 7), (1, 7)),
        Problem("one_point", "deformable", 1, 1, 3, (4, 4), (6, 6)),
        Problem("limits", "deformable", 1, 1, 2, (3, 4), LIMITS, where="limits"),
        Problem("nonfinite", "deformable", 1, 3, 2, (4, 5), (3, 3), where="nonfinite"),
    ],
}


# Inputs.


def draw(generator: random.Random, *shape: int) -> Nested:
    """Multiples of 1/64 between -2 and 2."""
    if len(shape) > 1:
        return [draw(generator, *shape[1:]) for _ in range(shape[0])]
    return [(math.floor(257 * generator.random()) - 128) / 64 for _ in range(shape[0])]


def draw_coordinate(generator: random.Random, cell: float, size: int, where: str) -> float:
    """Within 2.5 cells of ``cell``, on a whole number, at a limit of the map, or far outside."""
    kind = generator.random()
    if where == "nonfinite" and kind < 0.3:
        return NOT_FINITE[math.floor(3 * generator.random())]
    near = cell + (math.floor(5121 * generator.random()) - 2560) * NEAR
    if kind < 0.65:
        return near
    if kind < 0.8:
        return float(math.floor(near))
    if kind < 0.95:
        limit = (-1.0, 0.0, size - 1.0, float(size))[math.floor(4 * generator.random())]
        return limit + (-NEAR, 0.0, NEAR)[math.floor(3 * generator.random())]
    return FAR[math.floor(4 * generator.random())]


def draw_points(problem: Problem, generator: random.Random) -> Nested:
    """Points as [n][p][0 for y, 1 for x][i][j]."""
    rows, columns = problem.points_size
    points = []
    for _ in range(problem.batch * problem.num_points):
        ys, xs = ([[0.0] * columns for _ in range(rows)] for _ in range(2))
        for i in range(rows):
            for j in range(columns):
                if problem.where == "limits":
                    ys[i][j], xs[i][j] = LIMIT_ROWS[i], LIMIT_COLUMNS[j]
                    continue
                # Points of a coarser level lie on every second cell of a finer one.
                for values, cell, own, size in (
                    (ys, i, rows, problem.map_size[0]),
                    (xs, j, columns, problem.map_size[1]),
                ):
                    cell *= round(size / own) if size > own else 1
                    values[i][j] = draw_coordinate(generator, cell, size, problem.where)
        points.append([ys, xs])
    return [
        points[n * problem.num_points : (n + 1) * problem.num_points] for n in range(problem.batch)
    ]


# What is expected.


def tents(coordinate: float, size: int) -> Iterator[tuple[int, float, float]]:
    """(cell, weight, right-hand derivative of the weight) of the cells that a coordinate reads."""
    for cell in range(size):
        distance = coordinate - cell
        if -1 <= distance < 1:
            yield cell, 1 - abs(distance), 1 if distance < 0 else -1


def counts(y: float, x: float, size: tuple[int, int]) -> bool:
    """Whether a point is less than a cell outside; one that is no number is not."""
    return -1 < y < size[0] and -1 < x < size[1]


def read(plane: Nested, y: float, x: float) -> float:
    """The value of a channel [row][column] at a point."""
    size = len(plane), len(plane[0])
    if not counts(y, x, size):
        return 0
    return sum(
        plane[row][column] * across * along
        for row, across, _ in tents(y, size[0])
        for column, along, _ in tents(x, size[1])
    )


def zeros(*shape: int) -> Nested:
    """Nested lists of zeros."""
    return [zeros(*shape[1:]) if len(shape) > 1 else 0 for _ in range(shape[0])]


def visits(problem: Problem) -> Iterator[tuple[int, int, int, int, int]]:
    """(image, point, row, column, channel) of every value that is read."""
    rows, columns = problem.points_size
    for n in range(problem.batch):
        for p in range(problem.num_points):
            for i in range(rows):
                for j in range(columns):
                    for c in range(problem.channels):
                        yield n, p, i, j, c


def collect(problem: Problem, maps: Nested, points: Nested, bias: Nested | None) -> Nested:
    """The result [n][channel][row][column]."""
    out = zeros(problem.batch, problem.out_channels, *problem.points_size)
    for n, p, i, j, c in visits(problem):
        plane = maps[n][problem.input_channel(p, c)]
        ys, xs = points[n][p]
        out[n][problem.output_channel(p, c)][i][j] += read(plane, ys[i][j], xs[i][j])
    for n, o in ((n, o) for n in range(problem.batch) for o in range(problem.out_channels)):
        for row in out[n][o]:
            for j in range(len(row)):
                row[j] += bias[o] if bias else 0
    return out


def gradients(
    problem: Problem, maps: Nested, points: Nested, gout: Nested
) -> tuple[Nested, Nested, Nested]:
    """Of sum(out * gout), with respect to the map, the points and the bias."""
    of_map = zeros(problem.batch, problem.map_channels, *problem.map_size)
    of_points = zeros(problem.batch, problem.num_points, 2, *problem.points_size)
    for n, p, i, j, c in visits(problem):
        k = problem.input_channel(p, c)
        y, x = points[n][p][0][i][j], points[n][p][1][i][j]
        upstream = gout[n][problem.output_channel(p, c)][i][j]
        if not counts(y, x, problem.map_size):
            continue
        for row, across, across_slope in tents(y, problem.map_size[0]):
            for column, along, along_slope in tents(x, problem.map_size[1]):
                value = maps[n][k][row][column]
                of_map[n][k][row][column] += upstream * across * along
                of_points[n][p][0][i][j] += upstream * value * across_slope * along
                of_points[n][p][1][i][j] += upstream * value * across * along_slope
    of_bias = zeros(problem.out_channels)
    for image in gout:
        for o, plane in enumerate(image):
            of_bias[o] += sum(sum(row) for row in plane)
    return of_map, of_points, of_bias


# Files.

DOUBLE = {"rtol": 1e-12, "atol": 1e-12}
TOLERANCES = {
    "out": {"float32": {"rtol": 1e-5, "atol": 2e-5}, "float64": DOUBLE},
    "grad_map": {"float32": {"rtol": 1e-5, "atol": 5e-5}, "float64": DOUBLE},
    "grad_bias": {"float32": {"rtol": 1e-5, "atol": 5e-5}, "float64": DOUBLE},
    "grad_location": {"float32": {"rtol": 1e-5, "atol": 1e-4}, "float64": DOUBLE},
    "grad_points": {"float32": {"rtol": 1e-5, "atol": 1e-4}, "float64": DOUBLE},
}
MEANINGS = {
    "map": "(N, P*C or C, H, W)",
    "location": "(N, 2P, h, w), y and x of each point interleaved, in cells",
    "points": "(N, P, 2, h, w), (x, y) in cells",
    "bias": "added once to each channel of out",
    "gout": "upstream gradient of out",
    "out": "result",
    "grad_map": "gradient of sum(out * gout) with respect to map",
    "grad_location": "the same with respect to location",
    "grad_points": "the same with respect to points",
    "grad_bias": "the same with respect to bias",
}


def inputs_of(problem: Problem) -> tuple[Nested, Nested, Nested | None, Nested]:
    """Map, points, bias and upstream gradient."""
    generator = random.Random(f"{problem.operator} {problem.label}")
    return (
        draw(generator, problem.batch, problem.map_channels, *problem.map_size),
        draw_points(problem, generator),
        draw(generator, problem.out_channels) if problem.bias else None,
        draw(generator, problem.batch, problem.out_channels, *problem.points_size),
    )


def stored_points(problem: Problem, points: Nested) -> tuple[str, np.ndarray]:
    """[n][p][y or x][i][j] under the name and in the layout of the kind."""
    array = np.array(points, np.float64)
    if problem.operator == "deformable":
        return "points", array[:, :, ::-1]
    return "location", array.reshape(problem.batch, -1, *problem.points_size)


def solve(problem: Problem) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Arrays of the inputs and of the outputs, by the names of the kind."""
    maps, points, bias, gout = inputs_of(problem)
    name, array = stored_points(problem, points)
    inputs = {"map": np.array(maps), name: array}
    if bias:
        inputs["bias"] = np.array(bias)
    outputs = {"out": np.array(collect(problem, maps, points, bias), np.float64)}
    if not problem.label.endswith("nonfinite") or problem.operator == "deformable":
        inputs["gout"] = np.array(gout)
        of_map, of_points, of_bias = gradients(problem, maps, points, gout)
        outputs["grad_map"] = np.array(of_map, np.float64)
        outputs[f"grad_{name}"] = stored_points(problem, of_points)[1]
        if bias:
            outputs["grad_bias"] = np.array(of_bias, np.float64)
    return {key: value.astype(np.float32) for key, value in inputs.items()}, outputs


def make(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A case as the content of its two files."""
    arrays: dict[str, Any] = {}
    entries: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for problem in CASES[name]:
        for group, solved in zip(entries, solve(problem), strict=True):
            for key, array in solved.items():
                stored = f"{problem.label}.{key}"
                arrays[stored] = array
                entry: dict[str, Any] = {
                    "npz": stored,
                    "shape": list(array.shape),
                    "meaning": MEANINGS[key],
                }
                if group is entries[1]:
                    entry["tolerance"] = TOLERANCES[key]
                group[f"{problem.label}/{key}"] = entry
    header = {
        "kind": name.rsplit("_", 1)[0],
        "name": name,
        "source": "make_cases.py",
        "dtype": "float64",
        "seed": 0,
        "config": {problem.label: describe(problem) for problem in CASES[name]},
        "weights": {"rule": "crc32-pcg64", "entries": []},
        "inputs": entries[0],
        "outputs": entries[1],
    }
    return header, arrays


def describe(problem: Problem) -> dict[str, Any]:
    """Its entry in ``config``."""
    fields = problem._asdict()
    fields["channels_per_point"] = fields.pop("channels")
    for name in ("label", "where"):
        del fields[name]
    return {key: list(x) if isinstance(x, tuple) else x for key, x in fields.items()}


def main(folder: Path = FOLDER) -> None:
    """Write all cases into ``folder``."""
    for name in CASES:
        header, arrays = make(name)
        text = json.dumps(header, indent=1) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
        np.savez_compressed(folder / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
