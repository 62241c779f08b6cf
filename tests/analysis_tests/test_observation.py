# SPDX-License-Identifier: Apache-2.0
"""What is kept of a model at work, with one whose only prediction is known."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from helpers_of_analysis import objects, truth_of
from PIL import Image
from pixel_detector import BOX, pixel_detector
from util import excite, tiny_model

from d2_decouple.analysis import first_images, observe, read_kept
from d2_decouple.analysis import observation as module
from d2_decouple.config import ConfigError
from d2_decouple.engine.predictor import Predictor
from d2_decouple.evaluation import EvaluationError, GroundTruth, read_ground_truth

NAME = "analysis_of_black_images"
SIZE = (128, 512)  # twice as high and four times as wide as the model sees it
FOUND = np.array([4, 2, 4, 2]) * BOX
CELL = (208, 72)  # the location of the pixel head, likewise


@pytest.fixture
def dataset(tmp_path):
    """Two black images: one with the box that is found and another object, one without any."""
    records = []
    annotated = [[(FOUND, 1), ((0, 0, 20, 20), 1)], []]
    for number, items in enumerate(annotated):
        file = tmp_path / f"{number}.png"
        Image.new("RGB", SIZE[::-1]).save(file)
        annotations = [
            {"bbox": list(box), "bbox_mode": BoxMode.XYXY_ABS, "category_id": label}
            for box, label in items
        ]
        records.append(
            {
                "file_name": str(file),
                "image_id": f"black_{number}",
                "height": SIZE[0],
                "width": SIZE[1],
                "annotations": annotations,
            }
        )
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).set(thing_classes=["x", "y"])
    yield NAME
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def predictor(model=None, classes=("x", "y")):
    return Predictor(
        model or pixel_detector(),
        augmentations=[T.Resize((64, 128))],
        classes=classes,
        device="cpu",
    )


def test_detections_and_views_are_in_pixels_of_the_image(dataset):
    told = []
    seen = observe(
        "m",
        predictor(),
        dataset,
        read_ground_truth(dataset),
        source="s",
        repeats=0,
        progress=told.append,
    )
    assert list(seen.detections) == ["black_0", "black_1"]
    boxes, scores, classes = seen.detections["black_0"]
    assert boxes == pytest.approx(FOUND[None], abs=1e-3)
    assert scores == pytest.approx([1 / (1 + np.exp(-3))])
    assert classes.tolist() == [1]
    reached, other = seen.views
    assert (reached.image, reached.label, reached.candidates) == (0, 1, 1)
    assert reached.best_iou == pytest.approx(1, abs=1e-4)
    assert reached.locations == pytest.approx(np.array([CELL, CELL]))
    assert other.candidates == 0
    assert (seen.costs, seen.notes) == ([], [])
    assert told == ["m: image 1 of 2", "m: image 2 of 2"]


def test_boxes_are_cut_to_the_image(dataset):
    """As detections are; a box that is not would overlap its object less."""
    item = predictor()
    item.model.selection.boxes = lambda predictions: (
        predictions.boxes * torch.tensor([-100.0, 1, 1, 1])
    )
    reached = objects([0, *FOUND[1:], 1])
    truth = GroundTruth(class_names=("x", "y"), dataset_ids=(0, 1), images={"black_0": reached})
    seen = observe("m", item, dataset, truth, source="s", repeats=0)
    assert seen.views[0].best_iou == pytest.approx(1, abs=1e-4)


def test_cells_are_in_pixels_of_the_image(dataset, monkeypatch):
    kept = []
    monkeypatch.setattr(module, "view_objects", lambda index, objects, raw: kept.append(raw) or [])
    observe("m", predictor(), dataset, read_ground_truth(dataset), source="s", repeats=0)
    # 8 pixels of what the model sees, which is a quarter as wide and half as high.
    assert kept[0].strides.tolist() == [[32, 16]]
    assert kept[0].locations.tolist() == [list(CELL)]
    assert kept[0].scores.shape == (1, 2)


def test_costs_are_of_the_first_image(dataset):
    item = predictor(excite(tiny_model("fcos_R_18_FPN_bccd", num_classes=2)), ("x", "y"))
    truth = first_images(read_ground_truth(dataset), 1)
    seen = observe("m", item, dataset, truth, source="s", repeats=1)
    assert {"backbone", "assigner", "selection"} <= {cost.slot for cost in seen.costs}


def test_two_stage_detectors_have_no_views(dataset):
    item = predictor(tiny_model("faster_rcnn_R_18_FPN_bccd_d2", num_classes=2).eval())
    truth = first_images(read_ground_truth(dataset), 1)
    seen = observe("m", item, dataset, truth, source="s", repeats=1)
    assert seen.views is None
    assert "no one-stage detector of this package" in seen.notes[0]
    assert {"backbone", "proposal_generator", "roi_heads"} <= {cost.slot for cost in seen.costs}


def test_other_classes_are_refused(dataset):
    with pytest.raises(ConfigError, match="m knows the classes y, x, the data set has x, y"):
        observe("m", predictor(classes=("y", "x")), dataset, read_ground_truth(dataset), source="")


def test_first_images():
    truth = truth_of(objects(), objects([0, 0, 1, 1, 0]), objects())
    assert list(first_images(truth, 2).images) == ["i0", "i1"]
    assert list(first_images(truth, None).images) == ["i0", "i1", "i2"]
    with pytest.raises(EvaluationError, match="the data set has 0 images"):
        first_images(truth_of(), None)
    bare = GroundTruth(class_names=("a",), dataset_ids=(0,), images=truth.images, annotated=False)
    with pytest.raises(EvaluationError, match="no annotations; wanted objects"):
        first_images(bare, None)


def test_kept_detections():
    truth = truth_of(objects(), objects())
    content = {"images": {"i1": [[1, 2, 3, 4, 0.5, 1]], "elsewhere": [[1, 2, 3, 4, 0.5, 9]]}}
    seen = read_kept("m", content, truth, source="f.json")
    assert list(seen.detections) == ["i1"]
    assert seen.detections["i1"].boxes.tolist() == [[1, 2, 3, 4]]
    assert seen.views is None
    assert "kept detections alone" in seen.notes[0]


def test_kept_detections_whose_ids_are_numbers():
    truth = GroundTruth(class_names=("a",), dataset_ids=(5,), images={7: objects()})
    seen = read_kept("m", {"images": {"7": [[1, 2, 3, 4, 0.5, 5]]}}, truth, source="f")
    assert seen.detections[7].classes.tolist() == [0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "f.json has no kept detections; wanted a JSON object"),
        ({"images": 3}, "f.json has no kept detections"),
        ({"images": {"x": []}}, "f.json has none of the 1 images of the data set, such as 'i0'"),
    ],
)
def test_files_of_something_else(content, message):
    with pytest.raises(EvaluationError, match=message):
        read_kept("m", content, truth_of(objects()), source="f.json")
