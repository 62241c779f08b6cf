# SPDX-License-Identifier: Apache-2.0
"""One image's labels in YOLO's format: lines of a class's number and a box, or a polygon."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode

from .foreign import ANNOTATION_MIB, read_limited, read_lines
from .loader import DataError

__all__ = ["label_file", "looks_labelled", "read_labels"]

_BEYOND = 0.01  # how far a number may lie outside of 0 to 1: rounding, and objects cut by the edge
_DIGITS = 2  # of a pixel
_WANTED = "wanted five numbers: class, middle x, middle y, width, height (shares from 0 to 1)"


def label_file(root: Path, image: Path) -> Path:
    """Where an image's labels lie: in ``labels`` in the place of the last ``images``, or beside."""
    parts = list(image.relative_to(root).parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return (root / Path(*parts)).with_suffix(".txt")


def looks_labelled(file: Path) -> bool | None:
    """Whether a text file's first line ends in four numbers or more; None for an empty file."""
    lines = read_lines(file)
    words = next((line.split() for line in lines if line.strip()), None)
    if words is None:
        return None
    try:
        return len(words) > 4 and all(math.isfinite(float(word)) for word in words[1:])
    except ValueError:
        return False


def read_labels(
    file: Path, classes: Sequence[str], width: int, height: int
) -> list[dict[str, Any]]:
    """The objects of an image as Detectron2's annotations; none if there is no such file.

    Boxes are absolute xyxy pixels as annotated, so they may reach beyond the image. A polygon (a
    class and three points or more) becomes its box. Coordinates are rounded to hundredths of a
    pixel: labels that were made of whole pixels, and written with six decimals, are whole again.

    Args:
        file: the label file.
        classes: names in the order of their numbers.
        width: of the image in pixels.
        height: likewise.

    Raises:
        DataError: a line that is none of this; file and line are named.
    """
    if not file.is_file():
        return []
    try:
        lines = read_limited(file, ANNOTATION_MIB).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is no text ({error}); {_WANTED} a line") from error
    return [
        _object(line.split(), classes, (width, height), f"{file}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _object(
    words: Sequence[str], classes: Sequence[str], size: tuple[int, int], where: str
) -> dict[str, Any]:
    try:
        numbers = [float(word) for word in words]
    except ValueError as error:
        raise DataError(f"{where} is {' '.join(words)[:80]!r}; {_WANTED}") from error
    count = len(numbers)
    if count != 5 and (count < 7 or count % 2 == 0):
        hint = "; is the sixth a score? take it out" if count == 6 else ""
        raise DataError(f"{where} has {count} numbers; {_WANTED}, or a polygon's points{hint}")
    wrong = [x for x in numbers[1:] if not -_BEYOND <= x <= 1 + _BEYOND]  # NaN is in no range
    if wrong:
        hint = "; pixels are divided by the image's width and height" if wrong[0] > 2 else ""
        raise DataError(f"{where} has {wrong[0]:g}, wanted shares of the image from 0 to 1{hint}")
    corners = _corners(numbers[1:])
    return {
        "bbox": [round(x * side, _DIGITS) for x, side in zip(corners, size * 2, strict=True)],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": _class_id(numbers[0], classes, where),
        "iscrowd": 0,
    }


def _corners(numbers: Sequence[float]) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2 of a box (middle, width, height), or around the points of a polygon."""
    if len(numbers) > 4:
        return min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])
    x, y, width, height = numbers
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _class_id(number: float, classes: Sequence[str], where: str) -> int:
    if number in range(len(classes)):
        return int(number)
    hint = "; do the labels count from 1? they must count from 0" if number == len(classes) else ""
    known = ", ".join(f"{index} {name}" for index, name in enumerate(classes[:10]))
    more = ", ..." if classes[10:] else ""
    raise DataError(f"{where} has class {number:g}; known are {known}{more}{hint}")
