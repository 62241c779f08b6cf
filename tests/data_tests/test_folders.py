# SPDX-License-Identifier: Apache-2.0
"""Folders of labelled images are recognised, split and registered."""

import json
import shutil

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers_of_data import annotation, coco_content, write_coco
from PIL import Image

from d2_decouple.data import DataError, register_folder
from d2_decouple.data.shapes import SHAPES, make_shapes

pytestmark = pytest.mark.usefixtures("catalogs")


def images(name):
    return [record["image_id"] for record in DatasetCatalog.get(name)]


def without_splits(folder):
    shutil.rmtree(folder / "ImageSets")
    return folder


def test_voc_with_splits(tmp_path):
    folder = make_shapes(tmp_path / "toys", images=8)
    found = register_folder(folder)
    assert found.classes == SHAPES
    assert (len(images(found.train)), len(images(found.test))) == (6, 2)
    assert MetadataCatalog.get(found.train).thing_classes == list(SHAPES)
    assert found.notes == (
        f"{folder}: Pascal VOC, 3 classes: circle, rectangle, triangle",
        "6 images for training, 2 for the test: the folder's own train and val",
    )
    assert register_folder(str(folder)) == found


@pytest.mark.parametrize(
    ("splits", "train", "test", "unused"),
    [
        ("trainval test train val", "trainval", "test", []),
        ("train val test", "train", "val", ["test"]),
        ("train test", "train", "test", []),
        ("train valid", "train", "valid", []),
        ("trainval train val", "train", "val", []),
        ("trainval val", "trainval", None, []),
        ("train", "train", None, []),
    ],
)
def test_which_splits_are_used(tmp_path, splits, train, test, unused):
    folder = without_splits(make_shapes(tmp_path / "toys", images=12))
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "circle_train.txt").write_text("shapes_00000 1\n")  # a list of VOC's for one class
    ids = [f"shapes_{index:05d}" for index in range(12)]
    parts = {split: ids[2 * i : 2 * i + 2] for i, split in enumerate(splits.split())}
    for split, part in parts.items():
        (lists / f"{split}.txt").write_text("\n".join(part))
    found = register_folder(folder)
    if test is None:
        assert sorted(images(found.train) + images(found.test)) == parts[train]
        assert f"no test split beside {train}, so 20% are held out" in found.notes[1]
    else:
        assert images(found.train) == parts[train]
        assert images(found.test) == parts[test]
    named = [line for line in found.notes if line.startswith("not used: ")]
    assert named == ([f"not used: {', '.join(unused)}"] if unused else [])


def test_a_set_without_splits_is_split_by_seed(tmp_path):
    folder = without_splits(make_shapes(tmp_path / "toys", images=20, negatives=0.3))
    found = register_folder(folder)
    train, test = images(found.train), images(found.test)
    assert (len(train), len(test)) == (16, 4)
    assert not set(train) & set(test)
    assert "no splits, so 20% are held out, by name and seed 0" in found.notes[1]
    assert register_folder(folder) == found
    # Neither the place of the folder nor what is listed first plays a part.
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "toys")
    other = register_folder(copy)
    assert (images(other.train), images(other.test)) == (train, test)
    assert other.train != found.train
    seeded = register_folder(folder, seed=1, test_fraction=0.5)
    assert len(images(seeded.test)) == 10
    assert "50% are held out, by name and seed 1" in seeded.notes[1]
    assert images(register_folder(folder, seed=1).test) != test


def test_one_image_more_moves_few_others(tmp_path):
    folder = without_splits(make_shapes(tmp_path / "toys", images=20))
    test = set(images(register_folder(folder).test))
    for part, suffix in (("Annotations", "xml"), ("JPEGImages", "png")):
        source = folder / part / f"shapes_00000.{suffix}"
        shutil.copy(source, source.with_stem("added"))
    again = set(images(register_folder(folder).test))
    assert len(test - again) <= 1


def test_classes_come_from_all_annotations_and_negatives_stay(tmp_path):
    folder = tmp_path / "pets"
    for index, items in enumerate(([("dog", 1, 1, 9, 9, 0)], [], [("cat", 1, 1, 9, 9, 0)])):
        (folder / "annotations").mkdir(parents=True, exist_ok=True)
        (folder / "images").mkdir(exist_ok=True)
        text = annotation(*items, filename=f"{index}.jpg")
        (folder / f"annotations/{index}.xml").write_text(text)
        Image.new("RGB", (60, 40)).save(folder / f"images/{index}.jpg")
    Image.new("RGB", (60, 40)).save(folder / "images/unlabelled.jpg")
    found = register_folder(folder)
    assert found.classes == ("cat", "dog")
    assert sorted(images(found.train) + images(found.test)) == ["0", "1", "2"]
    assert "1 images without an .xml file are not used, the first is " in found.notes[-1]
    assert str(folder / "images/unlabelled.jpg") in found.notes[-1]


def test_images_of_another_name_than_their_annotation_are_used(tmp_path):
    folder = without_splits(make_shapes(tmp_path / "toys", images=4))
    for file in (folder / "Annotations").iterdir():
        file.rename(file.with_stem(file.stem.replace("shapes", "labels")))
    found = register_folder(folder)
    assert len(images(found.train) + images(found.test)) == 4
    assert not any("not used" in note for note in found.notes)


def test_names_of_lists_in_capitals_and_lists_that_say_nothing(tmp_path):
    folder = make_shapes(tmp_path / "toys", images=8)
    lists = folder / "ImageSets/Main"
    for name in ("train", "val"):
        (lists / f"{name}.txt").rename(lists / f"{name.title()}.txt")
    assert "6 images for training, 2 for the test: the folder's" in register_folder(folder).notes[1]
    for name in ("Train", "Val"):
        (lists / f"{name}.txt").rename(lists / f"my_{name}.txt")
    found = register_folder(folder)
    assert "the folder has no splits" in found.notes[1]
    note = "lists in ImageSets/Main that are not used: my_Train, my_Val; wanted one named train"
    assert found.notes[2].startswith(note)


@pytest.mark.parametrize("layout", ["voc", "coco"])
def test_hidden_files_are_passed_over(tmp_path, layout):
    """Those that an archive made on a Mac holds beside each file."""
    folder = make_shapes(tmp_path / "toys", images=8, layout=layout)
    files = [file for file in folder.rglob("*") if file.is_file()]
    if layout == "voc":
        shutil.rmtree(folder / "ImageSets")
    for file in files:
        if file.suffix == ".json":
            file = file.rename(file.with_name(file.name.removeprefix("instances_")))
        if file.parent.is_dir():
            file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7\xff")
    found = register_folder(folder)
    assert len(images(found.train) + images(found.test)) == 8
    assert len(found.notes) == 2


def test_a_category_that_is_its_own_parent_is_a_class(tmp_path):
    content = coco_content()
    for category in content["categories"]:
        category["supercategory"] = category["name"]
    content["annotations"] = [x for x in content["annotations"] if x["category_id"] == 0]
    write_coco(tmp_path / "pets/all.json", content, tmp_path / "pets/images")
    assert register_folder(tmp_path / "pets").classes == ("cat", "dog")


def test_a_voc_folder_for_each_split(tmp_path):
    folder = tmp_path / "export"
    for split, name in (("train", "a"), ("valid", "b"), ("test", "c")):
        (folder / split).mkdir(parents=True)
        text = annotation(("cat" if name == "b" else "dog", 1, 1, 9, 9, 0), filename=f"{name}.jpg")
        (folder / split / f"{name}.xml").write_text(text)
        Image.new("RGB", (60, 40)).save(folder / split / f"{name}.jpg")
    found = register_folder(folder)
    assert (images(found.train), images(found.test)) == (["a"], ["b"])
    assert found.classes == ("cat", "dog")
    assert "not used: test" in found.notes


@pytest.mark.parametrize("where", ["train2017", "images/train2017", "images", ""])
def test_coco_with_the_images_in_usual_places(tmp_path, where):
    folder = tmp_path / "pets"
    for split in ("train", "val"):
        place = folder / where.replace("train", split)
        write_coco(folder / f"annotations/instances_{split}2017.json", coco_content(), place)
        write_coco(folder / f"annotations/captions_{split}2017.json", {"images": []}, place)
    found = register_folder(folder)
    assert found.classes == ("cat", "dog")
    assert images(found.train) == images(found.test) == [0, 3, 7]
    assert DatasetCatalog.get(found.test)[0]["file_name"] == str(
        folder / where.replace("train", "val") / "a.png"
    )
    assert found.notes[0] == f"{folder}: COCO, 2 classes: cat, dog"
    assert register_folder(folder) == found


def test_coco_folder_of_a_labelling_service(tmp_path):
    """A root category that no object has, the json among the images, and ids from 0."""
    folder = tmp_path / "export"
    content = coco_content()
    content["categories"] = [
        {"id": 1, "name": "pets", "supercategory": "none"},
        {"id": 0, "name": "cat", "supercategory": "pets"},
        {"id": 90, "name": "dog", "supercategory": "pets"},
    ]
    for split in ("train", "valid", "test"):
        write_coco(folder / split / "_annotations.coco.json", content, folder / split)
    found = register_folder(folder)
    assert found.classes == ("cat", "dog")
    assert "category pets is only the others' parent and is no class" in found.notes
    assert "not used: test" in found.notes
    first = DatasetCatalog.get(found.test)[0]
    assert first["file_name"] == str(folder / "valid" / "a.png")
    assert [item["category_id"] for item in first["annotations"]] == [1, 0]


def test_a_parent_with_objects_of_its_own_is_a_class(tmp_path):
    content = coco_content()
    content["categories"][1]["supercategory"] = "dog"
    write_coco(tmp_path / "pets/all.json", content, tmp_path / "pets/images")
    assert register_folder(tmp_path / "pets").classes == ("cat", "dog")


@pytest.mark.parametrize("name", ["labels.json", "annotations/labels.json"])
def test_a_single_coco_file_is_split_by_seed(tmp_path, name):
    folder = tmp_path / "pets"
    write_coco(folder / name, coco_content(), folder / "images")
    (folder / "settings.json").write_text('{"version": 1}')
    found = register_folder(folder, test_fraction=0.3)
    assert sorted(images(found.train) + images(found.test)) == [0, 3, 7]
    assert len(images(found.test)) == 1
    assert "2 images for training, 1 for the test: the folder has no splits" in found.notes[1]
    held_out = DatasetCatalog.get(found.test)[0]["file_name"]
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    other = DatasetCatalog.get(register_folder(copy, test_fraction=0.3).test)[0]["file_name"]
    assert other == held_out.replace("pets", "elsewhere")


def test_coco_classes_that_differ_are_named(tmp_path):
    folder = tmp_path / "pets"
    write_coco(folder / "annotations/train.json", coco_content(), folder / "images")
    content = coco_content()
    content["categories"].append({"id": 2, "name": "cow"})
    write_coco(folder / "annotations/val.json", content, folder / "images")
    before = set(DatasetCatalog.list())
    with pytest.raises(DataError, match="the first has the surplus cow; wanted the same") as caught:
        register_folder(folder)
    assert str(folder / "annotations/train.json") in str(caught.value)
    assert set(DatasetCatalog.list()) == before


def test_categories_of_other_ids_are_matched_by_name(tmp_path):
    folder = tmp_path / "pets"
    write_coco(folder / "annotations/train.json", coco_content(), folder / "images")
    text = json.dumps(coco_content()).replace('"id": 90', '"id": -1')
    content = json.loads(text.replace('"category_id": 90', '"category_id": -1'))
    write_coco(folder / "annotations/val.json", content, folder / "images")
    found = register_folder(folder)
    train, test = (DatasetCatalog.get(name)[0]["annotations"] for name in (found.train, found.test))
    assert [x["category_id"] for x in train] == [x["category_id"] for x in test] == [1, 0]


def test_a_fault_that_was_corrected_leaves_nothing_behind(tmp_path):
    folder = make_shapes(tmp_path / "toys", images=4)
    image = next((folder / "JPEGImages").iterdir())
    content = image.read_bytes()
    image.unlink()
    with pytest.raises(FileNotFoundError, match=image.name):
        register_folder(folder)
    image.write_bytes(content)
    assert len(images(register_folder(folder).train)) == 3


def empty(folder):
    folder.mkdir()


def only_images(folder):
    folder.mkdir()
    (folder / "labels.yaml").write_text("")
    Image.new("RGB", (9, 9)).save(folder / "a.jpg")


def two_unnamed_files(folder):
    for name in ("one.json", "two.json"):
        write_coco(folder / name, coco_content(), folder / "images")


def only_test(folder):
    write_coco(folder / "test.json", coco_content(), folder / "images")


def nothing_annotated(folder):
    write_coco(folder / "all.json", {**coco_content(), "annotations": []}, folder / "images")


def nothing_annotated_in_voc(folder):
    folder.mkdir()
    (folder / "a.xml").write_text(annotation())


def broken(folder):
    folder.mkdir()
    (folder / "instances_train.json").write_text("{")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (empty, r"is no dataset: found nothing; wanted one of these layouts:\n  Annotations/"),
        (only_images, "found labels.yaml, 1 images; wanted one of these layouts"),
        (two_unnamed_files, r"cannot tell which of one\.json, two\.json is for training"),
        (only_test, "found only test, and nothing to train on; wanted a split named train"),
        (nothing_annotated, r"all\.json annotates no object: nothing to learn"),
        (nothing_annotated_in_voc, "no object is annotated in .*pets: nothing to learn"),
        (broken, r"cannot read .*instances_train\.json as JSON"),
    ],
)
def test_folders_that_are_no_dataset(tmp_path, write, message):
    write(tmp_path / "pets")
    with pytest.raises(DataError, match=message):
        register_folder(tmp_path / "pets")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no dataset folder .*pets; correct the path"):
        register_folder(tmp_path / "pets")


def test_images_that_are_in_no_known_place(tmp_path):
    folder = tmp_path / "pets"
    write_coco(folder / "train.json", coco_content(), tmp_path / "elsewhere")
    (folder / "images").mkdir()
    with pytest.raises(FileNotFoundError, match=r"its first image 'a\.png' is in none of .*images"):
        register_folder(folder)


@pytest.mark.parametrize("fraction", [0, 1, -0.2, float("nan")])
def test_a_test_fraction_that_leaves_nothing(tmp_path, fraction):
    with pytest.raises(DataError, match="test_fraction must lie between 0 and 1, got"):
        register_folder(make_shapes(tmp_path / "toys", images=2), test_fraction=fraction)


def test_a_single_image_cannot_be_split(tmp_path):
    folder = tmp_path / "pets"
    content = coco_content()
    content["images"] = content["images"][1:2]
    content["annotations"] = content["annotations"][:2]
    write_coco(folder / "all.json", content, folder / "images")
    with pytest.raises(DataError, match="1 images cannot be split into training and test images"):
        register_folder(folder)
