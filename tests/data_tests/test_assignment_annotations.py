# SPDX-License-Identifier: Apache-2.0
"""Objects of single images, found by name in files and sets of every kind."""

import json
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2_decouple.data.annotations import open_annotations
from d2_decouple.data.loader import DataError

CLASSES = ("ant", "bee")
SIZE = (50, 100)
XML = """<annotation><filename>{name}</filename>
<size><width>100</width><height>50</height></size>
<object><name>bee</name>
<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>70</ymax></bndbox></object>
<object><name>ant</name><difficult>1</difficult>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>
</annotation>"""
FOUND = ([[10.0, 5.0, 30.0, 50.0]], [1])  # cut to the image; what is difficult is no target


def voc(root, *names, xmls="Annotations", images="JPEGImages"):
    for name in names:
        for folder, suffix, text in (
            (xmls, "xml", XML.format(name=f"{name}.jpg")),
            (images, "jpg", ""),
        ):
            (root / folder).mkdir(parents=True, exist_ok=True)
            (root / folder / f"{name}.{suffix}").write_text(text)
    return root


def coco(file, *names, categories=("bee", "ant")):
    content = {
        "images": [
            {"id": index, "file_name": name, "width": 100, "height": 50}
            for index, name in enumerate(names)
        ],
        "categories": [{"id": 5 + i, "name": name} for i, name in enumerate(categories)],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 5, "bbox": [10, 5, 20, 65]},
            {"id": 2, "image_id": 0, "category_id": 6, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        ],
    }
    file.write_text(json.dumps(content))
    return file


def objects(where, image, classes=CLASSES, size=SIZE):
    found = open_annotations(None if where is None else str(where), classes).objects(image, size)
    assert found.image_size == size
    return found.gt_boxes.tensor.tolist(), found.gt_classes.tolist()


def test_every_kind_gives_the_same_objects(tmp_path):
    root = voc(tmp_path / "set", "a", "b")
    image = root / "JPEGImages" / "a.jpg"
    places = [root, root / "Annotations", root / "Annotations" / "a.xml", None]
    for where in places:
        assert objects(where, image) == FOUND
    # The image may lie elsewhere, under its name.
    for where in places[:3]:
        assert objects(where, Path("elsewhere/a.png")) == FOUND
    file = coco(tmp_path / "objects.json", "train/a.jpg", "b.jpg")
    assert objects(file, Path("elsewhere/a.jpg")) == FOUND
    assert objects(file, Path("b.jpg")) == ([], [])


@pytest.mark.parametrize(("xmls", "images"), [(".", "."), ("Annotations", ".")])
def test_an_xml_file_beside_the_image_is_found(tmp_path, xmls, images):
    root = voc(tmp_path, "a", xmls=xmls, images=images)
    assert objects(None, root / images / "a.jpg") == FOUND


def test_an_image_is_found_by_relative_paths(tmp_path, monkeypatch):
    voc(tmp_path, "a")
    monkeypatch.chdir(tmp_path / "JPEGImages")
    assert objects(None, Path("a.jpg")) == FOUND
    assert objects("../Annotations", Path("a.jpg")) == FOUND


def test_classes_are_those_of_the_model(tmp_path):
    root = voc(tmp_path / "set", "a")
    file = coco(tmp_path / "objects.json", "a.jpg")
    for where in (root, file):
        assert objects(where, Path("a.jpg"), classes=("bee", "ant"))[1] == [0]
    assert objects(root, Path("a.jpg"), classes=())[1] == [1]  # sorted
    assert objects(file, Path("a.jpg"), classes=())[1] == [0]  # as declared
    with pytest.raises(DataError, match="unknown class 'bee'; known classes: ant"):
        objects(root, Path("a.jpg"), classes=("ant",))
    with pytest.raises(DataError, match=r"objects.json has the surplus bee; wanted the classes"):
        objects(file, Path("a.jpg"), classes=("ant",))


def test_a_registered_set(tmp_path):
    records = [
        {
            "file_name": f"/{folder}/a.jpg",
            "height": 50,
            "width": 100,
            "annotations": [{"bbox": [10, 5, 30, 50], "bbox_mode": 0, "category_id": 0}],
        }
        for folder in ("one", "two")
    ]
    DatasetCatalog.register("assignment_set", lambda: records)
    MetadataCatalog.get("assignment_set").set(thing_classes=["bee", "ant"])
    try:
        assert objects("assignment_set", Path("/two/a.jpg")) == FOUND
        assert objects("assignment_set", Path("/two/a.jpg"), classes=("x", "ant", "bee"))[1] == [2]
        assert objects("assignment_set", Path("/two/a.jpg"), classes=())[1] == [0]
        assert records[1]["annotations"][0]["category_id"] == 0
        with pytest.raises(
            DataError, match=r"2 images of this name, /one/a.jpg and /two/a.jpg; giv"
        ):
            objects("assignment_set", Path("/three/a.jpg"))
        with pytest.raises(DataError, match=r"has the class bee, and the model was trained on ant"):
            objects("assignment_set", Path("/two/a.jpg"), classes=("ant",))
    finally:
        DatasetCatalog.remove("assignment_set")
        MetadataCatalog.remove("assignment_set")


def test_of_equal_names_the_folder_decides(tmp_path):
    file = coco(tmp_path / "objects.json", "train/a.jpg", "val/a.jpg")
    assert objects(file, Path("/data/train/a.jpg")) == FOUND
    assert objects(file, Path("/data/val/a.jpg")) == ([], [])
    with pytest.raises(DataError, match=r"has 2 images of this name, train/a.jpg and val/a.jpg"):
        objects(file, Path("/data/other/a.jpg"))


def test_an_image_without_annotation_is_told_where_it_was_sought(tmp_path):
    root = voc(tmp_path / "set", "a", "b")
    file = coco(tmp_path / "objects.json", "a.jpg")
    image = Path("/data/c.jpg")
    for where, looked in (
        (None, "/data/c.xml, /data/Annotations/c.xml, /Annotations/c.xml"),
        (root, f"{root}/Annotations/c.xml"),
        (file, f"c.jpg among the 1 images of {file}"),
    ):
        with pytest.raises(DataError, match="no annotation") as error:
            objects(where, image)
        assert str(error.value).startswith(f"{image} has no annotation: looked for {looked}; type")
    one = root / "Annotations" / "a.xml"  # the file of another image, though b has one, too
    with pytest.raises(DataError, match=f"b.jpg has no annotation: looked for {one}; type"):
        objects(one, Path("b.jpg"))


def test_what_is_no_annotation_is_refused(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.xml").write_text(XML.format(name="b.jpg"))
    (tmp_path / "empty").mkdir()
    for where, message in (
        (tmp_path / "empty", "no .xml file lies in .*empty; wanted is a folder in the layout of V"),
        (tmp_path / "a.txt", r"a.txt is neither .json nor .xml; type --annotations with"),
        ("no_such_thing", "no_such_thing: no such file or folder; unknown dataset"),
    ):
        with pytest.raises(DataError, match=message):
            open_annotations(str(where), CLASSES)
    with pytest.raises(DataError, match=r"b.xml is an annotation of b.jpg, .* put the image there"):
        objects(tmp_path / "b.xml", Path("b.jpg"))


def test_a_picture_of_another_size_is_refused(tmp_path):
    file = coco(tmp_path / "objects.json", "a.jpg")
    with pytest.raises(
        DataError, match=r"a.jpg is 50 x 100 pixels .* for 100 x 50; give the image"
    ):
        objects(file, Path("a.jpg"), size=(100, 50))
