# SPDX-License-Identifier: Apache-2.0
"""Reading ground truth: COCO files with their own ids, and dicts of Detectron2's catalog."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from evaluation_inputs import found, outputs

from d2_decouple.data import register_bccd
from d2_decouple.evaluation import BoxEvaluator, EvaluationError, read_ground_truth


@pytest.fixture(autouse=True)
def catalogs(monkeypatch):
    """Each test gets catalogs of its own."""
    monkeypatch.setattr(DatasetCatalog, "data", dict(DatasetCatalog.data))
    monkeypatch.setattr(MetadataCatalog, "data", dict(MetadataCatalog.data))


def coco(tmp_path, **changes):
    """A COCO file with gaps in its ids; the id 0 means "not matched" inside COCO's own code."""
    content = {
        "images": [
            {"id": 70, "file_name": "x.jpg", "width": 200, "height": 200},
            {"id": 0, "file_name": "y.jpg", "width": 200, "height": 200},
        ],
        "categories": [{"id": 90, "name": "dog"}, {"id": 7, "name": "cat"}],
        "annotations": [
            note(0, 70, 7, [10, 10, 50, 50], area=900.0),
            note(5, 0, 90, [0, 0, 100, 100], area=10000.0),
            note(6, 0, 90, [0, 0, 200, 200], area=5.0, iscrowd=1),
        ],
        **changes,
    }
    file = tmp_path / "notes.json"
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    register_coco_instances("zoo", {}, str(file), str(tmp_path))
    return file


def note(number, image, category, bbox, **more):
    more = {"iscrowd": 0, **more}
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox, **more}


@pytest.mark.parametrize("loaded", [True, False])
def test_a_coco_file_keeps_its_own_ids_areas_and_crowds(tmp_path, loaded):
    coco(tmp_path)
    if loaded:
        DatasetCatalog.get("zoo")
    read = read_ground_truth("zoo")
    assert read.class_names == ("cat", "dog")
    assert read.dataset_ids == (7, 90)
    assert list(read.images) == [0, 70]
    assert read.images[70].boxes.tolist() == [[10, 10, 60, 60]]
    assert read.images[70].areas.tolist() == [900]
    assert read.images[0].classes.tolist() == [1, 1]
    assert read.images[0].crowds.tolist() == [False, True]
    assert read.count_objects().tolist() == [1, 1]
    assert read.annotated

    evaluator = BoxEvaluator(dataset_name="zoo", output_dir=tmp_path / "out")
    evaluator.process(
        *outputs({70: found((10, 10, 60, 60, 0.5, 0)), 0: found((0, 0, 100, 100, 0.5, 1))})
    )
    results = evaluator.evaluate()["bbox"]
    assert results["AP"] == pytest.approx(100)
    # The cat is small by its file's area of 900, though its box has 2500.
    assert results["APs"] == pytest.approx(100)
    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert [(item["image_id"], item["category_id"]) for item in written] == [(0, 90), (70, 7)]


def test_a_test_set_without_annotations_is_only_written(tmp_path, caplog):
    coco(tmp_path, annotations=None)
    evaluator = BoxEvaluator(dataset_name="zoo", output_dir=tmp_path / "out")
    evaluator.process(*outputs({70: found((10, 10, 60, 60, 0.5, 0)), 0: found()}))
    with caplog.at_level("INFO"):
        assert evaluator.evaluate() == {}
    assert "'zoo' has no annotations" in caplog.text
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["coco_instances_results.json"]


def test_voc_difficult_objects_are_crowds():
    register_bccd()
    read = read_ground_truth("bccd_mini_val")
    assert len(read.images) == 12
    assert all(isinstance(image, str) for image in read.images)
    records = DatasetCatalog.get("bccd_mini_val")
    crowds = sum(item["iscrowd"] for record in records for item in record["annotations"])
    assert sum(item.crowds.sum() for item in read.images.values()) == crowds
    total = sum(len(record["annotations"]) for record in records)
    assert read.count_objects().sum() == total - crowds > 100
    first = records[0]
    box = first["annotations"][0]["bbox"]
    assert read.images[first["image_id"]].boxes[0].tolist() == box
    assert read.images[first["image_id"]].areas[0] == (box[2] - box[0]) * (box[3] - box[1])


def test_boxes_keep_double_precision(tmp_path):
    coco(tmp_path, annotations=[note(1, 70, 7, [0.1, 0.2, 12.34, 5.67], area=1)])
    assert read_ground_truth("zoo").images[70].boxes.tolist() == [[0.1, 0.2, 12.44, 5.87]]


def records(**changes):
    item = {"bbox": [1, 2, 3, 4], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, **changes}
    return [{"image_id": "i", "file_name": "i.jpg", "annotations": [item]}]


def test_dicts_may_have_other_modes_and_areas():
    DatasetCatalog.register("made", lambda: records(area=2.5))
    MetadataCatalog.get("made").set(thing_classes=["a"])
    read = read_ground_truth("made")
    assert read.images["i"].boxes.tolist() == [[1, 2, 4, 6]]
    assert read.images["i"].areas.tolist() == [2.5]


@pytest.mark.parametrize(
    ("made", "classes", "named"),
    [
        (records(category_id=3), ["a", "b"], ["'i'", "class id 3", "0 to 1", "thing_classes"]),
        (records(bbox=[1, 2, float("nan"), 4]), ["a"], ["'i'", "nan", "correct"]),
        (records(bbox=[5, 2, -3, 4]), ["a"], ["'i'", "[5.0, 2.0, 2.0, 6.0]"]),
        (records() * 2, ["a"], ["two images", "'i'"]),
        ([{"file_name": "i.jpg", "annotations": []}], ["a"], ["i.jpg", "image_id"]),
        (records(), None, ["'made'", "MetadataCatalog.get('made').thing_classes = [...]"]),
    ],
)
def test_dicts_that_cannot_be_evaluated_are_named(made, classes, named):
    DatasetCatalog.register("made", lambda: made)
    MetadataCatalog.get("made").set(**({"thing_classes": classes} if classes else {}))
    with pytest.raises(EvaluationError) as error:
        read_ground_truth("made")
    assert all(word in str(error.value) for word in named), error.value


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"annotations": [note(1, 99, 7, [0, 0, 1, 1])]}, ["notes.json", "image 99"]),
        ({"images": [{"id": 1}, {"id": 1}], "annotations": []}, ["notes.json", "two images", "1"]),
    ],
)
def test_a_coco_file_that_cannot_be_evaluated_is_named(tmp_path, changes, named):
    coco(tmp_path, **changes)
    with pytest.raises(EvaluationError) as error:
        read_ground_truth("zoo")
    assert all(word in str(error.value) for word in named), error.value


def test_metadata_and_file_must_agree_on_the_classes(tmp_path):
    coco(tmp_path)
    MetadataCatalog.get("zoo").set(thing_classes=["cat"])
    with pytest.raises(EvaluationError, match=r"2 category ids, but 1 thing_classes \(cat\)"):
        read_ground_truth("zoo")


def test_objects_of_categories_that_the_metadata_lack_are_left_out_and_named(tmp_path, caplog):
    coco(tmp_path)
    MetadataCatalog.get("zoo").set(thing_classes=["dog"], thing_dataset_id_to_contiguous_id={90: 0})
    assert read_ground_truth("zoo").count_objects().tolist() == [1]
    assert "categories [7] are not evaluated" in caplog.text
