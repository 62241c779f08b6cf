# SPDX-License-Identifier: Apache-2.0
"""Scores against overlaps, of detections and of the dense predictions of one object, by hand."""

import numpy as np
import pytest
from helpers_of_analysis import found, objects, raw_of, truth_of

from d2_decouple.analysis import (
    correlation_within_classes,
    detection_pairs,
    image_weights,
    object_measures,
    rank_correlation,
    view_objects,
)
from d2_decouple.analysis.misalignment import OBJECT_MEASURES, Pairs

OBJECT = [0, 0, 10, 10]


def moved(*shifts):
    """Boxes of 10 x 10 whose IoU with OBJECT is (10 - s) / (10 + s)."""
    return np.array([[s, 0, 10 + s, 10] for s in shifts], dtype=float)


def iou(shift):
    return (10 - shift) / (10 + shift)


def test_pairs_are_with_objects_of_the_class():
    truth = truth_of(objects(), objects([*OBJECT, 0], [2, 0, 12, 10, 1], [0, 0, 90, 90, 0, 1]))
    rows = [[2, 0, 12, 10, 0.9, 0], [2, 0, 12, 10, 0.8, 1], [50, 50, 60, 60, 0.7, 0]]
    pairs = detection_pairs(truth, {"i0": found([*OBJECT, 0.6, 1]), "i1": found(*rows)})
    assert pairs.scores.tolist() == [0.6, 0.9, 0.8, 0.7]
    assert pairs.images.tolist() == [0, 1, 1, 1]
    assert pairs.classes.tolist() == [1, 0, 1, 0]
    assert pairs.ious == pytest.approx([0, iou(2), 1, 0])  # the crowd is no object


def test_no_detections_no_pairs():
    truth = truth_of(objects([*OBJECT, 0]))
    assert [len(column) for column in detection_pairs(truth, {})] == [0, 0, 0, 0]
    each, mean = correlation_within_classes(detection_pairs(truth, {}), np.ones((2, 1), int), 2)
    assert each.shape == (2, 2)
    assert np.isnan(each).all()
    assert np.isnan(mean).all()


def test_correlation_is_within_classes_and_above_half():
    """Class 0 is in order, class 1 in reverse, class 2 has too few; together they seem in order."""
    classes = np.array([0] * 4 + [1] * 3 + [2] * 2)
    scores = np.array([0.1, 0.2, 0.3, 0.9, 0.7, 0.8, 0.9, 0.5, 0.6])
    ious = np.array([0.55, 0.6, 0.65, 0.49, 0.95, 0.9, 0.85, 0.7, 0.8])
    pairs = Pairs(np.zeros(9, int), classes, scores, ious)
    each, mean = correlation_within_classes(pairs, np.ones((1, 1), int), 3)
    # The fourth of class 0 scores best and overlaps least, but below 0.5.
    assert each[0] == pytest.approx([1, -1, np.nan], nan_ok=True)
    assert mean == pytest.approx([0])
    assert rank_correlation(scores, ious) > 0.3


def test_view_by_hand():
    boxes = moved(0, 1, 2, 5)
    raw = raw_of(boxes, np.array([0.3, 0.2, 0.9, 0.99]), label=1)
    (view,) = view_objects(7, objects([*OBJECT, 1]), raw)
    assert (view.image, view.label, view.candidates) == (7, 1, 3)  # the last overlaps by 0.33
    assert view.best_iou == pytest.approx(1)
    assert view.iou_gap == pytest.approx(1 - iou(2))
    # The middles are 2 pixels apart in x, a quarter of a cell.
    assert view.distance == pytest.approx(0.25)
    # Scores 0.3 0.2 0.9 have ranks 2 1 3, overlaps 3 2 1: 1 - 6 * (1 + 1 + 4) / (3 * 8) = -0.5
    assert view.rank_correlation == pytest.approx(-0.5)
    assert view.boxes.tolist() == [boxes[2].tolist(), boxes[0].tolist()]
    assert view.locations.tolist() == [[7, 5], [5, 5]]
    assert view.scores.tolist() == [0.9, 0.3]


def test_distance_is_in_the_cells_of_the_best_score():
    boxes = np.array([[0.0, 0, 10, 10], [0, 2, 10, 12]])
    raw = raw_of(boxes, np.array([0.3, 0.9]), label=0)
    raw.strides[0] = 100  # of the box that overlaps most
    (view,) = view_objects(0, objects([*OBJECT, 0]), raw)
    assert view.distance == pytest.approx(2 / 4)  # down, where cells are 4 pixels high


def test_scores_are_of_the_objects_class():
    raw = raw_of(moved(0, 1), np.array([0.1, 0.95]), label=1)
    raw.scores[:, 0] = [0.9, 0.1]
    (view,) = view_objects(0, objects([*OBJECT, 0]), raw)
    assert view.iou_gap == 0
    assert view.scores.tolist() == [0.9, 0.9]


def test_a_prediction_belongs_to_the_object_it_overlaps_most():
    both = objects([*OBJECT, 0], [4, 0, 14, 10, 0], [4, 0, 14, 10, 1], [0, 0, 10, 10, 0, 1])
    raw = raw_of(moved(1, 3), np.array([0.5, 0.9]), label=0)
    first, second, other = view_objects(0, both, raw)
    assert (first.candidates, second.candidates, other.candidates) == (1, 1, 2)
    assert first.best_iou == pytest.approx(iou(1))
    assert second.best_iou == pytest.approx(iou(1))  # 3 is one from 4


def test_of_equal_boxes_the_better_score_is_the_best():
    raw = raw_of(moved(1, 1, 1), np.array([0.2, 0.9, 0.4]), label=0)
    (view,) = view_objects(0, objects([*OBJECT, 0]), raw)
    assert (view.iou_gap, view.distance) == (0, 0)
    assert view.scores.tolist() == [0.9, 0.9]


@pytest.mark.parametrize("boxes", [moved(9), np.empty((0, 4))])
def test_an_object_that_nothing_reaches(boxes):
    raw = raw_of(boxes, np.full(len(boxes), 0.9), label=0)
    (view,) = view_objects(0, objects([*OBJECT, 0]), raw)
    assert view.candidates == 0
    assert np.isnan([view.iou_gap, view.best_iou, view.distance, view.rank_correlation]).all()
    assert view_objects(0, objects(), raw) == []


def test_measures_by_hand():
    truth = objects([*OBJECT, 0]), objects([*OBJECT, 0], [500, 0, 510, 10, 0])
    views = view_objects(0, truth[0], raw_of(moved(0, 2), np.array([0.1, 0.9]), label=0))
    views += view_objects(1, truth[1], raw_of(moved(1), np.array([0.9]), label=0))
    weights = np.array([[1, 1], [3, 1], [0, 2]])
    found_ = object_measures(views, weights)
    gap = 1 - iou(2)
    assert set(found_) == set(OBJECT_MEASURES)
    assert found_["iou_gap"] == pytest.approx([gap / 2, 3 * gap / 4, 0])
    assert found_["other_best"] == pytest.approx([1 / 2, 3 / 4, 0])
    assert found_["best_iou"] == pytest.approx([(1 + iou(1)) / 2, (3 + iou(1)) / 4, iou(1)])
    assert found_["reached"] == pytest.approx([2 / 3, 4 / 5, 1 / 2])
    assert found_["distance"] == pytest.approx([0.125, 0.1875, 0])
    assert np.isnan(found_["rank_correlation"]).all()  # two candidates at most


def test_no_objects_no_measures():
    measured = object_measures([], image_weights(3, draws=2))
    assert all(np.isnan(values).all() and len(values) == 3 for values in measured.values())
