# SPDX-License-Identifier: Apache-2.0
"""The loader of COCO files: what is sound is read, what is not is named."""

import gc
import json
import math
import os
import time

import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from helpers_of_data import CLASSES, HEIGHT, WIDTH, coco_content, write_coco

from d2_decouple.data import DataError, load_coco, register_coco
from d2_decouple.data.coco import read_coco
from d2_decouple.evaluation import BoxEvaluator

pytestmark = pytest.mark.usefixtures("catalogs")


@pytest.fixture
def coco(tmp_path):
    """Writes content -> the file and the folder of its images."""

    def write(content):
        write_coco(tmp_path / "instances.json", content, tmp_path / "images")
        return tmp_path / "instances.json", tmp_path / "images"

    return write


@pytest.mark.skipif(os.name == "nt", reason="there a backslash is no part of a name")
def test_paths_written_on_windows(tmp_path):
    content = coco_content()
    write_coco(tmp_path / "instances.json", content, tmp_path / "images")
    for image in content["images"]:
        image["file_name"] = image["file_name"].replace("/", "\\")
    (tmp_path / "instances.json").write_text(json.dumps(content))
    *_, last = load_coco(tmp_path / "instances.json", tmp_path / "images")
    assert last["file_name"] == str(tmp_path / "images" / "sub" / "c.png")
    (tmp_path / "images" / "sub\\c.png").write_bytes(b"")
    *_, last = load_coco(tmp_path / "instances.json", tmp_path / "images")
    assert last["file_name"] == str(tmp_path / "images" / "sub\\c.png")


def test_a_large_set_is_read_in_linear_time(tmp_path):
    """A third of COCO; it took eight seconds."""
    image = {"width": 10, "height": 10}
    images = [{**image, "id": i, "file_name": f"{i}.jpg"} for i in range(40_000)]
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    began = time.process_time()
    assert len(read_coco(tmp_path / "instances.json").records(tmp_path, {1: 0})) == 40_000
    assert time.process_time() - began < 4


def changed(table, index, **values):
    content = coco_content()
    content[table][index].update(values)
    return content


def test_ids_with_gaps_from_zero_and_in_any_order(coco):
    file, folder = coco(coco_content())
    first, second, third = load_coco(file, folder)
    assert [record["image_id"] for record in (first, second, third)] == [0, 3, 7]
    assert third["file_name"] == str(folder / "sub" / "c.png")
    assert (first["height"], first["width"]) == (HEIGHT, WIDTH)
    assert first["annotations"] == [
        {
            "bbox": [0, 0, WIDTH, HEIGHT],
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": 1,
            "iscrowd": 0,
        },
        {
            "bbox": [0, 0, 20, 10.5],
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": 0,
            "iscrowd": 0,
            "area": 99,
        },
    ]
    assert second["annotations"] == []  # negatives are kept
    # A crowd stays one, and what is to be ignored becomes one.
    assert [(x["category_id"], x["iscrowd"]) for x in third["annotations"]] == [(0, 1), (1, 1)]
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="BGR")
    assert len(mapper(third)["instances"]) == 0
    assert mapper(first)["instances"].gt_classes.tolist() == [1, 0]


@pytest.mark.parametrize("area", [0, -3, math.nan, math.inf, "9", None])
def test_an_area_that_cannot_be_is_left_out(coco, area):
    first = load_coco(*coco(changed("annotations", 1, area=area)))[0]
    assert all("area" not in item for item in first["annotations"])


def test_ids_of_images_may_be_texts(coco):
    content = coco_content()
    for image in content["images"]:
        image["id"] = f"x{image['id']}"
    for item in content["annotations"]:
        item["image_id"] = f"x{item['image_id']}"
    assert [record["image_id"] for record in load_coco(*coco(content))] == ["x0", "x3", "x7"]


def test_registering_reads_nothing_and_may_be_repeated(coco):
    file, folder = coco(coco_content())
    register_coco("pets", "no/such.json", folder)
    register_coco("pets", "no/such.json", str(folder))
    with pytest.raises(FileNotFoundError, match=r"no annotations .*no/such\.json"):
        DatasetCatalog.get("pets")
    with pytest.raises(DataError, match="'pets' is already registered") as caught:
        register_coco("pets", file, folder)
    assert str(file) in str(caught.value)
    register_coco("others", file, folder)
    assert len(DatasetCatalog.get("others")) == 3
    metadata = MetadataCatalog.get("others")
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {0: 0, 90: 1}
    assert metadata.evaluator_type == "coco"
    assert len(DatasetCatalog.get("others")) == 3  # metadata take the same values again


def test_classes_may_be_given_in_another_order(coco):
    content = coco_content()
    content["categories"].append({"id": 4, "name": "pets", "supercategory": "none"})
    file, folder = coco(content)
    register_coco("pets", file, folder, classes=("dog", "cat"))
    assert MetadataCatalog.get("pets").thing_classes == ["dog", "cat"]
    first = DatasetCatalog.get("pets")[0]
    assert [item["category_id"] for item in first["annotations"]] == [0, 1]
    assert MetadataCatalog.get("pets").thing_dataset_id_to_contiguous_id == {0: 1, 90: 0}


def test_classes_that_are_not_those_of_the_file_are_named(coco):
    file, folder = coco(coco_content())
    with pytest.raises(DataError, match=r"instances\.json has the surplus dog and lacks cow"):
        load_coco(file, folder, ("cat", "cow"))


@pytest.mark.parametrize(
    ("box", "warning"),
    [
        ([50, 30, 20, 20], "boxes that reach beyond their image, cut: 1"),
        ([-5, 3, 8, 9], "boxes that reach beyond their image, cut: 1"),
        ([5, 5, 0, 9], "boxes without area inside their image, dropped: 1"),
        ([5, 5, 3, -2], "boxes without area inside their image, dropped: 1"),
        ([500, 5, 3, 3], "boxes without area inside their image, dropped: 1"),
        ([math.nan, 5, 3, 3], "boxes with a NaN or infinite coordinate, dropped: 1"),
        ([5, 5, math.inf, 3], "boxes with a NaN or infinite coordinate, dropped: 1"),
        ([-math.inf, 5, 9, 3], "boxes with a NaN or infinite coordinate, dropped: 1"),
    ],
)
def test_boxes_that_cannot_be_are_counted_and_named(coco, caplog, box, warning):
    file, folder = coco(changed("annotations", 1, bbox=box))
    found = load_coco(file, folder)[0]["annotations"]
    assert len(caplog.records) == 1
    assert f"{file}: {warning} (the first in {folder / 'a.png'})" in caplog.text
    assert len(found) == (2 if "cut" in warning else 1)
    if "cut" in warning:
        x1, y1, x2, y2 = found[1]["bbox"]
        assert 0 <= x1 < x2 <= WIDTH
        assert 0 <= y1 < y2 <= HEIGHT


def test_sound_boxes_pass_without_a_word(coco, caplog):
    load_coco(*coco(coco_content()))
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"cannot read .*instances\.json as JSON"),
        ("[1]", "not in COCO's format: got list, wanted an object with the lists images, annot"),
        ('{"images": [], "shapes": []}', "got images, shapes, wanted an object with the lists"),
        (changed("annotations", 0, category_id=5), "annotation 0 names category 5, which is not"),
        (changed("annotations", 0, category_id=5), "declared are: 0 cat, 90 dog"),
        (changed("annotations", 2, image_id=8), "annotation 5 names image 8, which is not among"),
        (changed("annotations", 2, id=1), "ids of annotations: 1 come more than once, first 1"),
        (changed("images", 1, id=7), "ids of images: 1 come more than once, first 7"),
        (changed("categories", 1, id=90), "ids of categories: 1 come more than once, first 90"),
        (changed("categories", 1, name="dog"), "names of categories: 1 .* first 'dog'"),
        (changed("images", 1, file_name="../a.png"), r"file_name of image 0 is '\.\./a\.png'"),
        (changed("images", 1, file_name="x/../../a"), r"neither absolute nor with '\.\.'"),
        (changed("images", 1, file_name="/etc/a.png"), "file_name of image 0 is '/etc/a.png'"),
        (changed("images", 1, file_name="C:\\a.png"), r"file_name of image 0 is 'C:\\\\a\.png'"),
        (changed("images", 1, width=None), "an image has width None, wanted int"),
        (changed("images", 1, height=0), "'a.png' is 60 x 0, wanted its size"),
        (changed("images", 1, id=None), "an image has id None, wanted int or str"),
        (changed("annotations", 0, bbox=[1, 2, 3]), r"annotation 0 has bbox \[1, 2, 3\], wanted f"),
        (changed("annotations", 0, bbox=["a"] * 4), "annotation 0 has bbox .* wanted four numbers"),
        (changed("annotations", 0, bbox=[0, 0, 10**400, 9]), "a number of a box is out of range"),
        (changed("annotations", 0, iscrowd="0"), "annotation 0 has iscrowd '0', wanted 0 or 1"),
        (changed("annotations", 2, ignore="no"), "annotation 5 has ignore 'no', wanted 0 or 1"),
        (changed("categories", 1, name=" "), "category 0 has no name; write one"),
        ('{"images": ' + "[" * 100_000, r"cannot read .*instances\.json as JSON"),
        (changed("annotations", 0, id=[1]), r"an annotation has id \[1\], wanted int or str"),
        (changed("annotations", 0, category_id="dog"), "annotation 0 has category_id 'dog'"),
        ({**coco_content(), "images": [], "annotations": []}, r"instances\.json has no images"),
        ({**coco_content(), "categories": ["cat"]}, "a category has id None, wanted int"),
    ],
)
def test_a_faulty_file_is_named(tmp_path, content, message):
    file, folder = tmp_path / "instances.json", tmp_path / "images"
    folder.mkdir()
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        load_coco(file, folder)
    assert str(file) in str(caught.value)


def test_missing_images_are_counted_and_the_first_is_named(coco):
    file, folder = coco(coco_content())
    (folder / "b.png").unlink()
    (folder / "sub/c.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of the 3 images of .*first is .*b\.png"):
        load_coco(file, folder)
    with pytest.raises(FileNotFoundError, match=r"no dataset folder .*elsewhere"):
        load_coco(file, folder / "elsewhere")


@pytest.mark.parametrize("content", [coco_content(), "{"])
def test_the_garbage_collector_runs_again_afterwards(coco, content):
    file, folder = coco(coco_content())
    if content == "{":
        file.write_text(content)
        with pytest.raises(DataError):
            load_coco(file, folder)
    else:
        load_coco(file, folder)
    assert gc.isenabled()


def test_evaluation_with_ids_that_trouble_pycocotools(coco, tmp_path):
    """Neither annotation 0, nor gaps, nor keys that are missing from the file do harm."""
    register_coco("pets", *coco(coco_content()), classes=CLASSES)
    evaluator = BoxEvaluator(dataset_name="pets", output_dir=tmp_path / "out")
    evaluator.reset()
    for record in DatasetCatalog.get("pets"):
        found = Instances((HEIGHT, WIDTH))
        items = record["annotations"]
        boxes = torch.tensor([item["bbox"] for item in items], dtype=torch.float32)
        found.pred_boxes = Boxes(boxes.reshape(-1, 4))
        found.pred_classes = torch.tensor([item["category_id"] for item in items])
        found.scores = torch.full((len(items),), 0.9)
        evaluator.process([record], [{"instances": found}])
    result = evaluator.evaluate()["bbox"]
    assert result["AP-cat"] == result["AP-dog"] == pytest.approx(100)
