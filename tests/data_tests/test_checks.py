# SPDX-License-Identifier: Apache-2.0
"""Faults of a dataset are found before the first iteration, and named."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from PIL import Image

from d2_decouple.data import register_folder, register_voc
from d2_decouple.data.checks import check_datasets, main
from d2_decouple.data.shapes import SHAPES, make_shapes

pytestmark = pytest.mark.usefixtures("catalogs")

MINI = Path(__file__).resolve().parents[1] / "data" / "bccd_mini"


@pytest.fixture
def toys(tmp_path):
    return make_shapes(tmp_path / "toys", images=40, size=(40, 60), difficult=0)


def check(folder, *, decode=False, **options):
    found = register_folder(folder)
    options = {"num_classes": 3, **options}
    return check_datasets([found.train], [found.test], decode=decode, **options)


def image(folder, index=0):
    return folder / "JPEGImages" / f"shapes_{index:05d}.png"


@pytest.mark.parametrize("decode", [False, True])
def test_a_sound_set_passes_without_a_word(toys, decode):
    report = check(toys, decode=decode)
    assert (report.faults, report.warnings) == ([], [])
    assert [(x.role, len(x.records), x.classes) for x in report.splits] == [
        ("training", 30, SHAPES),
        ("test", 10, SHAPES),
    ]


def test_truncated_images_are_found_by_decoding_alone(toys):
    image(toys).write_bytes(image(toys).read_bytes()[:-900])
    image(toys, 1).write_bytes(b"")
    (fault,) = check(toys).faults
    assert fault.startswith(f"images that cannot be opened: 1 ({image(toys, 1)} (no image of a")
    (fault,) = check(toys, decode=True).faults
    assert fault.startswith(f"images that cannot be decoded: 2 ({image(toys)} (")


def test_images_of_another_size_than_annotated(toys):
    Image.new("RGB", (59, 40)).save(image(toys, 3))
    assert check(toys).faults == [
        "images of another size than their annotation's: 1 "
        f"({image(toys, 3)} (59x40, annotated 60x40))"
    ]


def turned(folder, size, orientation):
    """Image 0 of ``size`` with an EXIF tag; the set annotates 60x40."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image(folder).unlink()
    Image.new("RGB", size).save(image(folder).with_suffix(".jpg"), exif=exif)
    return str(image(folder).with_suffix(".jpg"))


def test_images_that_exif_turns(toys):
    file = turned(toys, (40, 60), 6)  # shown as annotated
    assert check(toys).faults == check(toys).warnings == []
    Path(file).rename(image(toys))
    turned(toys, (60, 40), 6)  # annotated as stored
    (fault,) = check(toys).faults
    assert "annotated as they are stored; training reads them turned" in fault
    assert f"{file} (40x60, annotated 60x40)" in fault
    Path(file).rename(image(toys))
    turned(toys, (60, 40), 3)  # upside down: the size does not tell
    (warning,) = check(toys).warnings
    assert "turns or mirrors without another size" in warning
    assert f"{file} (orientation 3)" in warning


def test_images_of_16_bits_and_transparent_ones_are_in_order(toys):
    """They are read for training as they are for inference."""
    Image.fromarray(np.full((40, 60), 999, np.uint16)).save(image(toys))
    assert check(toys, decode=True).warnings == []
    Image.new("RGBA", (60, 40), (0, 0, 0, 100)).save(image(toys))
    assert check(toys, decode=True).warnings == []


def test_boxes_that_the_loader_mends_are_still_counted(toys):
    for index, value in ((0, "5000"), (1, "-5"), (2, "nan")):
        file = toys / f"Annotations/shapes_{index:05d}.xml"
        text, count = re.subn(r"<xmax>\d+<", f"<xmax>{value}<", file.read_text(), count=1)
        assert count == 1
        file.write_text(text)
    report = check(toys)
    assert report.faults == []
    ours = [line for line in report.warnings if "boxes" in line]
    assert len(ours) == 3
    for line, what, index in zip(
        ours,
        ("boxes that reach beyond their image, cut", "boxes without area", "a NaN or infinite"),
        (0, 1, 2),
        strict=True,
    ):
        assert what in line
        assert line.endswith(f": 1 ({image(toys, index)})")


def test_a_missing_image_and_annotation_are_faults(toys):
    found = register_folder(toys)
    image(toys, 4).unlink()
    (toys / "Annotations/shapes_00035.xml").unlink()
    report = check_datasets([found.train], [found.test], num_classes=3, decode=False)
    assert report.splits == []
    assert f"training set {found.train!r} cannot be read: 1 of the 30 images" in report.faults[0]
    assert str(image(toys, 4)) in report.faults[0]
    assert "shapes_00035.xml is missing" in report.faults[1]


def test_a_class_that_the_model_lacks_names_count_id_and_file(toys):
    found = register_folder(toys)
    report = check_datasets([found.train], [], num_classes=2, decode=False)
    (fault,) = report.faults
    assert (
        "category ids beyond the model's 2 classes (0 to 1), which would be trained as b" in fault
    )
    assert "(id 2 in " in fault
    assert ".png" in fault


def test_images_in_training_and_test(toys):
    shutil.copy(image(toys, 0), image(toys, 39))  # byte for byte: found when they are read
    assert check(toys).warnings == []
    (warning,) = check(toys, decode=True).warnings
    assert warning == (
        "images in training and test sets, so that AP says too much: 1 "
        f"({image(toys, 0)} = {image(toys, 39)})"
    )
    lists = toys / "ImageSets/Main"
    lists.joinpath("val.txt").write_text("shapes_00001\n" + (lists / "val.txt").read_text())
    (warning,) = check(toys).warnings
    assert warning.endswith(f"says too much: 1 ({image(toys, 1)})")


def test_rare_classes_and_those_of_one_split_are_named(tmp_path):
    folder = make_shapes(tmp_path / "toys", images=2, size=(40, 60), negatives=0)
    for name, label in (("shapes_00000", "star"), ("shapes_00001", "circle")):
        file = folder / f"Annotations/{name}.xml"
        text = file.read_text()
        for shape in SHAPES:
            text = text.replace(f"<name>{shape}<", f"<name>{label}<")
        file.write_text(text)
    few, training, test = check(folder, num_classes=2).warnings
    assert few.startswith("classes with fewer than 5 training objects: ")
    assert "circle 0" in few
    assert training == "classes with training objects only: 1 (star)"
    assert test == "classes with test objects only: 1 (circle)"


def records(toys, **changes):
    """Two records as somebody else's loader may give them; ``changes`` are made to the first."""
    item = {"bbox": [5, 5, 9, 9], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    found = [
        {
            "file_name": str(image(toys, index)),
            "image_id": index,
            "height": 40,
            "width": 60,
            "annotations": [dict(item)] * 5,
        }
        for index in range(2)
    ]
    annotation = {key: changes.pop(key) for key in list(changes) if key in item}
    found[0]["annotations"] = [{**item, **annotation}, *found[0]["annotations"]]
    found[0].update(changes)
    return found


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"bbox": [5, math.nan, 9, 9]}, "boxes with a NaN or infinite coordinate: 1 ("),
        ({"bbox": [5, 5, math.inf, 9]}, "boxes with a NaN or infinite coordinate: 1 ("),
        ({"category_id": 3}, "model's 1 classes (0 to 0), which would be trained as background: 1"),
        ({"category_id": -1}, "(id -1 in "),
        ({"image_id": 1}, "ids that several images have: 1 (1)"),
        ({"file_name": "no/such.png"}, "image files that are missing: 1 (no/such.png)"),
    ],
)
def test_sets_of_other_loaders(toys, changes, fault):
    DatasetCatalog.register("others", lambda: records(toys, **changes))
    report = check_datasets(["others"], [], num_classes=1, decode=False)
    assert len(report.faults) == 1
    assert fault in report.faults[0]


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"bbox": [5, 5, 0, 9]}, "boxes without area in their image, dropped: 1 ("),
        ({"bbox": [50, 5, 20, 9]}, "boxes that reach beyond their image, cut: 1 ("),
    ],
)
def test_boxes_of_other_loaders_that_do_no_harm(toys, changes, warning):
    DatasetCatalog.register("others", lambda: records(toys, **changes))
    report = check_datasets(["others"], [], num_classes=1, decode=False)
    assert report.faults == []
    assert len(report.warnings) == 1
    assert warning in report.warnings[0]
    assert str(image(toys)) in report.warnings[0]


def test_a_file_that_is_listed_twice(toys):
    DatasetCatalog.register("others", lambda: records(toys, file_name=str(image(toys, 1))))
    report = check_datasets(["others"], [], num_classes=1, decode=False)
    assert report.faults == []
    assert "image files that are listed more than once: 1 (" in report.warnings[0]


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        ([], "training set 'others' has no images"),
        ([{"annotations": []}], "training set 'others' has no objects to learn from"),
    ],
)
def test_sets_without_anything_to_learn(toys, found, fault):
    sound = {"file_name": str(image(toys)), "image_id": 0, "height": 40, "width": 60}
    DatasetCatalog.register("others", lambda: [{**sound, **record} for record in found])
    assert fault in check_datasets(["others"], [], num_classes=1, decode=False).faults


def test_difficult_objects_alone_are_nothing_to_learn(toys):
    for file in (toys / "Annotations").iterdir():
        file.write_text(file.read_text().replace("<difficult>0<", "<difficult>1<"))
    (fault,) = check(toys).faults
    assert fault.endswith("_train' has no objects to learn from")


def test_a_test_set_without_objects_and_one_that_is_unknown(toys):
    DatasetCatalog.register("empty", lambda: [{**records(toys)[0], "annotations": []}])
    report = check_datasets([], ["empty", "emtpy"], num_classes=1, decode=False)
    assert report.warnings == ["test set 'empty' has no objects: nothing can be measured on it"]
    (fault,) = report.faults
    assert fault.startswith("test set 'emtpy' cannot be read: unknown dataset 'emtpy'; did you")


def test_classes_that_differ_between_sets(toys):
    register_voc("one", toys, "train", classes=SHAPES)
    register_voc("two", toys, "val", classes=SHAPES[::-1])
    (fault,) = check_datasets(["one"], ["two"], num_classes=3, decode=False).faults
    assert "test set 'two' has the classes triangle, rectangle, circle, 'one' has circle" in fault


def test_detectron2s_own_coco_sets(tmp_path):
    folder = make_shapes(tmp_path / "toys", images=12, layout="coco", difficult=0.3)
    file = folder / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    crowds = sum(item["iscrowd"] for item in content["annotations"])
    content["annotations"][0]["bbox"] = [0, 0, 500, 500]
    file.write_text(json.dumps(content))
    register_coco_instances("theirs", {}, str(file), str(folder / "train"))
    report = check_datasets(["theirs"], [], num_classes=3, decode=True)
    assert report.faults == []
    assert any("boxes that reach beyond their image, cut: 1 (" in x for x in report.warnings)
    (split,) = report.splits
    assert split.classes == SHAPES == tuple(MetadataCatalog.get("theirs").thing_classes)
    assert sum(item["iscrowd"] for x in split.records for item in x["annotations"]) == crowds > 0


def test_a_limit_spreads_the_images_that_are_opened(toys, monkeypatch):
    opened = []
    real = Image.open
    monkeypatch.setattr(
        Image, "open", lambda file, **options: opened.append(file) or real(file, **options)
    )
    check(toys, limit=5)
    assert [Path(file).stem[-2:] for file in sorted(opened)] == ["00", "09", "19", "29", "39"]
    opened.clear()
    check(toys, limit=None)
    assert len(opened) == 40


def test_command(toys, tmp_path, capsys):
    output = tmp_path / "out"
    assert main([str(toys), "--output", str(output), "--short-side", "80"]) == 0
    printed = capsys.readouterr().out
    assert f"{toys}: Pascal VOC, 3 classes: circle, rectangle, triangle" in printed
    assert "30 images, 3 of them without objects; 30 of 60x40" in printed
    assert "faults that stop a training: none\nwarnings: none" in printed
    (picture,) = output.iterdir()
    assert f"sizes of the boxes: {picture}" in printed
    with Image.open(picture) as drawn:
        assert min(drawn.size) > 500
        assert len(np.unique(np.asarray(drawn.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    row = next(line for line in printed.splitlines() if line.startswith("all"))
    boxes = [
        item
        for record in DatasetCatalog.get(register_folder(toys).train)
        for item in record["annotations"]
    ]
    # 40x60 pixels are doubled: an object is half of 13 to 40 pixels from its middle, so in P3.
    assert row.split()[:4] == ["all", str(len(boxes)), "27", "0"]
    assert row.split()[-5:] == ["100%", "–", "–", "–", "–"]


def test_command_with_faults_has_exit_status_1_and_names_all(toys, tmp_path, capsys):
    for index in range(5):
        image(toys, index).write_bytes(b"no image")
    assert main([str(toys), "--output", str(tmp_path / "out"), "--quick"]) == 1
    printed = capsys.readouterr().out
    assert "faults that stop a training: 1\n  images that cannot be opened: 5 (" in printed
    assert "and 2 more)" in printed
    (complete,) = (tmp_path / "out").glob("*_findings.txt")
    assert f"with all files named: {complete}" in printed
    assert all(str(image(toys, index)) in complete.read_text() for index in range(5))


def test_command_on_registered_sets(tmp_path, capsys):
    names = ["bccd_mini_train", "bccd_mini_val"]
    assert main(["--dataset", *names, "--quick", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "training set 'bccd_mini_train': 48 images, 0 of them without objects" in printed
    assert "test set 'bccd_mini_val': 12 images" in printed
    rows = [line.split() for line in printed.splitlines() if line.startswith("Platelets")]
    assert [row[1] for row in rows] == ["67", "17"]
    assert (tmp_path / "bccd_mini_train_box_sizes.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "bccd_mini_vla"], "error: unknown dataset 'bccd_mini_vla'; did you mean"),
        (["no/such/folder"], "error: no dataset folder "),
    ],
)
def test_command_that_cannot_begin(capsys, arguments, message):
    assert main(arguments) == 1
    assert capsys.readouterr().err.startswith(message)


def test_the_module_runs_as_a_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "d2_decouple.data.checks", str(MINI), "--quick"],
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join([str(MINI.parents[2]), *sys.path]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "RuntimeWarning" not in done.stderr  # the package must not import its own command
    assert len(list((tmp_path / "output" / "checks").glob("bccd-mini_*_box_sizes.png"))) == 1
