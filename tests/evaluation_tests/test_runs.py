# SPDX-License-Identifier: Apache-2.0
"""What is kept of a training: config, commit, machine, and its detections made small."""

import json
import subprocess

import numpy as np
import pytest
from evaluation_inputs import jittered, objects, outputs, truth

from d2_decouple.config import get_config
from d2_decouple.data import register_bccd
from d2_decouple.evaluation import BoxEvaluator, EvaluationError, coco_curves, read_ground_truth
from d2_decouple.evaluation.runs import (
    check_packed,
    commit_of,
    config_changes,
    config_hash,
    config_text,
    machine,
    pack_detections,
    unpack_detections,
)


def test_the_hash_is_of_the_experiment_and_not_of_the_machine():
    base = config_text(get_config("fcos_R_18_FPN_bccd"))
    moved = get_config("fcos_R_18_FPN_bccd", ["train.output_dir=x", "train.device=cuda"])
    assert config_text(moved) == base
    assert str(moved.train.output_dir) == "x"
    changes = ["train.seed=5", "model.losses.loss_box_reg.weight=2.0", "optimizer.lr=0.02"]
    hashes = {
        config_hash(config_text(get_config("fcos_R_18_FPN_bccd", [change]))) for change in changes
    }
    assert len(hashes | {config_hash(base)}) == 4
    assert all(len(text) == 12 for text in hashes)


@pytest.mark.parametrize(
    ("kept", "now", "changed"),
    [
        ("train: {seed: 1}", "train: {seed: 1, ema: {enabled: false}}", []),
        (
            "losses: {_target_: d2_decouple.modeling.gfl.QualityFocalTerm}",
            "losses: {_target_: d2_decouple.modeling.QualityFocalTerm}",
            [],
        ),
        (
            "losses: {_target_: d2_decouple.modeling.gfl.QualityFocalTerm}",
            "losses: {_target_: d2_decouple.modeling.FocalTerm}",
            ["losses._target_"],
        ),
        (
            "score: !!python/name:d2_decouple.modeling.selection.class_score ''",
            "score: !!python/name:d2_decouple.modeling.class_score ''",
            [],
        ),
        ("name: d2_decouple.nothing.one", "name: d2_decouple.nothing.two", ["name"]),
        ("train: {seed: 1}", "train: {seed: 2}", ["train.seed"]),
        ("train: {seed: 1, old: 3}", "train: {seed: 1}", ["train.old"]),
        ("model: {head: {}}", "model: {head: {aligner: x}}", ["model.head", "model.head.aligner"]),
        ("optimizer: {lr: 1}", "optimizer: {lr: 1, momentum: 2}", ["optimizer.momentum"]),
        ("a: [1, 2]", "a: [1, 3]", ["a"]),
        ("a: !!python/name:x.y ''", "a: !!python/name:x.z ''", ["a"]),
        ("a: !!python/tuple [1, 2]", "a: !!python/tuple [1, 3]", ["a"]),
        ("a: !!python/object:x.y {z: 1}", "a: !!python/object:x.y {z: 2}", ["a.z"]),
    ],
)
def test_options_that_came_later_do_not_make_results_stale(kept, now, changed):
    assert config_changes(kept, now) == changed


def test_commit_and_whether_it_was_changed(tmp_path):
    def git(*command):
        user = ["-c", "user.name=a", "-c", "user.email=b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *user, *command], cwd=tmp_path, check=True, capture_output=True)

    assert commit_of(tmp_path / "nowhere", ["code"]) == {"id": None, "dirty": None}
    git("init")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    clean = commit_of(tmp_path, ["code"])
    assert len(clean["id"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "result.json").write_text("outside of the folders that count")
    assert commit_of(tmp_path, ["code"]) == clean
    (tmp_path / "code" / "new.py").write_text("2")
    assert commit_of(tmp_path, ["code"]) == {**clean, "dirty": True}


def test_machine_says_what_computes():
    found = machine(3)
    assert found["threads"] == 3
    assert found["cores"] >= 1
    assert found["processor"]
    assert found["torch"][0].isdigit()
    assert found["detectron2"][0].isdigit()
    json.dumps(found)


def test_kept_detections_are_small_and_give_the_reported_ap(tmp_path):
    register_bccd()
    read = read_ground_truth("bccd_mini_train")
    evaluator = BoxEvaluator(dataset_name="bccd_mini_train", output_dir=tmp_path)
    evaluator.process(*outputs(jittered(read)))
    reported = evaluator.evaluate()["bbox"]["AP"]
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    packed = pack_detections(written)
    assert all(len(rows) <= 100 for rows in packed.values())
    assert all(row[4] >= 0.05 for rows in packed.values() for row in rows)
    count = sum(len(rows) for rows in packed.values())
    assert len(json.dumps(packed, separators=(",", ":"))) < 41 * count
    again = check_packed("x", json.loads(json.dumps(packed)), read, reported)
    assert coco_curves(read, again).summary()["AP"] == pytest.approx(reported, abs=0.05)
    with pytest.raises(EvaluationError, match=r"x: .* but 99\.00 was reported.*--rerun"):
        check_packed("x", packed, read, 99.0)
    with pytest.raises(EvaluationError, match="--rerun"):
        check_packed("x", packed, read, float("nan"))


def test_the_best_detections_of_an_image_are_kept():
    results = [
        {"image_id": "a", "category_id": 7, "bbox": [1.041, 2, 3.33, 4], "score": score}
        for score in (0.04, 0.5, 0.9, 0.123456)
    ]
    packed = pack_detections(results, limit=2)
    assert packed == {"a": [[1.04, 2, 4.37, 6, 0.9, 7], [1.04, 2, 4.37, 6, 0.5, 7]]}
    assert pack_detections(results)["a"][2][4] == 0.1235


@pytest.mark.parametrize(
    ("packed", "named"), [({9: [[0, 0, 1, 1, 1, 0]]}, "image 9"), ({0: [[0, 0, 1, 1, 1, 5]]}, "5")]
)
def test_detections_of_another_data_set_are_refused(packed, named):
    with pytest.raises(EvaluationError, match=named):
        unpack_detections(packed, truth(objects()))


def test_unpacking_maps_categories_back():
    read = truth(objects(), classes=2)
    found = unpack_detections({0: [[0, 0, 1, 1, 0.5, 1]]}, read)[0]
    assert found.classes.tolist() == [1]
    assert np.array_equal(found.boxes, [[0, 0, 1, 1]])
