# SPDX-License-Identifier: Apache-2.0
"""Numbers with the luck of the test images: a bootstrap over images, paired between models.

Every measure is taken on the images as they are, and on draws of them with replacement. A draw is
a row of weights, how often each image counts, so that nothing is matched twice.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..evaluation import paired_difference
from ..evaluation.bootstrap import draw_images

__all__ = [
    "Estimate",
    "difference",
    "estimate",
    "image_weights",
    "mean_on_draws",
    "rank_correlation",
    "rank_correlation_on_draws",
]

_LEAST_PAIRS = 3  # two values always have a rank correlation of 1 or -1


class Estimate(NamedTuple):
    """A number on the images as they are, and the middle 95 percent of those on the draws.

    All three are NaN where there is nothing to measure.
    """

    value: float
    low: float
    high: float


def image_weights(count: int, *, draws: int, seed: int = 0) -> np.ndarray:
    """(1 + draws, count): how often each image counts; the first row is the images as they are."""
    once = np.ones((1, count), np.int64)
    return np.concatenate((once, draw_images(count, draws, seed)))


def estimate(values: np.ndarray) -> Estimate:
    """(1 + B,) of a measure, the images as they are first -> the number and its interval."""
    return difference(values, np.zeros_like(values))


def difference(ours: np.ndarray, theirs: np.ndarray) -> Estimate:
    """(1 + B,) of one model less that of another on the same draws."""
    if np.isnan(ours[0] - theirs[0]) or np.isnan(ours[1:] - theirs[1:]).all():
        return Estimate(*[float("nan")] * 3)
    return Estimate(*paired_difference([ours], [theirs]))


def mean_on_draws(values: np.ndarray, images: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means of values, each of which counts as often as its image.

    Args:
        values: (P,) numbers; those that are NaN are left out.
        images: (P,) the image of each, a place in the columns of ``weights``.
        weights: (B, I) of :func:`image_weights`.

    Returns:
        (B,) means; NaN where no value is drawn.
    """
    known = ~np.isnan(values)
    count = weights.shape[1]
    sums = np.bincount(images[known], weights=values[known], minlength=count)
    numbers = np.bincount(images[known], minlength=count)
    total = weights @ numbers
    return np.where(total > 0, weights @ sums / np.maximum(total, 1), np.nan)


def rank_correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Spearman's rank correlation, in which each pair may count several times.

    Equal values share the mean of their ranks, as do copies of one pair.

    Args:
        x: (P,) numbers.
        y: (P,) numbers.
        weights: (P,) how often each pair counts; by default once.

    Returns:
        Between -1 and 1; NaN for fewer than three pairs, or where one side is constant.
    """
    weights = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=np.float64)
    total = weights.sum()
    if total < _LEAST_PAIRS:
        return float("nan")
    ranks = [_ranks(side, weights) for side in (x, y)]
    moved = [rank - weights @ rank / total for rank in ranks]
    spread = np.sqrt((weights @ moved[0] ** 2) * (weights @ moved[1] ** 2))
    return float(weights @ (moved[0] * moved[1]) / spread) if spread > 0 else float("nan")


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(P,) mean rank, from 1, of each value among all copies of all values."""
    _, group = np.unique(values, return_inverse=True)
    sizes = np.bincount(group, weights=weights)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]


def rank_correlation_on_draws(
    x: np.ndarray, y: np.ndarray, images: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """(B,) rank correlation of pairs (P,) on draws (B, I) of the I images that they come from."""
    return np.array([rank_correlation(x, y, row[images]) for row in weights])
