# SPDX-License-Identifier: Apache-2.0
"""Faults in a VOC folder are found when it is loaded: counted and cut, dropped, or named."""

import shutil

import pytest
from PIL import Image

from d2_decouple.data import DataError, load_voc, register_folder


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
    text = f"boxes that reach beyond their image, cut: 2 (the first in {root}/JPEGImages/1.png)"
    assert f"{root}, split 'train': {text}\n" in caplog.text


def test_boxes_without_area_are_dropped_and_counted(folder, caplog):
    # Inverted, empty (VOC's corners are inclusive, so xmax = xmin - 1), and outside altogether.
    root = folder([(30, 5, 10, 9), (5, 5, 4, 9)], [(5000, 3, 5010, 9), (1, 1, 1, 1)])
    assert boxes(load_voc(root, "train", ["cell"])) == [[], [[0, 0, 1, 1]]]
    assert "boxes without area inside their image, dropped: 3 (the first in" in caplog.text
    assert "0.png" in caplog.text


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_corner_that_is_not_finite_drops_its_box_alone(folder, caplog, value):
    root = folder([(1, 1, 10, value), (2, 2, 9, 9), (1, value, 9, 8)])
    assert boxes(load_voc(root, "train", ["cell"])) == [[[1, 1, 9, 9]]]
    assert "boxes with a NaN or infinite coordinate, dropped: 2 (the first in" in caplog.text


def test_all_that_was_mended_is_said_in_one_warning(folder, caplog):
    load_voc(folder([(1, 1, 99, 9), (5, 5, 4, 9), (1, 1, 9, "nan")]), "train", ["cell"])
    assert len(caplog.records) == 1
    assert caplog.text.count(": 1 (the first in") == 3


def test_sound_boxes_pass_without_a_word(folder, caplog):
    # The second box counts from 0, as some tools do.
    load_voc(folder([(1, 1, 40, 30), (0, 0, 39, 29)], []), "train", ["cell"])
    assert caplog.text == ""


@pytest.mark.parametrize("value", ["", "12px"])
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


@pytest.mark.parametrize(
    ("kept", "wanted"),
    [
        ((), "JPEGImages/0.png"),  # the folder is gone
        (("Images/other.txt",), "Images/0.png"),  # there, and empty
        (("Annotations/1.png",), "Annotations/0.png"),  # where others lie
        (("1.png", "JPEGImages/notes.txt"), "0.png"),
    ],
)
def test_missing_images_are_wanted_where_images_lie(folder, kept, wanted):
    root = folder([], [])
    shutil.rmtree(root / "JPEGImages")
    for name in kept:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    with pytest.raises(FileNotFoundError) as caught:
        load_voc(root, "train", ["cell"])
    assert f"the first is {root / wanted};" in str(caught.value)


def replace_in(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "name",
    [
        "../0.png",
        "/etc/0.png",
        "sub/../../0.png",
        "C:\\0.png",
        "C:0.png",
        "\\0.png",
        "\\\\host\\0.png",
        "..\\0.png",
    ],
)
def test_a_filename_that_leads_out_of_the_folder_is_refused(folder, name):
    root = folder([])
    replace_in(root / "Annotations/0.xml", "0.png", name)
    with pytest.raises(DataError, match=r"0\.xml: <filename> is .* wanted a path inside") as caught:
        load_voc(root, "train", ["cell"])
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["../0", "/etc/0", "a/../../0"])
def test_an_id_that_leads_out_of_the_folder_is_refused(folder, name):
    root = folder([])
    (root / "ImageSets/Main/train.txt").write_text(name)
    with pytest.raises(DataError, match=r"train\.txt: an id is .* wanted a path inside") as caught:
        load_voc(root, "train", ["cell"])
    assert repr(name) in str(caught.value)


def test_an_id_that_comes_twice_is_named(folder):
    root = folder([], [])
    (root / "ImageSets/Main/train.txt").write_text("0\n1\n1\n")
    with pytest.raises(DataError, match=r"ids in .*train\.txt: 1 come more than once, first '1'"):
        load_voc(root, "train", ["cell"])


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_split_is_named(folder, text):
    root = folder([])
    (root / "ImageSets/Main/train.txt").write_text(text)
    with pytest.raises(DataError, match=r"split 'train' is empty: .*train\.txt names no image"):
        load_voc(root, "train", ["cell"])


@pytest.mark.parametrize("value", ["0", "nan", "inf", "-40"])
def test_an_image_size_that_cannot_be_is_named(folder, value):
    root = folder([])
    replace_in(root / "Annotations/0.xml", "<width>40<", f"<width>{value}<")
    with pytest.raises(DataError, match=rf"0\.xml: <size/width> is '{value}', wanted the image's"):
        load_voc(root, "train", ["cell"])


@pytest.mark.parametrize(
    ("place", "filename"),
    [
        ("JPEGImages/0.BMP", "0.png"),  # another suffix than said
        ("JPEGImages/0.webp", ""),
        ("JPEGImages/photo.tif", "photo.tif"),  # another name than the annotation's
        ("images/0.jpg", "0.jpg"),
        ("Annotations/0.png", "0.png"),
        ("0.png", "0.png"),
    ],
)
def test_images_are_found_wherever_and_whatever_they_are(folder, place, filename):
    root = folder([])
    replace_in(root / "Annotations/0.xml", "0.png", filename)
    (root / "JPEGImages/0.png").unlink()
    (root / place).parent.mkdir(exist_ok=True)
    Image.new("RGB", (40, 30)).save(root / place)
    assert load_voc(root, "train", ["cell"])[0]["file_name"] == str(root / place)


def test_an_older_filename_does_not_fetch_another_image(folder):
    root = folder([], [])
    (root / "JPEGImages/0.png").rename(root / "JPEGImages/0.webp")
    replace_in(root / "Annotations/0.xml", "0.png", "1.png")
    records = load_voc(root, "train", ["cell"])
    assert [record["file_name"][-6:] for record in records] == ["0.webp", "/1.png"]


def test_the_annotations_own_name_is_no_image(folder):
    root = folder([])
    replace_in(root / "Annotations/0.xml", "0.png", "0.xml")
    assert load_voc(root, "train", ["cell"])[0]["file_name"] == str(root / "JPEGImages/0.png")


def test_boxes_of_parts_are_not_the_objects(folder):
    root = folder([(3, 4, 30, 20.5)])
    part = "<part><name>head</name><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>9</xmax><ymax>9</ymax>"
    replace_in(root / "Annotations/0.xml", "<object>", f"<object>{part}</bndbox></part>")
    assert boxes(load_voc(root, "train", ["cell"])) == [[[2, 3, 30, 20.5]]]


@pytest.mark.parametrize("name", ["", "<name> </name>"])
def test_an_object_without_a_class_is_named(folder, name):
    root = folder([(1, 1, 5, 5)])
    replace_in(root / "Annotations/0.xml", "<name>cell</name>", name)
    message = r"0\.xml: an <object> has no <name>; write the class there"
    with pytest.raises(DataError, match=message):
        load_voc(root, "train", ["cell"])
    with pytest.raises(DataError, match=message):
        register_folder(root)


def test_an_unknown_encoding_is_named(folder):
    root = folder([])
    replace_in(
        root / "Annotations/0.xml", "<annotation>", '<?xml version="1.0" encoding="x"?><annotation>'
    )
    with pytest.raises(DataError, match=r"cannot read annotation .*0\.xml: unknown encoding: x"):
        load_voc(root, "train", ["cell"])


def test_names_of_images_may_hold_blanks_and_dots(folder):
    root = folder([(1, 1, 5, 5)])
    for old, new in (("Annotations/0.xml", "a b.c.xml"), ("JPEGImages/0.png", "a b.c.png")):
        (root / old).rename((root / old).with_name(new))
    (root / "ImageSets/Main/train.txt").write_text("a b.c\n")
    (record,) = load_voc(root, "train", ["cell"])
    assert record["file_name"] == str(root / "JPEGImages/a b.c.png")
