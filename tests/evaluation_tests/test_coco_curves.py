# SPDX-License-Identifier: Apache-2.0
"""COCO's numbers: worked by hand, and the same from both libraries."""

import builtins
import dataclasses
import sys

import numpy as np
import pytest
from evaluation_inputs import found, jittered, objects, truth

from d2_decouple.data import register_bccd
from d2_decouple.evaluation import EvaluationError, coco_curves, read_ground_truth
from d2_decouple.evaluation.coco import find_backend

BACKENDS = ["pycocotools", "faster-coco-eval"]


@pytest.fixture(scope="module")
def bccd():
    """Real ground truth, in which every ninth object became a crowd."""
    register_bccd()
    read = read_ground_truth("bccd_mini_train")
    images, count = {}, 0
    for image, item in read.images.items():
        numbers = np.arange(count, count + len(item.crowds))
        images[image] = item._replace(crowds=numbers % 9 == 0)
        count += len(item.crowds)
    assert sum(item.crowds.sum() for item in images.values()) > 50
    return dataclasses.replace(read, images=images)


@pytest.mark.parametrize("limit", [100, 10, 5])
def test_both_libraries_give_the_same_curves(bccd, limit):
    detections = jittered(bccd)
    ours, theirs = (
        coco_curves(bccd, detections, max_detections_per_image=limit, backend=name)
        for name in BACKENDS
    )
    assert ours.limits == theirs.limits == {100: (1, 10, 100), 10: (1, 10), 5: (1, 5)}[limit]
    for name in ("precision", "recall", "scores"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-9)
    numbers = ours.summary()
    assert 1 < numbers["AP90"] < numbers["AP"] < numbers["AP50"] < 90
    for index in range(3):
        assert ours.summary(index) == pytest.approx(theirs.summary(index), nan_ok=True)


@pytest.mark.parametrize("backend", BACKENDS)
class TestByHand:
    def test_half_of_the_objects_found_before_any_error(self, backend):
        # Recall 1/2 with precision 1; the second detection is false. 51 of the 101 readings of
        # recall lie at 0 to 0.5.
        read = truth(objects((0, 0, 10, 10, 0), (50, 50, 90, 90, 0)))
        made = {0: found((0, 0, 10, 10, 0.9), (200, 200, 210, 210, 0.8))}
        numbers = coco_curves(read, made, backend=backend).summary()
        expected = 100 * 51 / 101
        assert numbers["AP"] == numbers["AP50"] == numbers["AP90"] == pytest.approx(expected)
        assert numbers["AR1"] == numbers["AR100"] == 50
        assert numbers["APs"] == pytest.approx(100)  # what is false comes after it
        assert numbers["APm"] == 0
        assert np.isnan(numbers["APl"])

    def test_ap90_is_the_threshold_of_nine_tenths(self, backend):
        # IoU 0.92 reaches 0.5 to 0.9, which are nine of the ten thresholds; 0.89 only eight.
        read = truth(objects((0, 0, 100, 100, 0)))
        for width, count, ap90 in ((92, 9, 100), (89, 8, 0)):
            numbers = coco_curves(
                read, {0: found((0, 0, width, 100, 0.5))}, backend=backend
            ).summary()
            assert numbers["AP90"] == pytest.approx(ap90)
            assert numbers["AP"] == pytest.approx(10 * count)
            assert numbers["AP75"] == pytest.approx(100)

    def test_what_lies_on_a_crowd_is_neither_right_nor_wrong(self, backend):
        read = truth(objects((0, 0, 10, 10, 0), (100, 100, 200, 200, 0, 1)))
        made = {0: found((110, 110, 120, 120, 0.9), (130, 110, 140, 120, 0.8), (0, 0, 10, 10, 0.7))}
        assert coco_curves(read, made, backend=backend).summary()["AP"] == pytest.approx(100)

    def test_nothing_found_is_zero_and_nothing_to_find_is_nan(self, backend):
        read = truth(objects((0, 0, 10, 10, 0)), objects(), classes=2)
        for made in ({}, {0: found(), 1: found()}, {1: found((0, 0, 9, 9, 0.9, 1))}):
            curves = coco_curves(read, made, backend=backend)
            assert curves.summary(0)["AP"] == 0
            assert curves.summary()["AP"] == curves.summary()["AR100"] == 0
            assert np.isnan(curves.summary(1)["AP"])

    def test_no_object_at_all(self, backend):
        numbers = coco_curves(truth(objects()), {0: found((0, 0, 9, 9, 0.9))}, backend=backend)
        assert all(np.isnan(value) for value in numbers.summary().values())


def test_the_faster_one_is_taken_where_it_is(monkeypatch):
    assert find_backend(None) == "faster-coco-eval"
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert find_backend(None) == "pycocotools"
    with pytest.raises(EvaluationError, match="pip install faster-coco-eval"):
        find_backend("faster-coco-eval")


def test_a_library_that_cannot_be_loaded_counts_as_absent(monkeypatch):
    real = builtins.__import__

    def broken(name, *args, **options):
        if name == "faster_coco_eval":
            raise ImportError("undefined symbol")
        return real(name, *args, **options)

    monkeypatch.delitem(sys.modules, "faster_coco_eval")
    monkeypatch.setattr("importlib.import_module", broken)
    assert find_backend(None) == "pycocotools"


def test_an_unknown_library_names_the_nearest():
    with pytest.raises(EvaluationError, match=r"'faster_coco'.*'faster-coco-eval'"):
        find_backend("faster_coco")


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(EvaluationError, match=f"{limit}, wanted a number from 1"):
        coco_curves(truth(objects()), {}, max_detections_per_image=limit)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_libraries_are_silent(backend, capsys, caplog):
    caplog.set_level("INFO")
    caplog.set_level("DEBUG", "d2_decouple")  # as Detectron2 sets it in a training
    coco_curves(truth(objects((0, 0, 9, 9, 0))), {0: found((0, 0, 9, 9, 0.9))}, backend=backend)
    assert capsys.readouterr().out == ""
    assert caplog.text == ""
