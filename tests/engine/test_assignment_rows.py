# SPDX-License-Identifier: Apache-2.0
"""Cells and weights of every assigner, against what it says row by row."""

import math

import numpy as np
import pytest
import torch
from assignment_scenes import (
    BY_ROWS,
    EDGE,
    SIZE,
    SMALL,
    SOFT,
    WHOLE,
    build,
    listed,
    picture,
    shared,
    truth_of,
)
from detectron2.utils.events import EventStorage
from util import make_instances

from d2_decouple.layers.losses import generalized_iou_loss
from d2_decouple.modeling import PositiveTerm


def asked(predictor, truth, scale):
    """Features, predictions and targets of the picture, by the model's own methods."""
    model = predictor.model
    images, features, predictions = model.predict([predictor._input(picture())])
    known = make_instances(
        images.image_sizes[0], (truth.gt_boxes.tensor / scale).tolist(), truth.gt_classes.tolist()
    )
    # SAPD's soft levels begin in the middle of a training.
    with torch.no_grad(), EventStorage(10**9):
        features = features[-len(predictions.level_sizes) :]
        return features, predictions, model.assigner(features, predictions, [known])


def by_rows(features, predictions, targets, offset, cls, box):
    """What :func:`listed` says, by a loop over all rows of one image; and what is ignored."""
    found, ignored, row = {}, set(), 0
    for level, (feature, rows) in enumerate(zip(features, predictions.level_sizes, strict=True)):
        anchors = rows // feature[0, 0].numel()
        for index in range(rows):
            cell = index // anchors
            stride = float(predictions.strides[row]) / 2
            x, y = cell % feature.shape[-1] * stride, cell // feature.shape[-1] * stride
            assert predictions.locations[row].tolist() == pytest.approx(
                [2 * (x + offset * stride), 2 * (y + offset * stride)]
            )
            label = int(targets.labels[0, row])
            place = (level, x, y, x + stride, y + stride)
            if label == -1 and x < SIZE[1] and y < SIZE[0]:
                ignored.add(place)
            if 0 <= label < 3:
                key = (*place, int(targets.extras["gt_index"][0, row]))
                old = found.get(key, (0.0, 0.0, 0))
                which = label if targets.cls_weights.shape[2] > 1 else 0
                found[key] = (
                    old[0] + float(targets.cls_weights[0, row, which]),
                    old[1] + float(targets.box_weights[0, row]),
                    old[2] + 1,
                )
            row += 1
    kept = {}
    for key, (of_class, of_box, count) in found.items():
        own = [value for other, value in found.items() if other[5] == key[5]]
        strong = [
            taught and value > 0 and value >= 0.01 * max(x[place] for x in own)
            for place, (taught, value) in enumerate(((cls, of_class), (box, of_box)))
        ]
        if any(strong):
            kept[key] = (
                pytest.approx(of_class, abs=1e-5) if cls else None,
                pytest.approx(of_box, abs=1e-5) if box else None,
                count,
            )
    return kept, ignored


@pytest.mark.parametrize("name", BY_ROWS)
def test_every_assigner_says_row_by_row_what_is_drawn(name):
    predictor = shared(name)
    truth = truth_of(SMALL, WHOLE, EDGE)
    seen = predictor.assignment(picture(), truth)
    assert seen.assigner == type(predictor.model.assigner).__name__
    features, predictions, targets = asked(predictor, truth, 0.5)
    expected = {"class and box": (targets, True, True)}
    if name.startswith("pdnet"):
        expected = {
            "class and final box": (targets, True, True),
            "coarse box": (targets.extras["coarse"], False, True),
        }
    if name.startswith("ddod"):
        expected = {
            "class": (targets, True, False),
            "box": (targets.extras["box"], False, True),
        }
    assert [x.learns for x in seen.sets] == [*expected]
    for labels, (own, cls, box) in zip(seen.sets, expected.values(), strict=True):
        kept, ignored = by_rows(features, predictions, own, predictor.model.head.offset, cls, box)
        assert set(labels.gt_index.tolist()) >= {0, 1}
        got = listed(labels)
        counts = dict(zip(got, labels.predictions.tolist(), strict=True))
        assert {key: (*got[key], counts[key]) for key in got} == kept
        places = zip(labels.ignored_levels.tolist(), labels.ignored.tolist(), strict=True)
        listing = [(level, *square) for level, square in places]
        assert len(set(listing)) == len(listing)
        assert set(listing) == ignored
        assert bool(ignored) == name.startswith("retinanet")


def test_autoassign_weighs_by_prior_and_confidence():
    """Each object's weights are shares of one, and the loss is that of their mean confidence."""
    predictor = shared(SOFT)
    truth = truth_of(SMALL, EDGE)
    (labels,) = predictor.assignment(picture(), truth).sets
    _, predictions, targets = asked(predictor, truth, 0.5)
    (term,) = (x for x in predictor.model.losses.values() if isinstance(x, PositiveTerm))
    prior = targets.extras["inside"]
    loss, expected = 0.0, {}
    for index, (box, label) in enumerate(
        zip(truth.gt_boxes.tensor * 2, truth.gt_classes, strict=True)
    ):
        weights, confidences, keys = [], [], []
        for place, exists, log_prior in zip(
            prior.location[index], prior.exists[index], prior.log_prior[index], strict=True
        ):
            if not exists:
                continue
            score = predictions.logits[0, place, label].sigmoid()
            presence = predictions.quality[0, place].sigmoid()
            fit = generalized_iou_loss(predictions.boxes[0, place], box)
            confidence = score * presence * (-term.box_weight * fit).exp()
            weights.append(float(log_prior.exp() * (confidence / term.temperature).exp()))
            confidences.append(float(confidence))
            x, y = (predictions.locations[place] / 2).tolist()
            side = float(predictions.strides[place]) / 2
            level = int(math.log2(side)) - 2
            keys.append((level, x, y, x + side, y + side, index))
        shares = np.array(weights) / sum(weights)
        loss -= math.log(float(shares @ np.array(confidences)))
        expected |= {
            key: (pytest.approx(share, rel=1e-3),) * 2
            for key, share in zip(keys, shares, strict=True)
            if share >= 0.01 * shares.max()
        }
    assert listed(labels) == expected
    assert float(term(predictions, targets)) == pytest.approx(term.weight * loss / 2, rel=1e-4)
    for index in (0, 1):
        assert 0.9 < float(labels.cls_weights[labels.gt_index == index].sum()) <= 1 + 1e-5


def test_autoassign_without_its_term_shows_the_prior():
    predictor = build(SOFT)
    predictor.model.losses.clear()
    (labels,) = predictor.assignment(picture(), truth_of(SMALL)).sets
    _, _, targets = asked(predictor, truth_of(SMALL), 0.5)
    assert float(labels.cls_weights.max()) == pytest.approx(float(targets.box_weights.max()))
