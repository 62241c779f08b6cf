# SPDX-License-Identifier: Apache-2.0
"""YOLO's labels: layouts that are recognised, numbers that become boxes, and faults."""

import re
import shutil

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import ExifTags, Image
from yolo_folders import data_yaml, labels, pictures, yolo_shapes

from d2_decouple.data import DataError, register_folder
from d2_decouple.data.shapes import SHAPES, make_shapes
from d2_decouple.data.yolo import YOLOSource
from d2_decouple.data.yolo_labels import label_file

pytestmark = pytest.mark.usefixtures("catalogs")

LINE = "0 0.5 0.5 0.2 0.4\n"


def records(found, role="train"):
    return DatasetCatalog.get(getattr(found, role))


def ids(found, role="train"):
    return [record["image_id"] for record in records(found, role)]


def boxes(record):
    return [item["bbox"] for item in record["annotations"]]


@pytest.fixture
def pets(tmp_path):
    """Two images for training and one for the test, all with one object."""
    folder = tmp_path / "pets"
    pictures(folder, "images/train/a.png", "images/train/b.png", "images/val/c.png")
    labels(folder / "labels/train", a=LINE, b=LINE)
    labels(folder / "labels/val", c=LINE)
    data_yaml(folder, train="images/train", val="images/val", names=["cat", "dog"])
    return folder


def test_the_same_records_as_from_voc(tmp_path):
    folder = yolo_shapes(tmp_path / "toys", images=8, negatives=0.3)
    yolo, voc = register_folder(folder), register_folder(tmp_path / "toys_voc")
    assert yolo.classes == voc.classes == SHAPES
    assert yolo.notes == (
        f"{folder}: YOLO, 3 classes: circle, rectangle, triangle",
        "6 images for training, 2 for the test: the folder's own train and val",
    )
    assert MetadataCatalog.get(yolo.train).thing_classes == list(SHAPES)
    for role in ("train", "test"):
        for ours, theirs in zip(records(yolo, role), records(voc, role), strict=True):
            place = ours.pop("file_name")
            assert place != theirs.pop("file_name")
            assert ours == theirs
    assert sum(len(record["annotations"]) for record in records(yolo)) > 5
    assert register_folder(folder) == yolo


def test_without_splits_the_same_images_are_held_out_as_from_voc(tmp_path):
    voc = make_shapes(tmp_path / "toys_voc", images=10, difficult=0)
    both = yolo_shapes(tmp_path / "toys", voc)
    folder = tmp_path / "whole"
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
        for file in (both / part).glob("*/*"):
            shutil.copy(file, folder / part / file.name)
    shutil.rmtree(voc / "ImageSets")
    (folder / "classes.txt").write_text("\n".join(SHAPES) + "\n\n")
    found, other = register_folder(folder), register_folder(voc)
    assert (len(ids(found)), len(ids(found, "test"))) == (8, 2)
    assert ids(found) == ids(other)
    assert ids(found, "test") == ids(other, "test")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_names_in_another_encoding_are_refused(pets, encoding):
    (pets / "data.yaml").unlink(missing_ok=True)
    (pets / "classes.txt").write_bytes("cat\nKäfer\n".encode(encoding))
    with pytest.raises(DataError, match=r"classes\.txt is not UTF-8 .*: save it with that"):
        register_folder(pets)
    (pets / "classes.txt").write_bytes("cat\nKäfer\n".encode("utf-8-sig"))
    assert register_folder(pets).classes == ("cat", "Käfer")


def test_a_box_is_its_middle_and_its_sides_as_shares(pets):
    labels(pets / "labels/train", a="1 0.5 0.5 0.2 0.4\n\n  0 0.25 0.1 0.5 0.2  \n", b="")
    first, second = records(register_folder(pets))
    # 60 x 40: the middle is (30, 20), the sides are 12 and 16; then (15, 4), 30 and 8.
    assert boxes(first) == [[24.0, 12.0, 36.0, 28.0], [0.0, 0.0, 30.0, 8.0]]
    assert [item["category_id"] for item in first["annotations"]] == [1, 0]
    assert {item["bbox_mode"] for item in first["annotations"]} == {BoxMode.XYXY_ABS}
    assert {item["iscrowd"] for item in first["annotations"]} == {0}
    assert (first["width"], first["height"], first["image_id"]) == (60, 40, "a")
    assert second["annotations"] == []


def test_a_polygon_becomes_its_box(pets):
    labels(pets / "labels/train", a="0 0.5 0.1 0.2 0.5 0.8 0.9\n")
    # x from 0.2 to 0.8 of 60, y from 0.1 to 0.9 of 40.
    assert boxes(records(register_folder(pets))[0]) == [[12.0, 4.0, 48.0, 36.0]]


def test_a_box_beyond_the_image_is_cut_and_rounding_is_borne(pets):
    labels(pets / "labels/train", a="0 0.95 1.005 0.2 0.2\n")
    # From 0.85 * 60 to 1.05 * 60, and from 0.905 * 40: cut at 60 and 40.
    assert boxes(records(register_folder(pets))[0]) == [[51.0, 36.2, 60.0, 40.0]]


def test_images_without_a_label_file_have_no_objects_and_are_counted(pets):
    (pets / "labels/train/b.txt").unlink()
    found = register_folder(pets)
    assert [len(record["annotations"]) for record in records(found)] == [1, 0]
    assert "1 images have no label file" in found.notes[-1]
    assert str(pets / "images/train/b.png") in found.notes[-1]


def test_the_size_is_that_of_the_picture_as_it_is_shown(pets):
    image = Image.new("RGB", (60, 40))
    image.getexif()[ExifTags.Base.Orientation] = 6  # a quarter turn
    image.save(pets / "images/train/a.jpg", exif=image.getexif())
    (pets / "images/train/a.png").unlink()
    record = records(register_folder(pets))[0]
    assert (record["width"], record["height"]) == (40, 60)
    assert boxes(record) == [[16.0, 18.0, 24.0, 42.0]]


@pytest.mark.parametrize(
    "names", [["cat", "dog"], {0: "cat", 1: "dog"}, {1: "dog", 0: "cat"}, ["cat ", "dog"]]
)
def test_names_are_a_list_or_numbered(pets, names):
    data_yaml(pets, train="images/train", val="images/val", names=names, nc=2)
    assert register_folder(pets).classes == ("cat", "dog")


LAYOUTS = {
    "of a labelling service": (
        ["train/images/a.png", "valid/images/c.png"],
        ["train/labels/a", "valid/labels/c"],
        {"train": "../train/images", "val": "../valid/images", "names": ["cat"]},
    ),
    "the same without data.yaml": (
        ["train/images/a.png", "valid/images/c.png"],
        ["train/labels/a", "valid/labels/c"],
        None,
    ),
    "splits below images": (
        ["images/train/a.png", "images/val/c.png"],
        ["labels/train/a", "labels/val/c"],
        None,
    ),
    "labels beside images": (["train/a.png", "val/c.png"], ["train/a", "val/c"], None),
    "several folders": (
        ["images/x/a.png", "images/y/c.png"],
        ["labels/x/a", "labels/y/c"],
        {"train": ["images/x"], "val": ["images/y"], "names": ["cat"]},
    ),
    "below a path": (
        ["data/images/train/a.png", "data/images/val/c.png"],
        ["data/labels/train/a", "data/labels/val/c"],
        {"path": "data", "train": "images/train", "val": "images/val", "names": ["cat"]},
    ),
    "test in the place of val": (
        ["images/train/a.png", "images/test/c.png"],
        ["labels/train/a", "labels/test/c"],
        {"train": "images/train", "test": "images/test", "val": "", "names": ["cat"]},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path):
    folder = tmp_path / "pets"
    images, texts, yaml = LAYOUTS[layout]
    pictures(folder, *images)
    for text in texts:
        place, name = text.rsplit("/", 1)
        labels(folder / place, **{name: LINE})
    if yaml is None:
        (folder / "classes.txt").write_text("cat\n")
    else:
        data_yaml(folder, **yaml)
    found = register_folder(folder)
    assert found.classes == ("cat",)
    assert (ids(found), ids(found, "test")) == (["a"], ["c"])
    assert boxes(records(found)[0]) == boxes(records(found, "test")[0]) == [[24, 12, 36, 28]]
    assert not any("no label file" in note for note in found.notes)


@pytest.mark.parametrize("prefix", ["", "./", "data/"])
def test_lists_of_images_and_labels_beside_them(tmp_path, prefix):
    folder = tmp_path / "pets"
    pictures(folder, "obj_train_data/a.png", "obj_train_data/c.png", "obj_train_data/unlisted.png")
    labels(folder / "obj_train_data", a=LINE, c=LINE, unlisted=LINE)
    (folder / "obj.names").write_text("cat\n")
    (folder / "train.txt").write_text(f"{prefix}obj_train_data/a.png\n\n")
    (folder / "valid.txt").write_text(f"{prefix}obj_train_data/c.png\n")
    found = register_folder(folder)
    assert (ids(found), ids(found, "test")) == (["a"], ["c"])


def test_all_in_one_folder_is_split(tmp_path):
    folder = tmp_path / "pets"
    pictures(folder, *(f"{index}.png" for index in range(5)))
    labels(folder, **{str(index): LINE for index in range(5)}, classes="cat\ndog\n")
    found = register_folder(folder)
    assert found.classes == ("cat", "dog")
    assert sorted(ids(found) + ids(found, "test")) == ["0", "1", "2", "3", "4"]
    assert len(ids(found, "test")) == 1


def test_pictures_of_one_name_in_several_folders_are_told_apart(pets):
    pictures(pets, "images/train/x/a.png")
    labels(pets / "labels/train/x", a="")
    assert ids(register_folder(pets)) == ["images/train/a", "images/train/b", "images/train/x/a"]
    pictures(pets, "images/train/x/a.jpg")
    with pytest.raises(DataError, match=r"images of one name.*images/train/x/a.*rename"):
        register_folder(pets)


def test_a_path_of_another_machine_is_not_followed(pets):
    data_yaml(
        pets, path="/content/pets", train="images/train", val="images/val", names=["cat", "dog"]
    )
    found = register_folder(pets)
    assert f"path '/content/pets' in data.yaml is not followed: {pets} was given" in found.notes


def test_validation_on_the_training_images_is_said(pets):
    data_yaml(pets, train="images/train", val="images/train", names=["cat", "dog"])
    assert any("learned by heart" in note for note in register_folder(pets).notes)


def test_voc_and_coco_come_first(pets):
    make_shapes(pets / "x", images=4, layout="coco")
    shutil.copytree(pets / "x" / "annotations", pets / "annotations")
    for split in ("train", "val"):
        shutil.copytree(pets / "x" / split, pets / split)
    assert ": COCO, 3 classes" in register_folder(pets).notes[0]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0 0.5 0.5 0.2\n", ["line 1 has 4 numbers", "wanted five numbers"]),
        ("0 0.5 0.5 0.2 0.2 0.9\n", ["line 1 has 6 numbers", "is the sixth a score"]),
        ("0 0.5 0.5 0.2 0.2 0.9 0.1 0.1\n", ["line 1 has 8 numbers"]),
        (LINE + "cat 0.5 0.5 0.2 0.2\n", ["line 2 is 'cat 0.5", "wanted five numbers"]),
        ("0 30 20 12 16\n", ["line 1 has 30", "from 0 to 1", "pixels are divided"]),
        ("0 0.5 1.02 0.2 0.2\n", ["line 1 has 1.02", "from 0 to 1"]),
        ("0 0.5 0.5 -0.2 0.2\n", ["line 1 has -0.2"]),
        ("0 0.5 nan 0.2 0.2\n", ["line 1 has nan"]),
        ("2 0.5 0.5 0.2 0.2\n", ["line 1 has class 2", "0 cat, 1 dog", "count from 1"]),
        ("3 0.5 0.5 0.2 0.2\n", ["line 1 has class 3; known are 0 cat, 1 dog"]),
        ("-1 0.5 0.5 0.2 0.2\n", ["line 1 has class -1"]),
        ("0.5 0.5 0.5 0.2 0.2\n", ["line 1 has class 0.5"]),
    ],
)
def test_a_faulty_line_is_named_with_its_file(pets, text, parts):
    labels(pets / "labels/train", a=text)
    with pytest.raises(DataError) as error:
        register_folder(pets)
    for part in (str(pets / "labels/train/a.txt"), *parts):
        assert part in str(error.value)
    assert not any(name.startswith("pets") for name in DatasetCatalog.list())


def test_a_label_file_that_is_no_text_is_named(pets):
    (pets / "labels/train/a.txt").write_bytes(b"\xff\xfe0\x00")
    with pytest.raises(DataError, match=r"a\.txt is no text.*five numbers"):
        register_folder(pets)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"names": ["cat", "cat"]}, ["come more than once", "'cat'"]),
        ({"names": ["cat", ""]}, ["class 1 has an empty name"]),
        ({"names": []}, ["no class"]),
        ({"names": ["cat", False]}, ["read as False", "quotes"]),
        ({"names": {1: "cat", 2: "dog"}}, ["numbers 1, 2", "0 to 1"]),
        ({"names": "cat"}, ["'cat'", "a list"]),
        ({"names": ["cat", "dog"], "nc": 3}, ["nc is 3", "names has 2"]),
        ({"names": ["cat", "dog"], "kpt_shape": [17, 3]}, ["kpt_shape", "keypoints"]),
        ({"names": ["cat"], "train": "../../other"}, ["../../other", "leads out of"]),
        ({"names": ["cat"], "train": "/elsewhere/images"}, ["/elsewhere", "leads out of"]),
        ({"names": ["cat"], "train": "images/trian"}, ["images/trian", "there is no"]),
        ({"names": ["cat"], "train": 3}, ["is 3", "a folder of images"]),
        ({"names": ["cat"], "train": "", "val": ""}, ["train and val are empty"]),
        ({"name": ["cat"]}, ["lacks names"]),
    ],
)
def test_a_faulty_data_yaml_is_named(pets, content, parts):
    data_yaml(pets, **{"train": "images/train", "val": "images/val", **content})
    with pytest.raises((DataError, FileNotFoundError)) as error:
        register_folder(pets)
    for part in ("data.yaml", *parts):
        assert part in str(error.value)


def test_a_data_yaml_that_is_no_yaml_is_named(pets):
    (pets / "data.yaml").write_text("names: [cat\n")
    with pytest.raises(DataError, match=r"cannot read .*data\.yaml"):
        register_folder(pets)


def test_another_yaml_beside_it_is_no_matter_but_two_of_them_are(pets):
    (pets / "notes.yaml").write_text("- seen\n")
    (pets / "broken.yml").write_text("a: [\n")
    assert register_folder(pets).classes == ("cat", "dog")
    shutil.copy(pets / "data.yaml", pets / "pets.yaml")
    with pytest.raises(DataError, match=r"data\.yaml, pets\.yaml.*leave one"):
        register_folder(pets)


def test_labels_without_names_say_what_to_write(pets):
    (pets / "data.yaml").unlink()
    with pytest.raises(DataError, match=r"nothing there names the classes.*classes\.txt"):
        register_folder(pets)


def test_lists_that_lead_elsewhere_are_refused(pets):
    data_yaml(pets, train="train.txt", val="images/val", names=["cat", "dog"])
    (pets / "train.txt").write_text("images/train/a.png\n../secret.png\n")
    with pytest.raises(DataError, match=r"train\.txt, line 2: '\.\./secret\.png' leads out of"):
        register_folder(pets)
    (pets / "train.txt").write_text("images/train/none.png\n")
    with pytest.raises(FileNotFoundError, match=r"train\.txt, line 1: there is no image"):
        register_folder(pets)


def test_no_labels_at_all_is_a_fault(pets):
    shutil.rmtree(pets / "labels" / "train")
    wanted = re.escape(str(pets / "labels/train/a.txt"))
    with pytest.raises(DataError, match=f"none of the 2 images .* has a label file.*{wanted}"):
        register_folder(pets)


def test_images_that_cannot_be_opened_are_counted_and_named(pets):
    (pets / "images/train/b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1 of the 2 images .*b\.png \(no image"):
        register_folder(pets)


def test_a_split_without_images_is_named(pets):
    (pets / "images/val/c.png").unlink()
    with pytest.raises(DataError, match=r"images/val\) has no images"):
        register_folder(pets)


def test_texts_beside_images_are_no_labels(tmp_path):
    pictures(tmp_path / "art", "a.png")
    labels(tmp_path / "art", a="A cat looks at 4 dogs 1 2\n")
    with pytest.raises(DataError, match=r"is no dataset.*no annotations that belong to them"):
        register_folder(tmp_path / "art")


def test_the_folder_inside_of_the_given_one_is_named(pets):
    with pytest.raises(DataError, match=re.escape(f"is {pets} meant?")):
        register_folder(pets.parent)


def test_a_source_says_what_it_is(pets):
    source = YOLOSource("x", str(pets), ("images/train",), ("cat", "dog"))
    assert repr(source) == f"YOLO folder {str(pets)!r}, images in images/train, classes cat, dog"


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("images/train/a.png", "labels/train/a.txt"),
        ("images/x/images/a.b.png", "images/x/labels/a.b.txt"),  # the last one
        ("train/a.png", "train/a.txt"),
        ("images", "images.txt"),  # a file's name is no folder
    ],
)
def test_where_labels_lie(tmp_path, image, label):
    assert label_file(tmp_path, tmp_path / image) == tmp_path / label
