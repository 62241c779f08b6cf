# SPDX-License-Identifier: Apache-2.0
"""TSCODE's equations by plain loops over channels and cells, from its fact sheet's sections 2-8.

A map is a list of channels, a channel a list of rows, a row a list of numbers.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

Map = list[list[list[float]]]
Size = tuple[int, int]


def size_of(x: Map) -> Size:
    return len(x[0]), len(x[0][0])


def make(channels: int, size: Size, value: Callable[[int, int, int], float]) -> Map:
    height, width = size
    rows, columns = range(height), range(width)
    return [[[value(c, y, x) for x in columns] for y in rows] for c in range(channels)]


def added(*maps: Map | None) -> Map:
    """The sum of those that exist."""
    known = [x for x in maps if x is not None]
    return make(
        len(known[0]), size_of(known[0]), lambda c, y, x: sum(one[c][y][x] for one in known)
    )


def copied(x: Map, factor: int, size: Size) -> Map:
    """Each cell ``factor`` times in both directions; what is beyond ``size`` is cut off."""
    return make(len(x), size, lambda c, row, column: x[c][row // factor][column // factor])


def window(x: Map, channel: int, cell: Size, kernel: int) -> list[tuple[int, int, float]]:
    """(i, j, value) of what a kernel of stride 2 around (2y, 2x) covers inside the map."""
    height, width = size_of(x)
    top, left = (2 * index - kernel // 2 for index in cell)
    return [
        (i, j, x[channel][top + i][left + j])
        for i in range(kernel)
        for j in range(kernel)
        if 0 <= top + i < height and 0 <= left + j < width
    ]


def halved(x: Map) -> Size:
    height, width = size_of(x)
    return (height + 1) // 2, (width + 1) // 2


def strided(x: Map, weight: Tensor, bias: Tensor, relu: bool) -> Map:
    """A convolution of stride 2, padded with zeros so that sizes are halved and rounded up."""
    weights, biases, kernel = weight.tolist(), bias.tolist(), weight.shape[-1]

    def value(out: int, row: int, column: int) -> float:
        total = biases[out] + sum(
            weights[out][channel][i][j] * number
            for channel in range(len(x))
            for i, j, number in window(x, channel, (row, column), kernel)
        )
        return max(total, 0.0) if relu else total

    return make(len(biases), halved(x), value)


def average(x: Map, kernel: int) -> Map:
    """Padding counts as zeros."""
    return make(
        len(x),
        halved(x),
        lambda c, row, column: sum(v for *_, v in window(x, c, (row, column), kernel)) / kernel**2,
    )


def greatest(x: Map, kernel: int) -> Map:
    """Padding does not count."""
    return make(
        len(x),
        halved(x),
        lambda c, row, column: max(v for *_, v in window(x, c, (row, column), kernel)),
    )


def second_cells(x: Map) -> Map:
    """Every second cell in both directions, beginning with the first."""
    return make(len(x), halved(x), lambda c, row, column: x[c][2 * row][2 * column])


class Pyramid:
    """Levels, the map below them, and the convolution DConv; beyond them there is None."""

    def __init__(self, low: Map, levels: Sequence[Map], down: Callable[[Map], Map]) -> None:
        self.low, self.levels, self.down = low, levels, down

    def at(self, index: int) -> Map:
        return self.low if index < 0 else self.levels[index]

    def up(self, index: int, steps: int) -> Map | None:
        """Level ``index + steps`` at the size of level ``index``."""
        if index + steps >= len(self.levels):
            return None
        return copied(self.levels[index + steps], 2**steps, size_of(self.at(index)))

    def detail(self, index: int) -> Map:
        """DConv(up(P_l) + P_{l-1})."""
        finer = self.at(index - 1)
        return self.down(added(finer, copied(self.at(index), 2, size_of(finer))))


# Table 3, and the sheet's readings of what the paper does not write out.
FORMULAS: dict[tuple[str, ...], Callable[[Pyramid, int], Map]] = {
    ("self",): lambda P, k: P.at(k),
    ("self", "up1"): lambda P, k: added(P.at(k), P.up(k, 1)),
    ("self", "low"): lambda P, k: added(P.at(k), P.detail(k)),
    ("up1", "low"): lambda P, k: added(P.down(P.at(k - 1)), P.up(k, 1)),
    ("self", "up1", "low"): lambda P, k: added(P.at(k), P.up(k, 1), P.detail(k)),
    ("self", "up1", "up2", "low"): lambda P, k: added(
        *(P.at(k), P.up(k, 1), P.up(k, 2), P.detail(k))
    ),
    ("low",): lambda P, k: P.down(P.at(k - 1)),
    ("self", "up2"): lambda P, k: added(P.at(k), P.up(k, 2)),
}


def semantics(levels: Sequence[Map], reduced: Sequence[Map], top: Map) -> list[Map]:
    """Concat(DConv(P_l), P_{l+1}), DConv first; ``top`` stands for the level above the last."""
    return [a + b for a, b in zip(reduced, [*levels[1:], top], strict=True)]


def rearranged(x: Map, channels: int, size: Size) -> Map:
    """Channel (2i + j) * N + c of cell (y, x) is channel c of cell (2y + i, 2x + j)."""
    return make(
        channels,
        size,
        lambda c, row, column: x[(2 * (row % 2) + column % 2) * channels + c][row // 2][
            column // 2
        ],
    )
