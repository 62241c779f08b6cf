# SPDX-License-Identifier: Apache-2.0
"""Images of every kind come out as they are displayed; what is no image is named."""

import io
import struct
import warnings

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image

from d2_decouple.data.image_checks import read_facts
from d2_decouple.data.images import ImageError, as_rgb, read_rgb

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
RAMP = np.linspace(0, 65535, 6 * 5).round().astype(np.uint16).reshape(6, 5)
RAMP_8 = np.rint(RAMP / 257).astype(np.uint8)


def colored(mode="RGB"):
    """5 wide, 6 high: the left two columns red, the others blue; one pixel white."""
    image = Image.new("RGB", (5, 6), BLUE)
    image.paste(RED, (0, 0, 2, 6))
    image.putpixel((4, 5), WHITE)
    return image.convert(mode)


def saved(tmp_path, image, name="image.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def check_colored(rgb):
    assert rgb.shape == (6, 5, 3)
    assert rgb.dtype == np.uint8
    assert tuple(rgb[0, 0]) == RED
    assert tuple(rgb[0, 4]) == BLUE
    assert tuple(rgb[5, 4]) == WHITE
    assert rgb.flags["C_CONTIGUOUS"]
    assert rgb.flags["WRITEABLE"]


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("RGB", "a.png"),
        ("RGB", "a.bmp"),
        ("RGB", "a.webp"),
        ("RGBA", "a.png"),
        ("P", "a.png"),
        ("P", "a.gif"),
        ("CMYK", "a.tif"),
    ],
)
def test_colours_keep_their_order_whatever_the_mode(tmp_path, mode, name):
    options = {"lossless": True} if name.endswith("webp") else {}
    check_colored(read_rgb(saved(tmp_path, colored(mode), name, **options)))


def test_cmyk_jpegs_are_not_inverted(tmp_path):
    rgb = read_rgb(saved(tmp_path, Image.new("RGB", (16, 16), RED).convert("CMYK"), "a.jpg"))
    assert rgb[8, 8, 0] > 240
    assert rgb[8, 8, 1:].max() < 15


def test_grey_and_one_bit_have_three_equal_channels(tmp_path):
    grey = read_rgb(saved(tmp_path, Image.fromarray(RAMP_8)))
    assert np.array_equal(grey, np.repeat(RAMP_8[..., None], 3, axis=2))
    bits = read_rgb(saved(tmp_path, Image.fromarray(RAMP_8 > 99).convert("1")))
    assert np.array_equal(bits[..., 0], (RAMP_8 > 99) * np.uint8(255))


def test_transparent_pixels_show_white_whatever_colour_hides_in_them(tmp_path):
    image = Image.new("RGBA", (2, 1), (*RED, 0))
    image.putpixel((1, 0), (0, 0, 0, 51))  # black, a fifth of it
    assert read_rgb(saved(tmp_path, image))[0].tolist() == [[255] * 3, [204] * 3]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert read_rgb(saved(tmp_path, grey)).tolist() == [[[255] * 3]]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([0, 0, 0])
    assert read_rgb(saved(tmp_path, palette, transparency=0)).tolist() == [[[255] * 3]]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path, suffix):
    grey = tmp_path / f"grey{suffix}"
    cv2.imwrite(str(grey), RAMP)
    assert np.array_equal(read_rgb(grey)[..., 1], RAMP_8)
    color = tmp_path / f"color{suffix}"
    cv2.imwrite(str(color), np.stack([RAMP, RAMP // 2, RAMP // 4], axis=-1))  # blue first
    rgb = read_rgb(color)
    assert np.array_equal(rgb[..., 2], RAMP_8)
    assert np.array_equal(rgb[..., 0], np.rint(RAMP // 4 / 257).astype(np.uint8))


def test_sixteen_bit_colours_keep_their_opacity(tmp_path):
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), np.array([[[0, 0, 65535, 0], [0, 0, 65535, 65535]]], np.uint16))
    assert read_rgb(path)[0].tolist() == [list(WHITE), list(RED)]


def plain_tiff(pixels, orientation, order):
    """A TIFF of one strip without compression: grey or colours, 8 or 16 bits."""
    height, width, *rest = pixels.shape
    samples, bits = (rest or [1])[0], 8 * pixels.itemsize
    body = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1 if samples == 1 else 2}
    tags |= {274: orientation, 277: samples, 278: height}
    start = 8 + 2 + 12 * (len(tags) + 2) + 4
    strip = start + 2 * samples
    entries = sorted({**tags, 273: strip, 279: len(body)}.items())
    content = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    content += struct.pack(order + "H", len(entries))
    for tag, value in entries:
        if tag == 258 and samples > 1:
            content += struct.pack(order + "HHII", tag, 3, samples, start)
        elif tag in (273, 279):
            content += struct.pack(order + "HHII", tag, 4, 1, value)
        else:
            content += struct.pack(order + "HHIHH", tag, 3, 1, value, 0)
    return content + bytes(4) + struct.pack(f"{order}{samples}H", *[bits] * samples) + body


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_rotation_of_exif_is_applied(tmp_path, orientation):
    """What a viewer shows: the raster as it lies turned back by the orientation."""
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255  # bright in the upper left corner, wider than high
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for name in ("a.png", "a.jpg", "a.tif"):
        image = Image.fromarray(np.ascontiguousarray(stored))
        path = saved(tmp_path, image, name, exif=exif)
        rgb = read_rgb(path)
        assert rgb.shape == upright.shape
        assert np.abs(rgb.astype(int) - upright).max() < 30
        for decode in (False, True):
            (facts,) = read_facts([str(path)], decode=decode)
            assert (facts.shown, facts.orientation) == ((24, 16), orientation)
    # Of TIFF some decoders turn some kinds themselves.
    for order in "<>":
        for pixels in (stored[..., 0], stored.astype(np.uint16) * 257):
            path = tmp_path / "b.tif"
            path.write_bytes(plain_tiff(pixels, orientation, order))
            rgb = read_rgb(path)
            assert rgb.shape == upright.shape
            assert np.abs(rgb.astype(int) - upright).max() == 0


def test_exif_of_a_png_may_stand_behind_the_pixels(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = saved(tmp_path, colored(), exif=exif)
    content, chunks, place = path.read_bytes(), [], 8
    while place < len(content):
        end = place + 12 + struct.unpack_from(">I", content, place)[0]
        chunks.append(content[place:end])
        place = end
    path.write_bytes(content[:8] + b"".join(sorted(chunks, key=exif_last)))
    assert read_rgb(path).shape == (5, 6, 3)
    (facts,) = read_facts([str(path)], decode=True)
    assert (facts.orientation, facts.shown) == (6, (6, 5))


def exif_last(chunk):
    return [b"IHDR", b"IDAT", b"eXIf", b"IEND"].index(chunk[4:8])


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    path = saved(
        tmp_path, colored(), "a.gif", save_all=True, append_images=[Image.new("RGB", (5, 6))]
    )
    check_colored(read_rgb(path))


def test_one_pixel_and_twenty_megapixels(tmp_path):
    assert read_rgb(saved(tmp_path, Image.new("RGB", (1, 1), GREEN))).tolist() == [[[0, 255, 0]]]
    large = read_rgb(saved(tmp_path, Image.new("L", (5000, 4000), 7), "large.png"))
    assert large.shape == (4000, 5000, 3)
    assert large[-1, -1].tolist() == [7, 7, 7]


def test_too_many_pixels_are_refused_and_half_of_that_causes_no_warning(tmp_path, monkeypatch):
    path = saved(tmp_path, colored())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # warns above 20, refuses above 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_colored(read_rgb(path))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ImageError, match=r"image\.png declares more pixels.*30 pixels") as raised:
        read_rgb(path)
    assert "PIL.Image.MAX_IMAGE_PIXELS" in str(raised.value)


def test_missing_empty_and_foreign_files_are_named_with_the_reason(tmp_path):
    with pytest.raises(ImageError, match=r"none\.jpg cannot be read: No such file"):
        read_rgb(tmp_path / "none.jpg")
    with pytest.raises(ImageError, match=r"cannot be read: Is a directory"):
        read_rgb(tmp_path)
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ImageError, match=r"empty\.jpg is empty"):
        read_rgb(str(tmp_path / "empty.jpg"))
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ImageError, match=r"text\.jpg is no image of a known format"):
        read_rgb(tmp_path / "text.jpg")
    (tmp_path / "false.tif").write_bytes(b"II*\0" + b"\1" * 40)
    with pytest.raises(ImageError, match=r"false\.tif"):
        read_rgb(tmp_path / "false.tif")


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "tiff", "bmp", "webp", "ppm"])
def test_a_file_that_is_cut_off_or_damaged_is_named_wherever_that_is(tmp_path, kind):
    """Never another exception, which would stop a run over a folder."""
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    noise = Image.fromarray(rng.integers(256, size=(40, 30, 3), dtype=np.uint8))
    noise.save(buffer, kind)
    content = np.frombuffer(buffer.getvalue(), np.uint8)
    path = tmp_path / f"bad.{kind}"
    refused = []
    for trial in range(60):
        bad = content.copy()
        if trial < 20:
            bad = bad[: trial * len(bad) // 20]
        else:
            places = rng.integers(min(len(bad), 400), size=8)
            bad[places] = rng.integers(256, size=8)
        path.write_bytes(bad.tobytes())
        try:
            assert read_rgb(path).shape[2] == 3  # some damage no decoder can see
        except ImageError as error:
            refused.append(str(error))
    assert len(refused) >= 15
    assert all(str(path) in message for message in refused)


def test_arrays_of_all_shapes_and_types():
    color = np.array(colored())
    check_colored(as_rgb(color, channels="RGB"))
    check_colored(as_rgb(color[..., ::-1], channels="BGR"))
    check_colored(as_rgb(color / 255, channels="RGB"))
    check_colored(as_rgb((color / 255).astype(np.float16), channels="RGB"))
    check_colored(as_rgb(color.astype(np.uint16) * 257, channels="RGB"))
    check_colored(as_rgb(color > 0, channels="RGB"))
    opaque = np.dstack((color[..., ::-1], np.full((6, 5), 255, np.uint8)))
    check_colored(as_rgb(opaque, channels="BGR"))
    opaque[..., 3] = 0
    assert as_rgb(opaque, channels="BGR").min() == 255
    for grey in (RAMP_8, RAMP_8[..., None], RAMP, RAMP.astype(">u2"), RAMP / 65535):
        assert np.array_equal(as_rgb(grey, channels="BGR")[..., 0], RAMP_8)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 6, 5), np.uint8), r"\(3, 6, 5\) of uint8; .*transpose\(1, 2, 0\)"),
        (np.zeros((6, 5, 2), np.uint8), r"\(6, 5, 2\) of uint8"),
        (np.zeros((2, 6, 5, 3), np.uint8), r"\(2, 6, 5, 3\)"),
        (np.zeros((0, 5, 3), np.uint8), "without pixels"),
        (np.zeros((6, 5, 3), np.int64), r"int64.*astype\(np\.uint8\)"),
        (np.full((6, 5, 3), 200.0), r"in \[0, 1\].*from 200 to 200; divide by 255"),
        (np.full((6, 5), np.nan), "from nan to nan"),
        ([[1, 2]], "numpy array, got list"),
    ],
)
def test_what_is_no_image_is_described(array, message):
    with pytest.raises(ImageError, match=message):
        as_rgb(array, channels="RGB")


def test_the_order_of_channels_is_no_guess():
    with pytest.raises(ImageError, match="'BGR' or 'RGB', got 'GBR'"):
        as_rgb(RAMP_8, channels="GBR")
    with pytest.raises(TypeError):
        as_rgb(RAMP_8)
