# SPDX-License-Identifier: Apache-2.0
"""SALT's points and what is read at them, by plain loops: no torch, nothing of the package.

In the authors' order: y before x, nine points by the taps of a 3x3 kernel.
"""

import math
from collections.abc import Sequence

import numpy as np

Point = tuple[float, float]  # (y, x) in cells, relative to the cell


def box_points(distances: Sequence[float], scales: Sequence[float]) -> list[Point]:
    """The nine points of a coarse box with sides (left, top, right, bottom): the paper's Eq. 2."""
    left, top, right, bottom = distances
    height, width = top + bottom, left + right

    def y(index: int) -> float:
        return height * scales[index] - top

    def x(index: int) -> float:
        return width * scales[index] - left

    return [
        (y(4), x(5)),
        (-top, x(1)),
        (y(6), x(7)),
        (y(0), -left),
        (y(8), x(9)),
        (y(2), right),
        (y(10), x(11)),
        (bottom, x(3)),
        (y(12), x(13)),
    ]


def read(feature: np.ndarray, y: float, x: float) -> np.ndarray:
    """(C,) of a map (C, H, W) between its cells; outside it is zero."""
    found = np.zeros(len(feature))
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < feature.shape[1] and 0 <= column < feature.shape[2]:
                share = (1 - abs(y - row)) * (1 - abs(x - column))
                found += share * feature[:, row, column]
    return found


def aligned(feature: np.ndarray, points: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(C, H, W) read at points (18, H, W), which are relative to each cell, by a 3x3 kernel."""
    out = np.zeros((len(weight), *points.shape[1:]))
    for row in range(points.shape[1]):
        for column in range(points.shape[2]):
            for tap in range(9):
                y, x = points[2 * tap : 2 * tap + 2, row, column]
                values = read(feature, row + y, column + x)
                out[:, row, column] += weight[:, :, tap // 3, tap % 3] @ values
    return out
