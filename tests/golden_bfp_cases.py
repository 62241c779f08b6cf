# SPDX-License-Identifier: Apache-2.0
"""A balanced pyramid by plain loops, and a golden case of it: nothing of the package, no torch."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from golden_pdnet_cases import draw, write
from golden_pdnet_head import rule

CHANNELS = 3
SIZES = [(9, 12), (5, 6), (3, 3), (2, 2), (1, 1)]
NON_LOCAL = {
    "reduction": 1,
    "use_scale": False,
    "mode": "embedded_gaussian",
    "sub_sample": False,
}
LAYERS = ("g", "theta", "phi", "conv_out")
WEIGHTS: list[Any] = [
    entry
    for layer in LAYERS
    for entry in (
        [f"refine.{layer}.conv.weight", [CHANNELS, CHANNELS, 1, 1], 0.9, 0.0],
        [f"refine.{layer}.conv.bias", [CHANNELS], 0.3, 0.0],
    )
]

Size = tuple[int, int]


def shrunk(x: np.ndarray, size: Size) -> np.ndarray:
    """(C, H, W) -> (C, *size): maxima of windows from floor(i H / h) to ceil((i + 1) H / h)."""
    out = np.zeros((len(x), *size))
    for row, column in np.ndindex(*size):
        (top, bottom), (left, right) = (
            (index * have // want, -((-(index + 1) * have) // want))
            for index, have, want in zip((row, column), x.shape[1:], size, strict=True)
        )
        out[:, row, column] = x[:, top:bottom, left:right].max((1, 2))
    return out


def nearest(x: np.ndarray, size: Size) -> np.ndarray:
    """(C, H, W) -> (C, *size): cell i is copied from floor(i H / h)."""
    out = np.zeros((len(x), *size))
    for row, column in np.ndindex(*size):
        out[:, row, column] = x[:, row * x.shape[1] // size[0], column * x.shape[2] // size[1]]
    return out


def refined(x: np.ndarray, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """(C, H, W) -> the same; every cell reads all cells, by how alike they are."""
    cells = [x[:, row, column] for row, column in np.ndindex(*x.shape[1:])]

    def layer(name: str, vector: np.ndarray) -> np.ndarray:
        matrix = weights[f"refine.{name}.conv.weight"][:, :, 0, 0]
        return np.asarray(matrix @ vector + weights[f"refine.{name}.conv.bias"])

    keys, values = [layer("phi", cell) for cell in cells], [layer("g", cell) for cell in cells]
    out = np.zeros_like(x)
    for (row, column), cell in zip(np.ndindex(*x.shape[1:]), cells, strict=True):
        query = layer("theta", cell)
        shares = [math.exp(float(query @ key)) for key in keys]
        pairs = zip(shares, values, strict=True)
        read = sum((share * value for share, value in pairs), np.zeros(len(x))) / sum(shares)
        out[:, row, column] = cell + layer("conv_out", read)
    return out


def balanced(
    maps: Sequence[np.ndarray], weights: Mapping[str, np.ndarray], level: int
) -> list[np.ndarray]:
    """Maps (C, H_l, W_l), finest first -> the same, refined at the size of ``level``."""
    size = (maps[level].shape[1], maps[level].shape[2])
    mean = np.zeros_like(maps[level])
    for index, x in enumerate(maps):
        mean += (shrunk if index < level else nearest)(x, size) / len(maps)
    mean = refined(mean, weights)
    return [
        x + (nearest if index < level else shrunk)(mean, (x.shape[1], x.shape[2]))
        for index, x in enumerate(maps)
    ]


def write_case(folder: Path, level: int = 1) -> Path:
    """Two images; no size is twice the next."""
    names = [f"feature/{index}" for index in range(len(SIZES))]
    shapes = [(2, CHANNELS, *size) for size in SIZES]
    inputs = {name: rule(name, shape) for name, shape in zip(names, shapes, strict=True)}
    weights = {name: draw(name, *entry) for name, *entry in WEIGHTS}
    drawn = [draw(name, shape) for name, shape in zip(names, shapes, strict=True)]
    images = [balanced([x[image] for x in drawn], weights, level) for image in range(2)]
    outputs = {f"out/{index}": np.stack(x) for index, x in enumerate(zip(*images, strict=True))}
    config = {
        "channels": CHANNELS,
        "num_levels": len(SIZES),
        "refine_level": level,
        "refine_type": "non_local",
        "non_local": NON_LOCAL,
    }
    return write(folder / "bfp_small.json", "bfp", config, inputs, outputs, WEIGHTS)
