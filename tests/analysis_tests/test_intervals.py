# SPDX-License-Identifier: Apache-2.0
"""Overlaps, weighted means and rank correlations, against plain loops and by hand."""

import numpy as np
import pytest

from d2_decouple.analysis import Estimate, estimate, image_weights, rank_correlation
from d2_decouple.analysis.intervals import (
    difference,
    mean_on_draws,
    rank_correlation_on_draws,
)
from d2_decouple.analysis.overlaps import overlaps, shares_inside


def test_overlaps_by_hand():
    boxes = np.array([[0, 0, 10, 10], [10, 10, 0, 0]])
    others = np.array([[5, 0, 15, 10], [0, 0, 10, 10], [20, 20, 30, 30]])
    # 50 of 150 in common; the second box is inverted and overlaps nothing.
    assert overlaps(boxes, others) == pytest.approx(np.array([[1 / 3, 1, 0], [0, 0, 0]]))
    assert overlaps(boxes, np.empty((0, 4))).shape == (2, 0)


def test_shares_are_of_the_boxs_own_area():
    box = np.array([[0.0, 0, 10, 10]])
    crowds = np.array([[5.0, 0, 100, 100], [0, 0, 50, 50], [20, 0, 30, 10]])
    assert shares_inside(box, crowds) == pytest.approx(np.array([[0.5, 1, 0]]))


def test_rank_correlation_by_hand():
    # Ranks 1 2 3 4 and 1 3 2 4: 1 - 6 * (0 + 1 + 1 + 0) / (4 * (16 - 1)) = 0.8
    assert rank_correlation(np.array([10, 20, 30, 40]), np.array([1, 7, 2, 9])) == pytest.approx(
        0.8
    )
    # It is about ranks: a bent curve that rises is aligned altogether.
    x = np.array([0.1, 0.5, 0.2, 0.9])
    assert rank_correlation(x, x**5) == pytest.approx(1)
    assert rank_correlation(x, -(x**5)) == pytest.approx(-1)


def test_equal_values_share_their_mean_rank():
    # Ranks 2 2 2 4 5 and 1 2 3 4 5, about their mean 3: -1 -1 -1 1 2 and -2 -1 0 1 2.
    # (2 + 1 + 0 + 1 + 4) / sqrt((1 + 1 + 1 + 1 + 4) * (4 + 1 + 0 + 1 + 4)) = 8 / sqrt(80)
    found = rank_correlation(np.array([5, 5, 5, 6, 9]), np.array([1, 2, 3, 4, 5]))
    assert found == pytest.approx(8 / np.sqrt(80))


@pytest.mark.parametrize(
    ("x", "y"), [([1, 2], [1, 2]), ([], []), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [4, 4, 4])]
)
def test_no_rank_correlation(x, y):
    assert np.isnan(rank_correlation(np.array(x, float), np.array(y, float)))


def test_weights_are_copies():
    generator = np.random.default_rng(1)
    x, y = generator.integers(6, size=(2, 20)).astype(float)
    weights = generator.integers(4, size=20)
    copies = rank_correlation(x.repeat(weights), y.repeat(weights))
    assert rank_correlation(x, y, weights) == pytest.approx(copies, abs=1e-12)
    assert abs(rank_correlation(x, y) - copies) > 0.01


def test_draws_weigh_by_image():
    generator = np.random.default_rng(2)
    x, y = generator.random((2, 12))
    images = np.repeat([0, 1, 2], 4)
    weights = np.array([[1, 1, 1], [0, 2, 1]])
    drawn = rank_correlation_on_draws(x, y, images, weights)
    again = np.concatenate((x[4:8], x[4:8], x[8:])), np.concatenate((y[4:8], y[4:8], y[8:]))
    assert drawn == pytest.approx([rank_correlation(x, y), rank_correlation(*again)])


def test_mean_on_draws_by_hand():
    values = np.array([1.0, 3.0, np.nan, 10.0])
    images = np.array([0, 0, 1, 2])
    weights = np.array([[1, 1, 1, 1], [2, 0, 1, 1], [0, 3, 0, 0]])
    # (1 + 3 + 10) / 3; (2 * 4 + 10) / 5; the third draw has the unknown value alone.
    assert mean_on_draws(values, images, weights) == pytest.approx(
        [14 / 3, 18 / 5, np.nan], nan_ok=True
    )


def test_first_row_is_the_images_as_they_are():
    weights = image_weights(5, draws=7, seed=3)
    assert weights.shape == (8, 5)
    assert (weights[0] == 1).all()
    assert (weights.sum(1) == 5).all()
    assert (weights[1:] != 1).any()
    assert np.array_equal(weights, image_weights(5, draws=7, seed=3))
    assert not np.array_equal(weights, image_weights(5, draws=7, seed=4))


def test_interval_is_of_the_draws_alone():
    values = np.array([50.0, *range(101)])
    # 2.5 and 97.5 percent of 0, 1, ..., 100.
    assert estimate(values) == Estimate(50, 2.5, 97.5)
    assert difference(values, values - 1) == Estimate(1, 1, 1)


@pytest.mark.parametrize("values", [[np.nan, 1, 2], [1, np.nan, np.nan]])
def test_unknown_stays_unknown(values):
    assert np.isnan(estimate(np.array(values))).all()
