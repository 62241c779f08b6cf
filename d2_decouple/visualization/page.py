# SPDX-License-Identifier: Apache-2.0
"""What pages of pictures are put together from: titles, a legend, rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageDraw

from .canvas import BLACK, GREY, INK, PAPER, Canvas, Color, Rectangle
from .detections import draw_boxes, text_font

if TYPE_CHECKING:
    from detectron2.structures import Instances

__all__ = [
    "GAP",
    "ICON_WIDTH",
    "Bar",
    "Icon",
    "bar_icon",
    "bars",
    "blank",
    "check_image",
    "detection_title",
    "found_at",
    "framed",
    "legend",
    "page_of",
    "shown_classes",
    "shown_of",
    "stacked",
    "title_strip",
]

Icon: TypeAlias = Callable[[Canvas, float], None]  # drawn at a height of the legend

GAP = 18  # pixels between the parts of a page
ICON_WIDTH = 72
_TRACK: Color = (232, 233, 237)
_COLUMN = 640  # pixels: width of the whole image and of the legend
_ROW = 44
_BAR_ROW = 25  # pixels of a bar with its texts
_BAR = 9  # pixels: its height; its ends are round
_BAR_ICON = 42  # pixels before the texts of bars with an icon


class Bar(NamedTuple):
    """A number that is drawn as a bar, and written.

    Attributes:
        label: what it is.
        share: of the bar's whole length, from 0 to 1; None is written alone.
        number: as it is written.
        color: of the bar.
        icon: drawn before the label, or None.
    """

    label: str
    share: float | None
    number: str
    color: Color
    icon: Icon | None = None


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


def detection_title(
    name: str, instances: Instances, index: int, width: int, *, color: Color, note: str = ""
) -> np.ndarray:
    """The strip over a detection's panel: its rank, class and score, and a note."""
    return title_strip(
        name,
        width,
        tail=f" {float(instances.scores[index]):.2f}",
        badge=f"{index + 1}",
        color=color,
        note=note,
    )


def found_at(level_names: Sequence[str], strides: Sequence[int], level: int) -> str:
    """The note of a detection that a cell of this level found."""
    return f"found at {level_names[level]}, stride {strides[level]}"


def page_of(
    image: np.ndarray,
    instances: Instances,
    names: Sequence[str],
    boxes: Sequence[tuple[Rectangle, Color]],
    legend_rows: Sequence[tuple[Icon, str]],
    panels: Sequence[np.ndarray],
    *,
    columns: int,
) -> np.ndarray:
    """The whole image over a legend, and beside them the panels of its strongest detections.

    Args:
        image: (H, W, 3) RGB, uint8.
        instances: all of its detections.
        names: of the classes of those that have a panel.
        boxes: of these with their colours.
        legend_rows: what marks mean.
        panels: none makes a page of the image alone.
        columns: so many panels are beside each other.
    """
    drawn = draw_boxes(
        image,
        np.array([box for box, _ in boxes]),
        [f"{index + 1} {name}" for index, name in enumerate(names)],
        colors=[color for _, color in boxes],
        scale=_COLUMN / max(image.shape[:2]),
    )
    picture = np.full((drawn.shape[0], _COLUMN, 3), 255, dtype=np.uint8)
    picture[:, : drawn.shape[1]] = drawn
    text = shown_of(len(instances), len(panels))
    overview = np.concatenate((title_strip(text, _COLUMN), picture))
    if not panels:
        return framed(overview)
    column = stacked([overview, legend(legend_rows, _COLUMN)], axis=0)
    starts = range(0, len(panels), columns)
    rows = [stacked(panels[start : start + columns], axis=1) for start in starts]
    return framed(stacked([column, stacked(rows, axis=0)], axis=1))


def bars(rows: Sequence[Bar], width: int) -> np.ndarray:
    """A line for each number: its icon, its label, its bar and itself."""
    sheet = blank(width, _BAR_ROW * len(rows) + 10)
    middles = [8 + (row + 0.5) * _BAR_ROW for row in range(len(rows))]
    for bar, y in zip(rows, middles, strict=True):
        if bar.icon is not None:
            bar.icon(sheet, y)
        if bar.share is not None:
            _draw_bar(sheet, (130, width - 52), y, bar.share, bar.color)
    picture = Image.fromarray(sheet.pixels())
    draw, font, bold = ImageDraw.Draw(picture), text_font(15), text_font(15, bold=True)
    for bar, y in zip(rows, middles, strict=True):
        left = 2 if bar.icon is None else _BAR_ICON
        draw.text((left, y), bar.label, INK, font, anchor="lm")
        draw.text((width - 2, y), bar.number, INK, bold, anchor="rm")
    return np.asarray(picture)


def bar_icon(sheet: Canvas, y: float) -> None:
    """An example of a bar, for a legend."""
    _draw_bar(sheet, (8, ICON_WIDTH - 8), y, 0.7, BLACK)


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


def _draw_bar(
    sheet: Canvas, ends: tuple[float, float], y: float, share: float, color: Color
) -> None:
    """A bar over a share of the way between two ends, none for 0, on its track."""
    for part, ink in ((1.0, _TRACK), (share, color)):
        length = part * (ends[1] - ends[0])
        if length > 0:
            first, last = ends[0] + _BAR / 2, ends[0] + max(length, _BAR) - _BAR / 2
            sheet.line((first, y), (last, y), ink, _BAR, seam=PAPER)
