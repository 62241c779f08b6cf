# SPDX-License-Identifier: Apache-2.0
"""Image files and arrays of any kind -> (H, W, 3) uint8 in the order red, green, blue.

Transparent pixels are shown on white, as viewers and browsers print them. Values of 16 bits are
scaled to 8, never cut off.
"""

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any, Literal, TypeAlias

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from .foreign import IMAGE_MIB, read_limited
from .loader import DataError

__all__ = [
    "DECODING_ERRORS",
    "IMAGE_FORMATS",
    "ChannelOrder",
    "ImageError",
    "as_rgb",
    "read_pixels",
    "read_rgb",
]

ChannelOrder: TypeAlias = Literal["BGR", "RGB"]

DECODING_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    cv2.error,
)
"""What Pillow's and OpenCV's decoders raise for files that are damaged, cut off or made up."""

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow may take a file for, whatever its name says; a camera's MPO is a JPEG. Of some other
kinds Pillow starts a program: of PostScript, Ghostscript."""

_TIFF = (b"II*\0", b"MM\0*")
_WIDTH, _HEIGHT = 256, 257  # tags of TIFF
_TAG_TYPES = {1: "B", 3: "H", 4: "I"}  # of TIFF, those of whole numbers


class ImageError(ValueError):
    """An image that cannot be used; the message names the file or the array, and why."""


def read_rgb(path: str | Path) -> np.ndarray:
    """Read an image file as it is displayed.

    Grey, transparent, palette, 1-bit, 16-bit and CMYK images become RGB; the rotation in EXIF is
    applied; of an animation, or of a file of several pages, the first is read.

    Returns:
        (H, W, 3) uint8, red first.

    Raises:
        ImageError: the file is missing, empty, damaged, cut off, no image of ``IMAGE_FORMATS``, or
            so large, or declares so many pixels, that decoding it could exhaust the memory.
    """
    path = Path(path)
    try:
        content = read_limited(path, IMAGE_MIB)
    except DataError as error:
        raise ImageError(str(error)) from error
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror or error}") from error
    if not content:
        raise ImageError(f"{path} is empty (0 bytes); copy it again")
    try:
        with warnings.catch_warnings():
            # Of half the pixels that are refused below, and of strange metadata: what matters of
            # either becomes an error.
            warnings.filterwarnings("ignore", module="PIL")
            return _decode(content)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{path} declares more pixels than are decoded: {error} If you trust it, set "
            "PIL.Image.MAX_IMAGE_PIXELS to more than half of that number"
        ) from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(
            f"{path} is no image of a known format, or its start is damaged"
        ) from error
    except DECODING_ERRORS as error:
        raise ImageError(f"{path} cannot be decoded, it is damaged or cut off: {error}") from error


def read_pixels(path: str | Path, channels: ChannelOrder) -> np.ndarray:
    """:func:`read_rgb` in the order that a model wants: (H, W, 3) uint8."""
    image = read_rgb(path)
    return image if channels == "RGB" else np.ascontiguousarray(image[:, :, ::-1])


def as_rgb(array: np.ndarray, *, channels: ChannelOrder) -> np.ndarray:
    """An array that holds an image -> (H, W, 3) uint8, red first.

    Args:
        array: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), the fourth being opacity; uint8, uint16
            (scaled to 8 bits), bool, or floating point in [0, 1].
        channels: the order of the first three channels, "BGR" (OpenCV, Detectron2) or "RGB".

    Raises:
        ImageError: another shape, type or range of values, or no pixel.
    """
    if channels not in ("BGR", "RGB"):
        raise ImageError(f"channels must be 'BGR' or 'RGB', got {channels!r}")
    if not isinstance(array, np.ndarray):
        raise ImageError(f"wanted an image as a numpy array, got {type(array).__name__}")
    kind = f"{array.shape} of {array.dtype}"
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        hint = ""
        if array.ndim == 3 and array.shape[0] in (1, 3, 4):
            hint = "; if the channels come first, pass array.transpose(1, 2, 0)"
        raise ImageError(
            f"wanted an image (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {kind}{hint}"
        )
    if not array.size:
        raise ImageError(f"an image without pixels: {kind}")
    pixels = _as_uint8(array, kind).reshape(*array.shape[:2], -1)
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    color = pixels[..., :3] if channels == "RGB" else pixels[..., 2::-1]
    if pixels.shape[2] == 4:
        opacity = pixels[..., 3:].astype(np.uint16)
        # Rounded division by 255; the largest number is 255 * 255 + 127, which fits.
        color = ((color * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(color)


def _as_uint8(array: np.ndarray, kind: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # of either byte order
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if not np.issubdtype(array.dtype, np.floating):
        raise ImageError(
            f"wanted uint8, uint16, bool or floating-point numbers in [0, 1], got {kind}; convert "
            "it with array.astype(np.uint8) if its values are 0 to 255"
        )
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise ImageError(
            f"floating-point images must be in [0, 1], got {kind} from {low:g} to {high:g}; "
            "divide by 255, or convert it with array.astype(np.uint8)"
        )
    return np.rint(array * 255.0).astype(np.uint8)


def _decode(content: bytes) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
    except Image.UnidentifiedImageError:
        if not content.startswith(_TIFF):
            raise
        _refuse_many_pixels(content)
        return _decode_deep(content)  # Pillow knows no TIFF of 16-bit colours
    with image:
        deep = _is_deep_color(image)  # known only until Pillow decodes, as the next line can do
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if image.format == "TIFF" and orientation != 1:
            # Pillow and OpenCV turn some of these themselves, and of 16-bit ones not all.
            content = _without_orientation(content)
            with Image.open(io.BytesIO(content), formats=["TIFF"]) as stored:
                rgb = _decode_deep(content) if deep else _decode_shallow(stored)
        else:
            rgb = _decode_deep(content) if deep else _decode_shallow(image)
    if orientation == 1:
        return rgb
    turned = Image.fromarray(rgb)
    turned.getexif()[ExifTags.Base.Orientation] = orientation
    return np.array(ImageOps.exif_transpose(turned))


def _without_orientation(tiff: bytes) -> bytes:
    """The same file, whose first page says that its pixels lie as they are shown."""
    order, big = "<" if tiff.startswith(b"II") else ">", 43 in (tiff[2], tiff[3])
    offset, count, entry = ("Q", "Q", 20) if big else ("I", "H", 12)
    (page,) = struct.unpack_from(order + offset, tiff, 8 if big else 4)
    (tags,) = struct.unpack_from(order + count, tiff, page)
    begin, changed = page + struct.calcsize(order + count), bytearray(tiff)
    for place in range(begin, begin + tags * entry, entry):
        tag, kind = struct.unpack_from(order + "HH", tiff, place)
        if tag == ExifTags.Base.Orientation and kind in _TAG_TYPES:
            struct.pack_into(order + _TAG_TYPES[kind], changed, place + entry // 5 * 4, 1)
    return bytes(changed)


def _refuse_many_pixels(content: bytes) -> None:
    """Pillow's limit for a TIFF that Pillow does not know; OpenCV's own is six times as high."""
    stream = io.BytesIO(content)
    tags = ImageFileDirectory_v2(stream.read(8))
    stream.seek(tags.next)
    tags.load(stream)
    pixels = int(tags.get(_WIDTH, 0)) * int(tags.get(_HEIGHT, 0))
    limit = 2 * (Image.MAX_IMAGE_PIXELS or pixels)
    if pixels > limit:
        raise Image.DecompressionBombError(
            f"Image size ({pixels} pixels) exceeds limit of {limit} pixels."
        )


def _is_deep_color(image: Image.Image) -> bool:
    """Whether the file has 16-bit colours, of which Pillow would drop the lower half."""
    tiles = getattr(image, "tile", [])  # only images from files have them
    return any(";16" in str(tile[3]) for tile in tiles) and image.mode in ("RGB", "RGBA", "LA")


def _decode_shallow(image: Image.Image) -> np.ndarray:
    if image.mode.startswith(("I", "F")):
        return as_rgb(_deep_grey(np.asarray(image)), channels="RGB")
    if "A" in image.mode.upper() or "transparency" in image.info:
        return as_rgb(np.asarray(image.convert("RGBA")), channels="RGB")
    return np.array(image.convert("RGB"))


def _deep_grey(values: np.ndarray) -> np.ndarray:
    """Pillow's 16-bit and 32-bit grey images, whose types it chooses wider than the file's."""
    if values.dtype.kind == "f":
        return values
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(f"grey values from {low} to {high}; 0 to 65535 (16 bits) are understood")
    return values.astype(np.uint16)


def _decode_deep(content: bytes) -> np.ndarray:
    # Unchanged: 16 bits stay 16 bits, and opacity stays.
    array: Any = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None:
        raise ImageError("neither Pillow nor OpenCV can decode it")
    return as_rgb(array, channels="BGR")
