# SPDX-License-Identifier: Apache-2.0
"""Faults in a VOC folder are found when it is loaded: counted and cut, dropped, or named."""

import pytest
from PIL import Image

from d2_decouple.data import load_voc


@pytest.fixture
def folder(tmp_path):
    """Writes a folder of 40x30 images from lists of corners, one list an image."""

    def write(*images):
        for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (tmp_path / name).mkdir(parents=True)
        for number, boxes in enumerate(images):
            items = "".join(
                "<object><name>cell</name><bndbox>"
                + "".join(
                    f"<{key}>{value}</{key}>"
                    for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
                )
                + "</bndbox></object>"
                for box in boxes
            )
            (tmp_path / f"Annotations/{number}.xml").write_text(
                f"<annotation><filename>{number}.png</filename><size><width>40</width>"
                f"<height>30</height></size>{items}</annotation>"
            )
            Image.new("RGB", (40, 30)).save(tmp_path / f"JPEGImages/{number}.png")
        ids = "\n".join(str(number) for number in range(len(images)))
        (tmp_path / "ImageSets/Main/train.txt").write_text(ids)
        return tmp_path

    return write


def boxes(records):
    return [[item["bbox"] for item in record["annotations"]] for record in records]


def test_boxes_beyond_the_image_are_cut_and_counted(folder, caplog):
    root = folder([(1, 1, 10, 10)], [(31, 21, 50, 90), (-5, 3, 8, 9)])
    assert boxes(load_voc(root, "train", ["cell"])) == [
        [[0, 0, 10, 10]],
        [[30, 20, 40, 30], [0, 2, 8, 9]],
    ]
    assert "1 boxes reach beyond their image and are cut, the first in 1" in caplog.text
    assert "no area" not in caplog.text


def test_boxes_without_area_are_dropped_and_counted(folder, caplog):
    # Inverted, empty (VOC's corners are inclusive, so xmax = xmin - 1), and outside altogether.
    root = folder([(30, 5, 10, 9), (5, 5, 4, 9)], [(5000, 3, 5010, 9), (1, 1, 1, 1)])
    assert boxes(load_voc(root, "train", ["cell"])) == [[], [[0, 0, 1, 1]]]
    assert "3 boxes have no area and are dropped, the first in 0" in caplog.text


def test_sound_boxes_pass_without_a_word(folder, caplog):
    load_voc(folder([(1, 1, 40, 30)], []), "train", ["cell"])
    assert caplog.text == ""


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "", "12px"])
def test_a_corner_that_is_no_number_names_file_and_value(folder, value):
    root = folder([(1, 1, 10, value)])
    with pytest.raises(ValueError, match=r"0\.xml: <bndbox/ymax> is '.*', wanted a number"):
        load_voc(root, "train", ["cell"])


def test_missing_images_are_counted_and_the_first_is_named(folder):
    root = folder([], [], [])
    (root / "JPEGImages/1.png").unlink()
    (root / "JPEGImages/2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of the 3 images .*'train'.*JPEGImages.1\.png"):
        load_voc(root, "train", ["cell"])
