# SPDX-License-Identifier: Apache-2.0
"""Images as an exported model sees them: read by OpenCV, resized as Pillow resizes.

A model was trained on images that Pillow resized, so its arithmetic is repeated here.
"""

from pathlib import Path

import cv2
import numpy as np

__all__ = ["ImageFileError", "output_size", "read_image", "resized", "stretched"]

_JPEG = b"\xff\xd8\xff"
_BITS = 22  # of the fraction in Pillow's fixed-point weights of 8-bit images
_LONGEST = 64  # times the short side; a resizer would round the short side of longer ones to 0


class ImageFileError(ValueError):
    """An image that cannot be used; the message names it, and why."""


def read_image(path: str | Path) -> np.ndarray:
    """Read an image file as it is displayed, transparency on white.

    The rotation in EXIF is applied to JPEG files only, and decoders differ: grey values of a JPEG
    file can be other ones by a few steps than Pillow's.

    Returns:
        (H, W, 3) uint8, red first.

    Raises:
        ImageFileError: the file is missing, empty, damaged or of an unknown format or type.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ImageFileError(f"{path} cannot be read: {error.strerror or error}") from error
    mode = cv2.IMREAD_COLOR if content.startswith(_JPEG) else cv2.IMREAD_UNCHANGED
    try:
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), mode) if content else None
    except cv2.error as error:
        raise ImageFileError(f"{path} cannot be decoded: {error}") from error
    if pixels is None:
        raise ImageFileError(
            f"{path} ({len(content)} bytes) is no image that OpenCV can decode; wanted is a whole "
            "JPEG, PNG, BMP, WebP or TIFF file"
        )
    return _as_rgb(np.asarray(pixels), path)


def _as_rgb(pixels: np.ndarray, path: Path) -> np.ndarray:
    """OpenCV's (H, W) or (H, W, 1, 3 or 4) pixels -> (H, W, 3) uint8, red first."""
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise ImageFileError(
            f"{path} holds numbers of {pixels.dtype}; wanted are 8 or 16 bits: convert it"
        )
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if pixels.shape[2] not in (1, 3, 4):
        raise ImageFileError(
            f"{path} has {pixels.shape[2]} channels; wanted are 1, 3 or 4: convert it"
        )
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    color = pixels[..., 2::-1]
    if pixels.shape[2] == 4:
        opacity = pixels[..., 3:].astype(np.uint16)
        # Rounded division by 255; the largest number is 255 * 255 + 127, which fits.
        color = ((color * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)
    return np.ascontiguousarray(color)


def stretched(image: np.ndarray) -> np.ndarray:
    """The image, its short side repeated if a resizer would leave nothing of it."""
    height, width = image.shape[:2]
    least = -(-max(height, width) // _LONGEST)
    for axis, side in enumerate((height, width)):
        if side < least:
            image = np.repeat(image, -(-least // side), axis=axis)
    return image


def output_size(height: int, width: int, *, short_edge: int, max_size: int) -> tuple[int, int]:
    """(H, W) after resizing the short side to ``short_edge``, the long one to ``max_size`` at most.

    As Detectron2's ``ResizeShortestEdge`` rounds.
    """
    scale = short_edge / min(height, width)
    short = float(short_edge)
    new = [short, scale * width] if height < width else [scale * height, short]
    if max(new) > max_size:
        shrink = max_size / max(new)
        new = [side * shrink for side in new]
    return int(new[0] + 0.5), int(new[1] + 0.5)


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pillow's bilinear resizing of 8-bit images: where an image shrinks, all of it is averaged.

    To the bit where both sides are scaled alike. Where one is scaled much more than the other, or
    an image is much higher than wide, newer versions of Pillow begin with the columns, and a value
    can differ by 1.

    Args:
        image: (H, W, C) uint8.
        size: (H', W').

    Returns:
        (H', W', C) uint8.
    """
    for axis in (1, 0):  # rows first, and between the two everything is rounded
        if image.shape[axis] != size[axis]:
            image = _resized_along(image, size[axis], axis)
    return image


def _resized_along(image: np.ndarray, length: int, axis: int) -> np.ndarray:
    first, weights = _taps(image.shape[axis], length)
    values = image.astype(np.int32)
    shape = [1, 1, 1]
    shape[axis] = length
    total = np.full((), 1 << (_BITS - 1), np.int32)
    for tap in range(weights.shape[1]):
        index = np.minimum(first + tap, image.shape[axis] - 1)  # beyond it the weight is 0
        total = total + np.take(values, index, axis=axis) * weights[:, tap].reshape(shape)
    return np.clip(total >> _BITS, 0, 255).astype(np.uint8)


def _taps(before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
    """First pixel read by each of ``after`` pixels, and fixed-point weights (after, taps)."""
    scale = before / after
    reach = max(scale, 1.0)  # of the triangle to each side, in pixels
    center = (np.arange(after) + 0.5) * scale
    first = np.maximum((center - reach + 0.5).astype(np.int64), 0)
    last = np.minimum((center + reach + 0.5).astype(np.int64), before)
    place = first[:, None] + np.arange(int((last - first).max()))
    distance = np.abs((place - center[:, None] + 0.5) * (1.0 / reach))
    weights = np.where(place < last[:, None], np.maximum(1.0 - distance, 0.0), 0.0)
    # Summed up one by one, as Pillow does: another order could round another way.
    sums = np.add.accumulate(weights, axis=1)[:, -1:]
    return first, (0.5 + weights / sums * (1 << _BITS)).astype(np.int32)
