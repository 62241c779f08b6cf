# SPDX-License-Identifier: Apache-2.0
"""The evaluator: the same numbers as Detectron2's, and what only this one promises."""

import json
import logging
import math

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, print_csv_format
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.structures import BoxMode
from detectron2.utils import comm
from evaluation_inputs import found, jittered, outputs
from PIL import Image

from d2_decouple.data import register_bccd
from d2_decouple.evaluation import BoxEvaluator, EvaluationError, read_ground_truth

MINI = "bccd_mini_val"
NUMBERS = ["AP", "AP50", "AP75", "AP90", "APs", "APm", "APl", "AR1", "AR10", "AR100", "VOC-AP50"]


@pytest.fixture(autouse=True)
def catalogs(monkeypatch):
    """Each test gets catalogs of its own."""
    monkeypatch.setattr(DatasetCatalog, "data", dict(DatasetCatalog.data))
    monkeypatch.setattr(MetadataCatalog, "data", dict(MetadataCatalog.data))
    register_bccd()


@pytest.fixture
def pets():
    """Two images with ids that are names; returns the dicts, which a test may edit."""
    box = {"bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    size = {"height": 480, "width": 640}
    records = [
        {"image_id": "b", "annotations": [{**box, "bbox": [0, 0, 50, 50]}], **size},
        {"image_id": "a", "annotations": [{**box, "bbox": [0, 0, 60, 60], "iscrowd": 1}], **size},
    ]
    DatasetCatalog.register("pets", lambda: records)
    MetadataCatalog.get("pets").set(thing_classes=["cat", "dog"])
    return records


def evaluated(evaluator, detections):
    evaluator.reset()
    for given, made in zip(*outputs(detections), strict=True):
        evaluator.process([given], [made])
    return evaluator.evaluate()


def test_numbers_are_those_of_detectron2(tmp_path):
    detections = jittered(read_ground_truth(MINI))
    theirs = evaluated(COCOEvaluator(MINI, output_dir=str(tmp_path / "theirs")), detections)
    vars(MetadataCatalog.get(MINI)).pop("json_file")  # which Detectron2 leaves there
    ours = evaluated(BoxEvaluator(dataset_name=MINI, output_dir=tmp_path / "ours"), detections)
    assert list(ours["bbox"]) == [*NUMBERS, "AP-RBC", "AP-WBC", "AP-Platelets"]
    for name, value in theirs["bbox"].items():
        assert ours["bbox"][name] == pytest.approx(value, abs=1e-6, nan_ok=True), name
    assert 10 < ours["bbox"]["AP"] < 90


def test_results_suit_detectron2s_printing_and_its_metrics_file(caplog):
    results = evaluated(BoxEvaluator(dataset_name=MINI), jittered(read_ground_truth(MINI)))
    with caplog.at_level("INFO"):
        print_csv_format(results)
    assert "copypaste: AP,AP50,AP75,AP90,APs,APm,APl,AR1,AR10,AR100" in caplog.text
    flat = flatten_results_dict(results)
    assert {"bbox/AP", "bbox/AP50", "bbox/AP-WBC"} <= flat.keys()
    assert all(isinstance(value, float) for value in flat.values())


def test_three_files_are_written_and_replaced_whole(tmp_path, pets):
    for _ in range(2):
        evaluator = BoxEvaluator(dataset_name="pets", output_dir=str(tmp_path / "new" / "out"))
        evaluated(evaluator, {"b": found((0, 0, 50, 40, 0.5)), "a": found((1, 2, 4, 8, 0.25, 1))})
    folder = tmp_path / "new" / "out"
    written = {"coco_instances_results.json", "evaluation.json", "precision_recall.png"}
    assert {file.name for file in folder.iterdir()} == written
    assert json.loads((folder / "coco_instances_results.json").read_text()) == [
        {"image_id": "a", "category_id": 1, "bbox": [1, 2, 3, 6], "score": 0.25},
        {"image_id": "b", "category_id": 0, "bbox": [0, 0, 50, 40], "score": 0.5},
    ]
    summary = json.loads((folder / "evaluation.json").read_text())
    assert summary["dataset"] == "pets"
    assert summary["images"] == 2
    assert list(summary["metrics"]) == NUMBERS
    assert summary["metrics"]["AP50"] == pytest.approx(100)
    assert summary["metrics"]["APl"] is None  # NaN is no JSON
    cat, dog = summary["classes"].values()
    assert (cat["objects"], cat["detections"], dog["objects"], dog["detections"]) == (1, 1, 0, 1)
    assert cat["AP"] == pytest.approx(70)  # IoU 0.8: seven thresholds of ten
    assert cat["best_f1_at_IoU50"] == pytest.approx({"score": 0.5, "precision": 100, "recall": 100})
    assert dog["AP"] is dog["best_f1_at_IoU50"] is None
    with Image.open(folder / "precision_recall.png") as picture:
        assert picture.size[0] > picture.size[1] > 300


def test_a_failed_write_leaves_the_old_file(tmp_path, pets, monkeypatch):
    evaluator = BoxEvaluator(dataset_name="pets", output_dir=tmp_path)
    evaluated(evaluator, {"b": found((0, 0, 50, 40, 0.5))})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("d2_decouple.evaluation.files.os.replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        evaluator.evaluate()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_an_edited_annotation_counts_for_the_next_evaluator(tmp_path, pets):
    detections = {"b": found((0, 0, 50, 50, 0.5)), "a": found()}
    first = evaluated(BoxEvaluator(dataset_name="pets", output_dir=tmp_path), detections)
    pets[0]["annotations"][0]["bbox"] = [300, 300, 350, 350]
    second = evaluated(BoxEvaluator(dataset_name="pets", output_dir=tmp_path), detections)
    assert first["bbox"]["AP"] == pytest.approx(100)
    assert second["bbox"]["AP"] == 0


def test_a_crowd_need_not_be_found_nor_is_it_false(pets):
    detections = {"b": found((0, 0, 50, 50, 0.5)), "a": found((5, 5, 55, 55, 0.9))}
    results = evaluated(BoxEvaluator(dataset_name="pets"), detections)["bbox"]
    assert results["AP"] == pytest.approx(100)
    assert results["VOC-AP50"] == pytest.approx(100)


@pytest.mark.parametrize("detections", [{}, {"a": found(), "b": found()}])
def test_nothing_found_is_zero_and_said(pets, detections, caplog, tmp_path):
    results = evaluated(BoxEvaluator(dataset_name="pets", output_dir=tmp_path), detections)["bbox"]
    assert results["AP"] == results["AP50"] == results["VOC-AP50"] == results["AP-cat"] == 0
    assert math.isnan(results["AP-dog"])
    assert math.isnan(results["APl"])
    assert ("found nothing" if detections else "2 of the 2 images") in caplog.text


def test_an_image_that_was_not_processed_is_named(pets, caplog):
    evaluated(BoxEvaluator(dataset_name="pets"), {"b": found((0, 0, 50, 50, 0.5))})
    assert "1 of the 2 images of 'pets' were not processed, the first is 'a'" in caplog.text


def test_an_image_that_comes_twice_counts_once(pets, caplog):
    evaluator = BoxEvaluator(dataset_name="pets")
    given, made = outputs({"b": found((0, 0, 50, 50, 0.5)), "a": found()})
    evaluator.process(given, made)
    evaluator.process(given[:1], outputs({"b": found((9, 9, 99, 99, 0.9))})[1])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)
    assert "'b' came twice" in caplog.text


@pytest.mark.parametrize(
    ("image", "detection", "named"),
    [
        ("b", (0, 0, 50, 50, math.nan), ["'b'", "score nan", "optimizer.lr"]),
        ("a", (0, 0, math.inf, 50, 0.5), ["'a'", "inf", "optimizer.lr"]),
        ("b", (0, 0, 50, 50, 0.5, 2), ["'b'", "class 2", "model.num_classes=2"]),
        ("c", (0, 0, 50, 50, 0.5), ["'c'", "'pets'"]),
    ],
)
def test_detections_that_cannot_be_counted_name_their_image(pets, image, detection, named):
    evaluator = BoxEvaluator(dataset_name="pets")
    with pytest.raises(EvaluationError) as error:
        evaluated(evaluator, {image: found((0, 0, 9, 9, 0.1), detection)})
    assert all(word in str(error.value) for word in named), error.value


def test_parts_of_all_processes_are_counted_by_the_first(pets, tmp_path, monkeypatch):
    detections = {"b": found((0, 0, 50, 50, 0.5)), "a": found((0, 0, 50, 50, 0.6, 1))}
    alone = evaluated(BoxEvaluator(dataset_name="pets"), detections)
    evaluator = BoxEvaluator(dataset_name="pets", output_dir=tmp_path)

    def gather(part, dst):
        assert dst == 0
        return [part, {"b": detections["b"]}]

    monkeypatch.setattr(comm, "gather", gather)
    both = evaluated(evaluator, {"a": detections["a"]})
    assert both["bbox"] == pytest.approx(alone["bbox"], nan_ok=True)
    for file in tmp_path.iterdir():
        file.unlink()
    monkeypatch.setattr(comm, "gather", lambda part, dst: [])
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert evaluated(evaluator, {"a": detections["a"]}) == {}
    assert not list(tmp_path.iterdir())


def test_tables_go_to_the_log_and_nothing_to_the_terminal(pets, caplog, capsys):
    with caplog.at_level(logging.INFO):
        evaluated(BoxEvaluator(dataset_name="pets"), {"a": found(), "b": found((0, 0, 50, 50, 1))})
    messages = [r.message for r in caplog.records if r.name.startswith("d2_decouple")]
    assert any("AP90" in text and "pets, 2 images" in text for text in messages)
    assert any("| cat" in text and "| dog" in text and "nan" in text for text in messages)
    assert len(messages) == 2
    assert capsys.readouterr().out == ""


def test_the_limit_of_detections_and_the_library_can_be_chosen(pets, tmp_path):
    detections = {"b": found((200, 200, 250, 250, 0.9), (0, 0, 50, 50, 0.5)), "a": found()}
    for limit, expected in ((100, 50), (1, 0)):
        evaluator = BoxEvaluator(
            dataset_name="pets",
            output_dir=tmp_path,
            max_detections_per_image=limit,
            backend="pycocotools",
        )
        assert evaluated(evaluator, detections)["bbox"]["AP"] == pytest.approx(expected)
    summary = json.loads((tmp_path / "evaluation.json").read_text())
    assert (summary["max_detections_per_image"], summary["backend"]) == (1, "pycocotools")


def test_an_unknown_data_set_names_the_nearest():
    with pytest.raises(ValueError, match=r"'bccd_mini_vall'.*'bccd_mini_val'"):
        BoxEvaluator(dataset_name="bccd_mini_vall")


def test_real_images_in_any_order_and_with_any_precision(tmp_path):
    read = read_ground_truth(MINI)
    detections = jittered(read)
    backwards = dict(reversed(list(detections.items())))
    one, other = (evaluated(BoxEvaluator(dataset_name=MINI), x) for x in (detections, backwards))
    assert one["bbox"] == pytest.approx(other["bbox"], nan_ok=True)
    assert np.isfinite(one["bbox"]["AP"])
