# SPDX-License-Identifier: Apache-2.0
"""The generated toy set."""

import hashlib

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from d2_decouple.data import DataError, load_coco, load_voc, register_folder
from d2_decouple.data.shapes import SHAPES, main, make_shapes

pytestmark = pytest.mark.usefixtures("catalogs")


def contents(folder):
    return {
        file.relative_to(folder): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def objects(records):
    return [
        (item["category_id"], item["bbox"], item["iscrowd"])
        for record in records
        for item in record["annotations"]
    ]


@pytest.mark.parametrize("layout", ["voc", "coco"])
def test_the_seed_decides_every_byte(tmp_path, layout):
    first, again, other = (
        contents(make_shapes(tmp_path / name, images=6, seed=seed, layout=layout))
        for name, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    assert first == again
    assert first.keys() == other.keys()
    assert not {first[name] for name in first if name.suffix == ".png"} & set(other.values())


def test_both_layouts_hold_the_same(tmp_path):
    voc = make_shapes(tmp_path / "voc", images=8, difficult=0.3)
    coco = make_shapes(tmp_path / "coco", images=8, difficult=0.3, layout="coco")
    for split, count in (("train", 6), ("val", 2)):
        ours = load_voc(voc, split, SHAPES)
        theirs = load_coco(coco / f"annotations/instances_{split}.json", coco / split)
        assert len(ours) == len(theirs) == count
        assert objects(ours) == objects(theirs)
        for one, two in zip(ours, theirs, strict=True):
            with Image.open(one["file_name"]) as image, Image.open(two["file_name"]) as same:
                assert image.size == (one["width"], one["height"]) == (160, 120)
                assert np.array_equal(np.asarray(image), np.asarray(same))


def test_boxes_are_exact(tmp_path):
    """Where a shape is drawn, its colour is strong; it touches each side of its box."""
    records = load_voc(make_shapes(tmp_path / "s", images=12, difficult=0), "train", SHAPES)
    assert {kind for kind, *_ in objects(records)} == {0, 1, 2}
    for record in records:
        with Image.open(record["file_name"]) as image:
            pixels = np.asarray(image).astype(int)
        strong = pixels.max(axis=2) - pixels.min(axis=2) > 110
        inside = np.zeros_like(strong)
        for item in record["annotations"]:
            x1, y1, x2, y2 = map(int, item["bbox"])
            part = strong[y1:y2, x1:x2]
            for side in (part[0], part[-1], part[:, 0], part[:, -1]):
                assert side.any(), (record["image_id"], item)
            assert not inside[y1:y2, x1:x2].any()  # no two boxes overlap
            inside[y1:y2, x1:x2] = True
        assert (strong & ~inside).mean() < 0.005


def test_negatives_and_difficult_objects(tmp_path):
    folder = make_shapes(tmp_path / "s", images=20, negatives=0.25, difficult=1, val_fraction=0.5)
    records = load_voc(folder, "train", SHAPES) + load_voc(folder, "val", SHAPES)
    assert sum(not record["annotations"] for record in records) == 5
    assert {crowd for *_, crowd in objects(records)} == {1}
    folder = make_shapes(tmp_path / "t", images=4, negatives=0, difficult=0)
    assert all(record["annotations"] for record in load_voc(folder, "train", SHAPES))
    assert {crowd for *_, crowd in objects(load_voc(folder, "train", SHAPES))} == {0}


def test_each_split_has_an_image(tmp_path):
    folder = make_shapes(tmp_path / "s", images=2, val_fraction=0, size=(16, 16))
    assert [len(load_voc(folder, split, SHAPES)) for split in ("train", "val")] == [1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 1}, "wanted 2 or more images of 16 x 16 pixels or more, got 1"),
        ({"size": (120, 8)}, r"got 60 of \(120, 8\)"),
        ({"negatives": 1.5}, "negatives must lie between 0 and 1, got 1.5"),
        ({"layout": "yolo"}, "layout must be one of voc, coco, got 'yolo'"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        make_shapes(tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_command(tmp_path, capsys):
    folder = tmp_path / "toys"
    assert main([str(folder), "--images", "5", "--size", "40", "50", "--layout", "coco"]) == 0
    assert capsys.readouterr().out == f"5 images in {folder}\n"
    found = register_folder(folder)
    assert found.classes == SHAPES
    assert len(DatasetCatalog.get(found.train)) == 4
    assert DatasetCatalog.get(found.test)[0]["height"] == 40
    assert main([str(folder)]) == 1  # never writes into a folder with files
    assert f"{folder} is not an empty folder; name a new one" in capsys.readouterr().err
