# SPDX-License-Identifier: Apache-2.0
"""What pages of pictures are put together from: titles, a legend, rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image, ImageDraw

from .canvas import GREY, INK, PAPER, Canvas, Color
from .detections import text_font

if TYPE_CHECKING:
    from detectron2.structures import Instances

__all__ = [
    "GAP",
    "ICON_WIDTH",
    "Icon",
    "blank",
    "check_image",
    "framed",
    "legend",
    "shown_classes",
    "shown_of",
    "stacked",
    "title_strip",
]

Icon: TypeAlias = Callable[[Canvas, float], None]  # drawn at a height of the legend

GAP = 18  # pixels between the parts of a page
ICON_WIDTH = 72
_ROW = 44


def check_image(image: np.ndarray, instances: Instances, limit: int) -> None:
    """Raise ValueError unless detections are for this image and ``limit`` is a number of them."""
    if limit < 1:
        raise ValueError(f"limit is {limit}; wanted is a whole number from 1")
    if tuple(instances.image_size) != image.shape[:2]:
        raise ValueError(
            f"the detections are for an image of height and width {tuple(instances.image_size)}, "
            f"the image has {image.shape[:2]}; give the image that they were made from"
        )


def shown_classes(instances: Instances, class_names: Sequence[str], limit: int) -> list[str]:
    """The class of each of the first ``limit`` detections; one without a name is a number."""
    return [
        class_names[label] if label < len(class_names) else f"class {label}"
        for label in instances.pred_classes[:limit].tolist()
    ]


def shown_of(total: int, shown: int) -> str:
    """How many detections there are, and how many of them a page shows."""
    text = f"{total} detection" + "s" * (total != 1)
    if 1 < shown < total:
        text += f", the strongest {shown} shown"
    elif shown < total:
        text += ", the strongest shown"
    return text


def title_strip(
    text: str,
    width: int,
    *,
    tail: str = "",
    note: str = "",
    badge: str = "",
    color: Color = INK,
) -> np.ndarray:
    """A strip with a badge in a disc, bold text, of which a long one is cut before its tail, and
    a grey note on the right.
    """
    bold, plain = text_font(19, bold=True), text_font(14)
    height = sum(bold.getmetrics()) + 14
    middle, left = height / 2, 2.0
    sheet = blank(width, height)
    if badge:
        sheet.dot((middle, middle), 14, color, seam=color)
        left = height + 4.0
    room = width - left - plain.getlength(note) - 12
    if bold.getlength(text + tail) > room:
        while text and bold.getlength(f"{text}…{tail}") > room:
            text = text[:-1]
        text += "…"
    picture = Image.fromarray(sheet.pixels())
    draw = ImageDraw.Draw(picture)
    draw.text((middle, middle), badge, fill=PAPER, font=text_font(15, bold=True), anchor="mm")
    draw.text((left, middle), text + tail, fill=INK, font=bold, anchor="lm")
    draw.text((width - 2, middle), note, fill=GREY, font=plain, anchor="rm")
    return np.asarray(picture)


def legend(rows: Sequence[tuple[Icon, str]], width: int) -> np.ndarray:
    """What marks mean, one below the other."""
    font = text_font(17)
    sheet = blank(width, _ROW * len(rows) + GAP)
    for number, (draw_icon, _) in enumerate(rows):
        draw_icon(sheet, (number + 0.5) * _ROW + GAP)
    picture = Image.fromarray(sheet.pixels())
    draw = ImageDraw.Draw(picture)
    for number, (_, text) in enumerate(rows):
        middle = (number + 0.5) * _ROW + GAP
        draw.text((ICON_WIDTH + 14, middle), text, fill=INK, font=font, anchor="lm")
    return np.asarray(picture)


def blank(width: int, height: int) -> Canvas:
    """White paper; a place on it is a pixel of the picture."""
    white = np.full((height, width, 3), 255, dtype=np.uint8)
    return Canvas(white, (0, 0, width, height), (width, height))


def stacked(parts: Sequence[np.ndarray], *, axis: int) -> np.ndarray:
    """Pictures below (axis 0) or beside (axis 1) each other, with gaps, filled up with white."""
    across = 1 - axis
    extent = max(part.shape[across] for part in parts)
    filled: list[np.ndarray] = []
    for number, part in enumerate(parts):
        missing = [(0, 0), (0, 0), (0, 0)]
        missing[across] = (0, extent - part.shape[across])
        missing[axis] = (GAP if number else 0, 0)
        filled.append(np.pad(part, missing, constant_values=255))
    return np.concatenate(filled, axis=axis)


def framed(picture: np.ndarray) -> np.ndarray:
    """A page with white margins; titles bring their own above them."""
    return np.pad(picture, ((0, GAP), (GAP, GAP), (0, 0)), constant_values=255)
