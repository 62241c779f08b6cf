# SPDX-License-Identifier: Apache-2.0
"""TIDE's kinds and their costs, worked by hand, and AP against pycocotools."""

import numpy as np
import pytest
from helpers_of_analysis import found, objects, random_scene, truth_of

from d2_decouple.analysis import KINDS, ap_of_oracles, image_weights, judge, kind_counts
from d2_decouple.analysis.error_kinds import RIGHT
from d2_decouple.evaluation import coco_curves

# Boxes of 10 x 10. Moved by 2 two of them have 80 of 120 in common (0.67), by 5 50 of 150 (0.33).
A1, A2, A3, A4 = ([x, 0, x + 10, 10] for x in (0, 100, 200, 300))
B1 = [0, 100, 10, 110]
TRUTH = truth_of(objects([*A1, 0], [*A2, 0], [*A3, 0], [*A4, 0], [*B1, 1]))
FOUND = {
    "i0": found(
        [300, 0, 310, 10, 0.3, 0],  # right, the last of all
        [0, 0, 10, 10, 0.9, 0],  # right
        [2, 0, 12, 10, 0.8, 0],  # A1 again
        [105, 0, 115, 10, 0.7, 0],  # near A2
        [0, 100, 10, 110, 0.6, 0],  # B1 as the class a
        [5, 100, 15, 110, 0.5, 0],  # near B1, as the class a
        [400, 400, 410, 410, 0.4, 0],  # nothing
    )
}
ONCE = np.ones((1, 1), int)


def names(judgement):
    return ["right" if kind == RIGHT else KINDS[kind] for kind in judgement.kinds]


def test_kinds_by_hand():
    judgement = judge(TRUTH, FOUND)
    assert names(judgement) == [
        "right",
        "duplicate",
        "localisation",
        "classification",
        "both",
        "background",
        "right",
    ]
    assert judgement.objects.tolist() == [0, -1, 1, 4, -1, -1, 3]
    assert judgement.places.tolist() == [1, 2, 3, 4, 5, 6, 0]
    assert judgement.found.tolist() == [True, False, False, True, False]
    # A2 and B1 would be found by a box, or a class, that is mended.
    assert judgement.missed.tolist() == [False, False, True, False, False]
    assert kind_counts(judgement) == dict.fromkeys(KINDS, 1)


def test_costs_by_hand():
    """By falling score: right, five wrong, right; class b has an object and no detection.

    At 101 recalls, 26 are up to 1/4, 25 more up to 2/4, 25 more up to 3/4; AP is the mean over
    two classes.
    """
    values = {name: ap[0] for name, ap in ap_of_oracles(judge(TRUTH, FOUND), ONCE).items()}
    plain = 26 + 25 * 2 / 7
    without_one = 26 + 25 * 2 / 6
    expected = {
        "AP50": plain,
        "classification": without_one + 101 - plain,  # and class b is perfect
        "localisation": 26 + 25 * 2 / 3 + 25 * 3 / 7 - plain,
        "both": without_one - plain,
        "duplicate": without_one - plain,
        "background": without_one - plain,
        "missed": 34 + 33 * 2 / 7 - plain,  # three objects: recalls up to 1/3, up to 2/3
        "false positives": 26 + 25 - plain,
        "false negatives": 51 + 50 * 2 / 7 - plain,  # two objects; those of b cannot go
    }
    assert values == pytest.approx({name: 100 * x / 101 / 2 for name, x in expected.items()})


def test_only_the_best_of_an_object_is_mended():
    truth = truth_of(objects([*A1, 0], [*A2, 0], [*A3, 0]))
    near = [[105, 0, 115, 10, 0.7, 0], [105, 1, 115, 11, 0.6, 0]]
    judgement = judge(truth, {"i0": found(*near, [0, 0, 10, 10, 0.5, 0])})
    assert names(judgement) == ["localisation", "localisation", "right"]
    costs = ap_of_oracles(judgement, ONCE)
    # Before: wrong, wrong, right of 3 objects: 34 recalls at 1/3. After: right, right: 67 at 1.
    assert costs["AP50"][0] == pytest.approx(100 * 34 / 3 / 101)
    assert costs["localisation"][0] == pytest.approx(100 * (67 - 34 / 3) / 101)


def test_an_error_near_a_found_object_vanishes():
    truth = truth_of(objects([*A1, 0], [*A2, 0]))
    rows = [[5, 0, 15, 10, 0.9, 0], [0, 0, 10, 10, 0.5, 0]]
    judgement = judge(truth, {"i0": found(*rows)})
    assert names(judgement) == ["localisation", "right"]
    # 51 recalls at 1/2; then at 1, and A2 is still not found.
    costs = ap_of_oracles(judgement, ONCE)
    assert costs["localisation"][0] == pytest.approx(100 * 51 / 2 / 101)


@pytest.mark.parametrize(
    ("label", "shift", "kind"),
    [
        (0, 10 / 3, "right"),  # (10 - s) / (10 + s): 0.5
        (0, 3.4, "localisation"),
        (0, 8.1, "localisation"),  # 0.105
        (0, 8.3, "background"),  # 0.093
        (1, 10 / 3 - 1e-9, "classification"),
        (1, 3.4, "both"),
        (1, 8.1, "both"),
        (1, 8.3, "background"),
    ],
)
def test_limits_of_overlap(label, shift, kind):
    truth = truth_of(objects([0, 0, 10, 10, 0]))
    rows = [shift, 0, 10 + shift, 10, 0.9, label]
    if kind == "right":
        rows[0] = rows[2] = 0
        rows[:4] = [0, 0, 5, 10]  # half of the object: 0.5 exactly
    assert names(judge(truth, {"i0": found(rows)})) == [kind]


def test_own_class_is_asked_first():
    truth = truth_of(objects([0, 0, 10, 10, 0], [5, 0, 15, 10, 1]))
    # 0.33 with the object of its class, 1.0 with that of the other.
    assert names(judge(truth, {"i0": found([5, 0, 15, 10, 0.9, 0])})) == ["localisation"]


def test_the_best_free_object_is_taken():
    truth = truth_of(objects([0, 0, 10, 10, 0], [2, 0, 12, 10, 0]))
    rows = [[2, 0, 12, 10, 0.9, 0], [2, 0, 12, 10, 0.8, 0], [2, 0, 12, 10, 0.7, 0]]
    judgement = judge(truth, {"i0": found(*rows)})
    assert names(judgement) == ["right", "right", "duplicate"]
    assert judgement.objects.tolist() == [1, 0, -1]


def test_crowds_forgive():
    truth = truth_of(objects([0, 0, 100, 100, 0, 1], [200, 0, 210, 10, 1]))
    rows = [[10, 10, 20, 20, 0.9, 0], [10, 10, 20, 20, 0.8, 1]]
    judgement = judge(truth, {"i0": found(*rows)})
    assert judgement.kinds.tolist() == [-2, KINDS.index("background")]
    assert judgement.gt_classes.tolist() == [1]
    assert sum(kind_counts(judgement).values()) == 2  # with the missed object


def test_objects_count_over_images():
    """The object that an error is near to is one of its own image."""
    truth = truth_of(objects([*A1, 0]), objects([*A1, 1], [*A2, 0]), objects())
    judgement = judge(truth, {"i1": found([105, 0, 115, 10, 0.9, 0])})
    assert judgement.objects.tolist() == [2]
    assert judgement.images.tolist() == [1]
    assert judgement.gt_images.tolist() == [0, 1, 1]
    assert judgement.missed.tolist() == [True, True, False]


def test_so_many_of_each_class_count():
    rows = [[*A1, 0.9, 0], [*A1, 0.8, 0], [*A1, 0.7, 1], [*A1, 0.6, 0]]
    judgement = judge(TRUTH, {"i0": found(*rows)}, max_detections_per_image=1)
    assert judgement.scores.tolist() == [0.9, 0.7]


def test_nothing_found_and_nothing_there():
    costs = ap_of_oracles(judge(TRUTH, {}), ONCE)
    assert costs["AP50"] == 0
    assert all(costs[kind] == 0 for kind in KINDS)
    assert judge(TRUTH, {}).missed.all()
    nothing = ap_of_oracles(judge(truth_of(objects()), {}), ONCE)
    assert np.isnan(nothing["AP50"]).all()
    assert np.isnan(nothing["missed"]).all()


@pytest.mark.parametrize("seed", range(3))
def test_ap_is_cocos(seed):
    truth, detections = random_scene(seed=seed)
    judgement = judge(truth, detections)
    ap = ap_of_oracles(judgement, np.ones((1, len(truth.images)), int))["AP50"]
    assert ap == pytest.approx(coco_curves(truth, detections).summary()["AP50"])
    assert (judgement.kinds == -2).any()


def test_draws_are_copies_of_images():
    truth, detections = random_scene(images=4)
    weights = np.array([[2, 0, 1, 1]])
    drawn = ap_of_oracles(judge(truth, detections), weights)
    ids = ["i0", "i0", "i2", "i3"]
    copied = truth_of(*(truth.images[name] for name in ids), classes="abc")
    twice = {f"i{at}": detections[name] for at, name in enumerate(ids) if name in detections}
    copies = ap_of_oracles(judge(copied, twice), np.ones((1, 4), int))
    assert {name: ap[0] for name, ap in drawn.items()} == pytest.approx(
        {name: ap[0] for name, ap in copies.items()}
    )


def test_mending_everything_wrong_never_hurts():
    truth, detections = random_scene(images=5)
    costs = ap_of_oracles(judge(truth, detections), image_weights(5, draws=20))
    for name in ("background", "duplicate", "both", "false positives"):
        assert (costs[name] >= -1e-9).all()
    assert (costs["false positives"] >= costs["background"] - 1e-9).all()
