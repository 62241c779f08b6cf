# SPDX-License-Identifier: Apache-2.0
"""The loader of VOC folders."""

import pytest
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.structures import BoxMode
from helpers_of_data import CLASSES, HEIGHT, WIDTH, annotation

from d2_decouple.data import ground_truth, load_voc, register_voc

pytestmark = pytest.mark.usefixtures("catalogs")


def test_boxes_follow_the_voc_convention(voc):
    first, second = load_voc(voc, "train", CLASSES)
    assert {key: first[key] for key in ("file_name", "image_id", "height", "width")} == {
        "file_name": str(voc / "JPEGImages" / "a.jpg"),
        "image_id": "a",
        "height": HEIGHT,
        "width": WIDTH,
    }
    # Corners count from 1 and are inclusive: (1, 1, W, H) is the whole image.
    assert [item["bbox"] for item in first["annotations"]] == [
        [0, 0, WIDTH, HEIGHT],
        [0, 0, 20, 10],  # annotated from 0: clipped
        [30, 10, 50, 30],
    ]
    assert [item["category_id"] for item in first["annotations"]] == [1, 0, 0]
    assert [item["iscrowd"] for item in first["annotations"]] == [0, 0, 1]
    assert {item["bbox_mode"] for item in first["annotations"]} == {BoxMode.XYXY_ABS}
    assert second["annotations"] == []
    assert second["file_name"].endswith("b.png")


def test_split_lists_with_a_second_column(voc):
    (voc / "ImageSets/Main/dog_train.txt").write_text("a  1\nb -1\n")
    assert [record["image_id"] for record in load_voc(voc, "dog_train", CLASSES)] == ["a", "b"]


def test_suffixes_in_any_spelling(voc):
    images = voc / "JPEGImages"
    (images / "a.jpg").rename(images / "a.Jpg")
    (images / "b.png").rename(images / "b.gif")
    files = [record["file_name"] for record in load_voc(voc, "train", CLASSES)]
    assert files == [str(images / "a.Jpg"), str(images / "b.gif")]


def test_an_id_may_end_like_a_second_column(voc):
    for place, end in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
        (voc / place / f"a{end}").rename(voc / place / f"a 1{end}")
    (voc / "ImageSets/Main/train.txt").write_text("a 1\nb -1\n")
    assert [record["image_id"] for record in load_voc(voc, "train", CLASSES)] == ["a 1", "b"]


def test_ground_truth_leaves_crowds_out(voc):
    first, second = (ground_truth(record) for record in load_voc(voc, "train", CLASSES))
    assert first.image_size == (HEIGHT, WIDTH)
    assert first.gt_classes.tolist() == [1, 0]
    assert first.gt_boxes.tensor.tolist() == [[0, 0, WIDTH, HEIGHT], [0, 0, 20, 10]]
    assert len(second) == 0
    assert second.gt_boxes.tensor.shape == (0, 4)


def test_the_training_mapper_takes_difficult_objects_out(voc):
    record = load_voc(voc, "train", CLASSES)[0]
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="BGR")
    assert mapper(record)["instances"].gt_classes.tolist() == [1, 0]


def test_registering_reads_nothing_and_may_be_repeated(voc):
    register_voc("pets", "no/such/folder", "train", classes=CLASSES)
    register_voc("pets", "no/such/folder", "train", classes=list(CLASSES))
    assert MetadataCatalog.get("pets").thing_classes == list(CLASSES)
    assert MetadataCatalog.get("pets").evaluator_type == "coco"
    with pytest.raises(FileNotFoundError, match="no/such/folder"):
        DatasetCatalog.get("pets")


@pytest.mark.parametrize(
    ("split", "classes"), [("val", CLASSES), ("train", ("dog", "cat")), ("train", None)]
)
def test_a_name_cannot_become_another_set(voc, split, classes):
    register_voc("pets", voc, "train", classes=CLASSES)
    with pytest.raises(ValueError, match="'pets' is already registered") as caught:
        register_voc("pets", voc, split, classes=classes)
    wanted = "those annotated" if classes is None else ", ".join(classes)
    assert "split 'train', classes cat, dog" in str(caught.value)
    assert f"split {split!r}, classes {wanted}" in str(caught.value)
    assert "DatasetCatalog.remove('pets')" in str(caught.value)
    assert len(DatasetCatalog.get("pets")) == 2


def test_a_name_of_somebody_else_is_not_taken(voc):
    with pytest.raises(ValueError, match="'coco_2017_val' is already registered"):
        register_voc("coco_2017_val", voc, "train", classes=CLASSES)


def test_classes_are_read_from_all_splits(voc):
    (voc / "Annotations/only_in_val.xml").write_text(annotation(("bird", 1, 1, 9, 9, 0)))
    register_voc("pets", voc, "train")
    first = DatasetCatalog.get("pets")[0]
    assert MetadataCatalog.get("pets").thing_classes == ["bird", "cat", "dog"]
    assert [item["category_id"] for item in first["annotations"]] == [2, 1, 1]


def test_classes_cannot_be_read_where_nothing_is_annotated(voc):
    (voc / "Annotations/a.xml").write_text(annotation())
    register_voc("pets", voc, "train")
    with pytest.raises(ValueError, match=r"no object in .*Annotations: pass classes="):
        DatasetCatalog.get("pets")


def test_an_unknown_class_is_named(voc):
    with pytest.raises(ValueError, match="unknown class 'dog'") as caught:
        load_voc(voc, "train", ("cat", "cow"))
    assert str(voc / "Annotations" / "a.xml") in str(caught.value)
    assert "known classes: cat, cow" in str(caught.value)


def test_a_missing_split_names_those_there(voc):
    with pytest.raises(FileNotFoundError, match=r"no split 'val': .*val\.txt") as caught:
        load_voc(voc, "val", CLASSES)
    assert "splits found there: train" in str(caught.value)


def test_a_missing_annotation_is_named(voc):
    (voc / "Annotations/b.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.xml is missing, though its split lists b"):
        load_voc(voc, "train", CLASSES)


DOCTYPE = '<!DOCTYPE annotation [<!ENTITY c SYSTEM "file:///etc/hostname">]>'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entities_are_refused(voc, encoding):
    text = annotation(("&c;", 1, 1, 9, 9, 0))
    header = f'<?xml version="1.0" encoding="{encoding}"?>'
    (voc / "Annotations/a.xml").write_text(header + DOCTYPE + text, encoding=encoding)
    with pytest.raises(ValueError, match=r"a\.xml: a DOCTYPE .* is not accepted"):
        load_voc(voc, "train", CLASSES)
    plain = header + annotation(("cat", 1, 1, 9, 9, 0))
    (voc / "Annotations/a.xml").write_text(plain, encoding=encoding)
    assert len(load_voc(voc, "train", CLASSES)[0]["annotations"]) == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("</annotation>", "", r"cannot read annotation .*a\.xml: "),
        ("<xmin>0</xmin>", "", r"a\.xml: <bndbox/xmin> is None, wanted a number"),
        ("<ymax>10</ymax>", "<ymax>ten</ymax>", r"a\.xml: <bndbox/ymax> is 'ten'"),
        (f"<width>{WIDTH}</width>", "", r"a\.xml: <size/width> is None"),
    ],
)
def test_a_broken_annotation_is_named(voc, old, new, message):
    file = voc / "Annotations" / "a.xml"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_voc(voc, "train", CLASSES)
