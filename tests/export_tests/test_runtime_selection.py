# SPDX-License-Identifier: Apache-2.0
"""Candidates and suppression in numpy equal the package's own in PyTorch."""

import numpy as np
import pytest
import torch

from d2_decouple.modeling import BestLocations, BestPairs, HardNMS
from d2_decouple.modeling.selection import Selection, class_score, clip_to_image
from d2_decouple.runtime.selection import select
from d2_decouple.structures import DensePredictions

RULES = {
    "candidates": "pairs",
    "test_score_thresh": 0.3,
    "test_topk_candidates": 100,
    "test_nms_thresh": 0.5,
    "nms_side_offset": 0.0,
    "max_detections_per_image": 100,
}


def chosen(boxes, scores, strides=None, **rules):
    boxes, scores = np.array(boxes, np.float32), np.array(scores, np.float32)
    strides = np.full(len(boxes), 8.0) if strides is None else np.array(strides)
    return select(boxes, scores, strides, {**RULES, **rules})


def test_a_box_is_dropped_by_a_better_one_of_its_class_alone():
    boxes = [[0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 4], [50, 0, 60, 10]]
    # The second overlaps the first by 0.6, the third by 0.4, and by 2/3 the second, which has
    # gone before it could drop the third.
    scores = [[0.9, 0.0], [0.8, 0.0], [0.7, 0.0], [0.0, 0.95]]
    found = chosen(boxes, scores)
    assert found.classes.tolist() == [1, 0, 0]
    assert found.boxes[:, 3].tolist() == [10, 10, 4]
    np.testing.assert_allclose(found.scores, [0.95, 0.9, 0.7])
    scores[1] = [0.0, 0.8]  # of the other class
    assert chosen(boxes, scores).boxes[:, 3].tolist() == [10, 10, 6, 4]
    assert len(chosen(boxes, scores, max_detections_per_image=2).boxes) == 2
    assert len(chosen(boxes, np.zeros((4, 2))).boxes) == 0


def test_a_threshold_is_not_above_itself():
    assert chosen([[0, 0, 10, 10]], [[0.5]], test_score_thresh=0.5).scores.tolist() == []
    half = [[0, 0, 10, 10], [0, 0, 10, 5]]  # they overlap by 0.5
    assert len(chosen(half, [[0.9], [0.8]]).scores) == 2
    # With a pixel more on each side it is 6 * 11 of 11 * 11, which is more.
    assert len(chosen(half, [[0.9], [0.8]], nms_side_offset=1.0).scores) == 1


def test_the_best_are_taken_of_each_level():
    boxes = [[20 * i, 0, 20 * i + 10, 10] for i in range(4)]
    scores = [[0.9, 0.8], [0.7, 0.4], [0.6, 0.5], [0.35, 0.0]]
    strides = [8, 8, 16, 16]
    pairs = chosen(boxes, scores, strides, test_topk_candidates=2)
    np.testing.assert_allclose(pairs.scores, [0.9, 0.8, 0.6, 0.5])
    places = chosen(boxes, scores, strides, test_topk_candidates=1, candidates="locations")
    np.testing.assert_allclose(places.scores, [0.9, 0.8, 0.6, 0.5])
    places = chosen(boxes, scores, strides, test_topk_candidates=2, candidates="locations")
    assert len(places.scores) == 7


@pytest.mark.parametrize("kind", ["pairs", "locations"])
@pytest.mark.parametrize("side_offset", [0.0, 1.0])
def test_detections_are_those_of_the_package(kind, side_offset):
    draw = torch.Generator().manual_seed(0)
    corners = torch.rand(1, 90, 2, generator=draw) * 60
    sides = torch.rand(1, 90, 2, generator=draw) * 50 - 2  # some are inverted
    boxes = clip_to_image(torch.cat((corners, corners + sides), -1)[0], (64, 80))[None]
    logits = torch.randn(1, 90, 4, generator=draw)
    selection = Selection(
        score=class_score,
        candidates=(BestPairs if kind == "pairs" else BestLocations)(
            test_score_thresh=0.3, test_topk_candidates=20
        ),
        nms=HardNMS(test_nms_thresh=0.4, side_offset=side_offset),
        max_detections_per_image=30,
    )
    strides = torch.tensor([8.0] * 60 + [16.0] * 30)
    nothing = torch.zeros(90, 4)
    predictions = DensePredictions(
        logits, boxes, None, nothing[:, :2], strides, nothing, (60, 30), {}
    )
    (wanted,) = selection(predictions, [(64, 80)])
    found = chosen(
        boxes[0].numpy(),
        class_score(predictions)[0].numpy(),
        strides.numpy(),
        candidates=kind,
        test_topk_candidates=20,
        test_nms_thresh=0.4,
        nms_side_offset=side_offset,
        max_detections_per_image=30,
    )
    assert len(found.scores) == 30
    np.testing.assert_array_equal(found.boxes, wanted.pred_boxes.tensor.numpy())
    np.testing.assert_array_equal(found.scores, wanted.scores.numpy())
    np.testing.assert_array_equal(found.classes, wanted.pred_classes.numpy())
