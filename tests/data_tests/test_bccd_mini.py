# SPDX-License-Identifier: Apache-2.0
"""The mini set of blood cells, and the tool that chose it."""

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from d2_decouple.data import BCCD_CLASSES, load_voc, register_bccd

REPOSITORY = Path(__file__).resolve().parents[2]
MINI = REPOSITORY / "tests" / "data" / "bccd_mini"

pytestmark = pytest.mark.usefixtures("catalogs")


def test_mini_set():
    register_bccd()
    train, val = (DatasetCatalog.get(f"bccd_mini_{split}") for split in ("train", "val"))
    assert (len(train), len(val)) == (48, 12)
    assert not {r["image_id"] for r in train} & {r["image_id"] for r in val}
    for records, numbers in ((train, (662, 51, 67)), (val, (168, 13, 17))):
        counts = Counter(item["category_id"] for r in records for item in r["annotations"])
        assert tuple(counts[index] for index in range(len(BCCD_CLASSES))) == numbers
    for record in train + val:
        with Image.open(record["file_name"]) as image:
            assert image.size == (record["width"], record["height"])
        boxes = np.array([item["bbox"] for item in record["annotations"]])
        assert (boxes[:, 2:] - boxes[:, :2] >= 8).all()
        assert (boxes >= 0).all()
        assert (boxes <= np.tile(image.size, 2)).all()


def test_mini_set_is_small_and_names_no_foreign_folder():
    files = [file for file in MINI.rglob("*") if file.is_file()]
    assert len(files) == 60 + 60 + 2 + 2
    assert sum(-(-file.stat().st_size // 4096) * 4096 for file in files) < 2_500_000
    assert "MIT License" in (MINI / "LICENSE").read_text()
    for file in (MINI / "Annotations").iterdir():
        assert "<path>" not in file.read_text()


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location(
        "make_bccd_mini", REPOSITORY / "tools" / "make_bccd_mini.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tool_takes_the_path_out(tool):
    text = "<annotation>\n\t<filename>a</filename>\n\t<path>/x/y.jpg</path>\n\t<source>\n"
    assert tool.without_path(text) == "<annotation>\n\t<filename>a</filename>\n\t<source>\n"


def test_tool_recognises_a_shifted_field_and_only_that(tool):
    with Image.open(MINI / "JPEGImages" / "BloodImage_00366.jpg") as image:
        first, second = image.crop((0, 0, 560, 420)), image.crop((80, 60, 640, 480))
    with Image.open(MINI / "JPEGImages" / "BloodImage_00385.jpg") as image:
        other = image.crop((0, 0, 560, 420))
    peak = tool.correlation_peak(tool.phase(first), tool.phase(second))
    assert peak > tool.MIN_TWIN_PEAK
    assert tool.correlation_peak(tool.phase(first), tool.phase(other)) < tool.MIN_TWIN_PEAK


def test_tool_chooses_the_same_images_from_the_mini_set_itself(tool, tmp_path):
    (tmp_path / "LICENSE").write_text("licence")
    with pytest.raises(SystemExit, match="not empty; delete it first"):
        tool.write(MINI, tmp_path, {"train": [], "val": []})
    chosen = tool.choose(tool.candidates(MINI, "val"), 9, 3, avoid=())
    assert [candidate.image_id for candidate in chosen] == [
        record["image_id"] for record in load_voc(MINI, "val", BCCD_CLASSES)
    ]
    with pytest.raises(SystemExit, match="too few sound images"):
        tool.choose(tool.candidates(MINI, "val"), 10, 3, avoid=())
