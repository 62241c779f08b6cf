# SPDX-License-Identifier: Apache-2.0
"""Images for an exported model: read as they are displayed, resized as Pillow and Detectron2 do."""

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from detectron2.data import transforms as T
from PIL import Image

from d2_decouple.engine import resizing
from d2_decouple.runtime.images import (
    ImageFileError,
    _as_rgb,
    output_size,
    read_image,
    resized,
    stretched,
)
from d2_decouple.runtime.model import DESCRIPTION, ExportedModelError, _description


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def test_two_pixels_become_four_and_one():
    row = np.array([0, 100], np.uint8)[None, :, None]
    # The middles of the four lie at 0.25, 0.75, 1.25, 1.75, those of the two at 0.5 and 1.5. The
    # outer ones reach one of the two alone; 0.75 is 0.25 and 0.75 away from them: 0.25 * 100.
    assert resized(row, (1, 4))[0, :, 0].tolist() == [0, 25, 75, 100]
    assert resized(row, (1, 1))[0, :, 0].tolist() == [50]
    assert resized(row.transpose(1, 0, 2), (4, 1))[:, 0, 0].tolist() == [0, 25, 75, 100]


def test_a_shrunk_image_is_an_average_of_all_its_pixels():
    # Six pixels become three; the middle one is centred at 3 and reaches two pixels to each side:
    # 1 to 4 are 1.5, 0.5, 0.5, 1.5 away, which leaves 0.25, 0.75, 0.75, 0.25 of 2 in all.
    row = np.array([0, 80, 0, 0, 0, 0], np.uint8)[None, :, None]
    assert resized(row, (1, 3))[0, 1, 0] == 10


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((48, 64), (24, 32)),
        ((48, 64), (80, 107)),
        ((37, 53), (80, 115)),
        ((61, 45), (33, 24)),
        ((50, 50), (50, 50)),
        ((1, 1), (7, 7)),
        ((100, 130), (3, 4)),
    ],
)
def test_resizing_is_pillows_to_the_bit(before, after):
    image = noise(*before)
    wanted = Image.fromarray(image).resize(after[::-1], Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resized(image, after), np.asarray(wanted))


def test_the_size_is_detectron2s():
    draw = np.random.default_rng(0)
    for height, width, short, longest in draw.integers(1, 1500, (300, 4)).tolist():
        wanted = T.ResizeShortestEdge.get_output_shape(height, width, short, longest)
        assert output_size(height, width, short_edge=short, max_size=longest) == wanted


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        *(((1, 1), 1, 1), ((1, 64), 1, 1), ((640, 10), 1, 1), ((30, 40), 1, 1)),
        ((1, 65), 2, 1),  # 65 / 64, rounded up, is 2
        ((300, 2), 1, 3),  # 300 / 64, rounded up, is 5: three times 2 is the first that has it
    ],
)
def test_what_is_very_long_is_stretched_as_for_pytorch(size, rows, columns):
    image = noise(*size)
    np.testing.assert_array_equal(stretched(image), resizing.stretched(image))
    np.testing.assert_array_equal(stretched(image), np.kron(image, np.ones((rows, columns, 1))))


def test_files_are_read_as_they_are_displayed(tmp_path):
    image = noise(6, 5)
    Image.fromarray(image).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), image)
    Image.fromarray(image[..., 0]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), image[..., [0, 0, 0]])
    deep = image.astype(np.uint16) * 257 + 100  # rounds down to the same 8 bits
    cv2.imwrite(str(tmp_path / "deep.png"), deep[..., ::-1])
    np.testing.assert_array_equal(read_image(tmp_path / "deep.png"), image)


def test_what_is_transparent_is_white(tmp_path):
    pixels = np.array([[[200, 100, 0, 0], [200, 100, 0, 255], [200, 100, 0, 51]]], np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    # A fifth of 200, 100 and 0 and four fifths of 255.
    wanted = [[[255, 255, 255], [200, 100, 0], [244, 224, 204]]]
    assert read_image(tmp_path / "a.png").tolist() == wanted


def test_a_photo_is_turned_by_its_exif(tmp_path):
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, 16:] = 255  # the right half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right by a quarter: what is right comes down
    Image.fromarray(image).save(tmp_path / "a.jpg", exif=exif, quality=95)
    read = read_image(tmp_path / "a.jpg")
    assert read.shape == (32, 16, 3)
    assert read[:12].max() < 10
    assert read[20:].min() > 245


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    cv2.imwrite(str(tmp_path / "float.tiff"), np.zeros((4, 4), np.float32))
    for name, message in (
        ("none.png", "none.png cannot be read: No such file"),
        ("empty.png", r"empty.png \(0 bytes\) is no image that OpenCV can decode; wanted is a wh"),
        ("text.png", r"text.png \(8 bytes\) is no image"),
        ("float.tiff", "holds numbers of float32; wanted are 8 or 16 bits: convert it"),
    ):
        with pytest.raises(ImageFileError, match=message):
            read_image(tmp_path / name)


@pytest.mark.parametrize("channels", [2, 5])
def test_other_numbers_of_channels_are_named(channels):
    with pytest.raises(ImageFileError, match=rf"a\.tif has {channels} channels; wanted are 1, 3"):
        _as_rgb(np.zeros((4, 6, channels), np.uint8), Path("a.tif"))


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", '"x"'])
def test_a_damaged_description_is_named(text):
    about = SimpleNamespace(custom_metadata_map={DESCRIPTION: text})
    session = SimpleNamespace(get_modelmeta=lambda: about)
    with pytest.raises(ExportedModelError, match=r"a\.onnx has .* description .*export it again"):
        _description(session, "a.onnx")
