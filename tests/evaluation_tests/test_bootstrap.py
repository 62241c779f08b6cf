# SPDX-License-Identifier: Apache-2.0
"""The paired bootstrap: AP of a draw is COCO's, and intervals hold what they should."""

import dataclasses
import time

import numpy as np
import pytest
from evaluation_inputs import found, jittered, objects, truth

from d2_decouple.data import register_bccd
from d2_decouple.evaluation import (
    ap_on_draws,
    coco_curves,
    match_images,
    paired_difference,
    read_ground_truth,
    weighted_ap,
)
from d2_decouple.evaluation.bootstrap import draw_images


@pytest.fixture(scope="module")
def bccd():
    register_bccd()
    read = read_ground_truth("bccd_mini_train")
    images = {
        image: item._replace(crowds=np.arange(len(item.crowds)) % 7 == 3)
        for image, item in read.images.items()
    }
    return dataclasses.replace(read, images=images)


def coco_ap(read, made):
    return coco_curves(read, made, backend="pycocotools").summary()["AP"] / 100


def test_with_every_image_once_it_is_cocos_ap(bccd):
    for seed in range(3):
        made = jittered(bccd, seed=seed)
        ones = np.ones((1, len(bccd.images)), int)
        assert weighted_ap(match_images(bccd, made), ones) == pytest.approx(
            [coco_ap(bccd, made)], abs=1e-9
        )


def test_an_image_drawn_twice_counts_like_two_images(bccd):
    """Against copies of the images, with ids of their own, given to COCO's code."""
    made = jittered(bccd, decimals=12)
    matches = match_images(bccd, made)
    for weights in draw_images(len(bccd.images), 4, seed=5):
        images, drawn = {}, {}
        for (image, item), times in zip(bccd.images.items(), weights, strict=True):
            for copy in range(times):
                images[f"{image} {copy}"] = item
                drawn[f"{image} {copy}"] = made[image]
        assert 0.5 < len(set(images)) / len(weights) <= 1
        expected = coco_ap(dataclasses.replace(bccd, images=images), drawn)
        assert weighted_ap(matches, weights[None]) == pytest.approx([expected], abs=1e-9)


def test_a_class_that_was_not_drawn_is_left_out():
    read = truth(objects((0, 0, 9, 9, 0)), objects((0, 0, 9, 9, 1)), objects(), classes=2)
    matches = match_images(read, {0: found((0, 0, 9, 9, 0.5)), 1: found((50, 50, 59, 59, 0.5, 1))})
    weights = np.array([[1, 1, 1], [3, 0, 0], [0, 3, 0], [0, 0, 3]])
    expected = [0.5, 1.0, 0.0, np.nan]
    assert weighted_ap(matches, weights) == pytest.approx(expected, nan_ok=True)


def test_draws_are_of_as_many_images_and_repeat_with_their_seed():
    draws = draw_images(72, 500, seed=1)
    assert draws.shape == (500, 72)
    assert (draws.sum(axis=1) == 72).all()
    assert (draws == draw_images(72, 500, seed=1)).all()
    assert (draws != draw_images(72, 500, seed=2)).any()
    assert np.mean(draws == 0) == pytest.approx(np.exp(-1), abs=0.02)


def drawn(read, *, draws=200, **options):
    return ap_on_draws(match_images(read, jittered(read, **options)), draws=draws)


def test_the_images_as_they_are_come_first(bccd):
    values = drawn(bccd, draws=3)
    assert values.shape == (4,)
    assert values[0] == pytest.approx(coco_ap(bccd, jittered(bccd)))
    assert len(set(values)) == 4


def test_equal_models_differ_by_nothing_and_a_better_one_by_more_than_luck(bccd):
    good = drawn(bccd, seed=0, jitter=0.04)
    assert paired_difference([good], [good]) == (0, 0, 0)
    poor = drawn(bccd, seed=1, jitter=0.12)
    better = paired_difference([good], [poor])
    assert 0 < better.low < better.difference < better.high < 1
    same = paired_difference([good], [drawn(bccd, seed=2, jitter=0.04)])
    assert same.low < 0 < same.high
    worse = paired_difference([poor], [good])
    assert worse == pytest.approx((-better.difference, -better.high, -better.low))


def test_seeds_are_paired_and_averaged():
    ours = [np.array([0.5, 0.4, 0.6, 0.5]), np.array([0.3, 0.4, 0.2, 0.5])]
    theirs = [np.array([0.2, 0.2, 0.2, 0.2]), np.array([0.2, 0.2, 0.4, 0.2])]
    # Draw for draw the differences are 0.2; 0.2, 0.1, 0.3.
    result = paired_difference(ours, theirs)
    assert result == pytest.approx((0.2, *np.percentile([0.2, 0.1, 0.3], (2.5, 97.5))))


def test_unpaired_trainings_are_refused():
    with pytest.raises(ValueError, match="2 trainings against 1"):
        paired_difference([np.ones(3), np.ones(3)], [np.ones(3)])
    with pytest.raises(ValueError, match=r"\[3, 4\] draws"):
        paired_difference([np.ones(3)], [np.ones(4)])


def test_a_thousand_draws_do_not_take_a_thousand_matchings(bccd):
    matches = match_images(bccd, jittered(bccd))
    assert sum(len(item.images) for item in matches) > 2000
    start = time.process_time()
    ap_on_draws(matches, draws=100)
    # A limit far above what it takes (0.1 s), far below matching 100 times (about 30 s).
    assert time.process_time() - start < 5
