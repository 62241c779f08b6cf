# SPDX-License-Identifier: Apache-2.0
"""The same images in three formats are the same data, and the same ones are held out."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog

from d2_decouple.data import DataError, register_folder
from d2_decouple.data.shapes import make_shapes

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "write_formats.py"))
FORMATS, main, write_formats = (TOOL[x] for x in ("FORMATS", "main", "write_formats"))

pytestmark = pytest.mark.usefixtures("catalogs")


@pytest.fixture
def toys(tmp_path):
    return make_shapes(tmp_path / "toys", images=12, difficult=0)


def content(part):
    """What training learns from: everything but where the files lie and how they are numbered."""
    return [
        (
            record["file_name"].rsplit("/")[-1],
            record["height"],
            record["width"],
            [(item["bbox"], item["category_id"]) for item in record["annotations"]],
        )
        for record in DatasetCatalog.get(part)
    ]


def test_the_formats_hold_the_same_and_hold_out_the_same_images(toys, tmp_path):
    write_formats(toys, tmp_path / "out", 10)
    found = [register_folder(tmp_path / "out" / name) for name in FORMATS]
    assert len({x.classes for x in found}) == 1
    for role, count in (("train", 8), ("test", 2)):
        voc, coco, yolo = (content(getattr(x, role)) for x in found)
        assert len(voc) == count
        assert sum(len(boxes) for *_, boxes in voc) >= count
        assert voc == coco
        for ours, theirs in zip(voc, yolo, strict=True):  # shares of the image: rounded
            assert ours[:3] == theirs[:3]
            for (box, kind), (other, same) in zip(ours[3], theirs[3], strict=True):
                assert kind == same
                assert box == pytest.approx(other, abs=1e-9)


def test_names_that_differ_in_the_suffix_alone_are_held_out_by_the_whole(toys, tmp_path):
    """``a.png`` and ``a.jpg`` of one COCO file are two images."""
    write_formats(toys, tmp_path / "out", 4)
    folder = tmp_path / "out" / "coco"
    file = folder / "annotations.json"
    tables = json.loads(file.read_text())
    first, second = tables["images"][:2]
    stem = first["file_name"].rsplit(".")[0]
    second_name = f"{stem}.jpeg"  # Pillow looks at the content
    shutil.move(folder / "images" / second["file_name"], folder / "images" / second_name)
    second["file_name"] = second_name
    file.write_text(json.dumps(tables))
    found = register_folder(folder)
    names = [name for role in ("train", "test") for name, *_ in content(getattr(found, role))]
    assert sorted(names) == sorted(image["file_name"] for image in tables["images"])


@pytest.mark.parametrize("count", [1, 13])
def test_a_number_of_images_that_is_not_there(toys, tmp_path, count):
    with pytest.raises(DataError, match="which has 12 for training and test: type --images"):
        write_formats(toys, tmp_path / "out", count)
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(toys, tmp_path):
    write_formats(toys, tmp_path / "out", 4)
    with pytest.raises(SystemExit, match="is not empty; delete it first"):
        main([str(toys), str(tmp_path / "out"), "--images", "4"])
