# SPDX-License-Identifier: Apache-2.0
"""Pascal VOC's average precision, worked by hand."""

import numpy as np
import pytest
from evaluation_inputs import found, objects, truth

from d2_decouple.evaluation import area_below, coco_curves, eleven_points, voc_ap

FAR = (300, 300, 310, 310)


def test_areas_and_eleven_points_by_hand():
    # Three objects; right, false, right, false: recall 1/3, 1/3, 2/3, 2/3.
    recall = np.array([1, 1, 2, 2]) / 3
    precision = np.array([1, 1 / 2, 2 / 3, 2 / 4])
    # A third at precision 1, a third at 2/3, and the last third is never reached.
    assert area_below(recall, precision) == pytest.approx(1 / 3 + 2 / 9)
    # 0 to 0.3 read 1; 0.4, 0.5 and 0.6 read 2/3; 0.7 to 1 read 0.
    assert eleven_points(recall, precision) == pytest.approx((4 + 3 * 2 / 3) / 11)


def test_recalls_that_binary_numbers_miss_are_reached():
    # 3 of 10 found is 0.3 of recall, whatever 3 / 10 and 3 * 0.1 are in binary.
    recall = np.cumsum(np.full(3, 0.1))
    assert eleven_points(recall, np.ones(3)) == pytest.approx(4 / 11)
    assert eleven_points(np.array([0.3]), np.ones(1)) == pytest.approx(4 / 11)


def test_without_detections_both_are_zero():
    assert area_below(np.empty(0), np.empty(0)) == eleven_points(np.empty(0), np.empty(0)) == 0


@pytest.mark.parametrize(("average", "expected"), [(None, 5 / 9), (eleven_points, 6 / 11)])
def test_detections_are_ranked_over_all_images(average, expected):
    read = truth(objects((0, 0, 10, 10, 0)), objects((0, 0, 10, 10, 0), (50, 50, 90, 90, 0)))
    made = {
        0: found((0, 0, 10, 10, 0.9), (*FAR, 0.6)),
        1: found((*FAR, 0.8), (50, 50, 90, 90, 0.7)),
    }
    assert voc_ap(read, made, average=average) == pytest.approx([expected])


def test_a_second_detection_of_an_object_is_false_where_coco_gives_it_another():
    # The second detection overlaps the first object most (IoU 0.87), which is taken, and the
    # second one enough for COCO (10 / 15 = 0.67, two thirds).
    read = truth(objects((0, 0, 10, 15, 0), (0, 3, 10, 18, 0)))
    made = {0: found((0, 0, 10, 15, 0.9), (0, 1, 10, 16, 0.8))}
    assert coco_curves(read, made).summary()["AP50"] == pytest.approx(100)
    assert voc_ap(read, made) == pytest.approx([0.5])


def test_a_difficult_object_counts_in_no_way():
    easy, difficult = (0, 0, 10, 10, 0), (50, 50, 90, 90, 0, 1)
    made = {0: found((50, 50, 90, 90, 0.9), (50, 50, 90, 89, 0.8), (0, 0, 10, 10, 0.7))}
    assert voc_ap(truth(objects(easy, difficult)), made) == pytest.approx([1])
    assert voc_ap(truth(objects(easy, difficult)), {}) == pytest.approx([0])
    # Unlike COCO's crowds, it has to be met as a box: a small part of it is false.
    part = {0: found((50, 50, 60, 60, 0.9), (0, 0, 10, 10, 0.7))}
    assert voc_ap(truth(objects(easy, difficult)), part) == pytest.approx([0.5])
    assert coco_curves(truth(objects(easy, difficult)), part).summary()["AP50"] == pytest.approx(
        100
    )


def test_the_threshold_itself_is_enough():
    read = truth(objects((0, 0, 10, 10, 0)))
    assert voc_ap(read, {0: found((0, 0, 10, 5, 0.9))}) == pytest.approx([1])
    assert voc_ap(read, {0: found((0, 0, 10, 4.99, 0.9))}) == pytest.approx([0])
    assert voc_ap(read, {0: found((0, 0, 10, 5, 0.9))}, iou_threshold=0.51) == pytest.approx([0])


def test_classes_are_apart_and_those_without_objects_are_nan():
    read = truth(objects((0, 0, 10, 10, 0), (50, 50, 90, 90, 1), (1, 1, 5, 5, 2, 1)), classes=3)
    made = {0: found((0, 0, 10, 10, 0.9, 1), (50, 50, 90, 90, 0.8, 1), (1, 1, 5, 5, 0.9, 2))}
    result = voc_ap(read, made)
    assert result[:2] == pytest.approx([0, 0.5])
    assert np.isnan(result[2])
