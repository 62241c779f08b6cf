# SPDX-License-Identifier: Apache-2.0
"""A picture of where detections were read: coarse boxes, points, and the levels they read.

No paper's method is known here: whatever boxes and points a model says of its detections is
drawn. Boundary points, of which each gives a side, have marks of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image, ImageDraw

from .canvas import Canvas, Color
from .detections import draw_boxes, text_font
from .point_panel import (
    BLACK,
    DOT_COLORS,
    DOT_RADIUS,
    FARTHER,
    GREY,
    INK,
    LEVEL_COLORS,
    MARK_RADIUS,
    PAPER,
    Reading,
    draw_panel,
    reading_of,
)

if TYPE_CHECKING:
    from d2_decouple.engine.points import DetectionPoints

__all__ = ["draw_points"]

_Icon: TypeAlias = Callable[[Canvas, float], None]  # drawn at a height of the legend

_COLUMN = 640  # pixels: width of the whole image and of the legend
_GAP = 18
_PANELS = {1: 800, 2: 720, 3: 520, 4: 520}  # pixels: side of a panel, by how many there are
_SMALL_PANEL = 400
_ICON_WIDTH, _ROW = 72, 44
_MEANINGS = {
    "class_points": "class points: where the class is read",
    "coarse_boxes": "coarse box, which the points start from",
}
_LEVEL_NAMES = {  # by the distance from the cell's own
    0: "the cell's own level",
    -1: "the next finer level",
    1: "the next coarser level",
    2: "a level farther away",
}


def draw_points(
    image: np.ndarray, seen: DetectionPoints, class_names: Sequence[str], *, limit: int = 4
) -> np.ndarray:
    """The whole image with its strongest detections, and an enlarged panel for each of them.

    A panel shows the final box in its class's colour, the coarse box dashed, the cell that found
    the object as a cross, a mark with a thin line for each boundary point, leading to the side
    that was read there, and dots for the points at which the class was read. A mark is cut like a
    pie by the shares of the levels; it is a disc where the cell's own level has the largest, else
    a square on its tip. Points that are far away are arrows at the panel's edge.

    Args:
        image: (H, W, 3) RGB, uint8.
        seen: what :meth:`~d2_decouple.engine.predictor.Predictor.points` says about it.
        class_names: K names; classes beyond them are called by their number.
        limit: detections to show, the strongest first.

    Returns:
        (height, width, 3) RGB, uint8, at least 640 pixels wide whatever the image's size; for
        four detections about 1,700.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}; wanted is a whole number from 1")
    if tuple(seen.instances.image_size) != image.shape[:2]:
        raise ValueError(
            f"the points are for an image of height and width {tuple(seen.instances.image_size)}, "
            f"the image has {image.shape[:2]}; give the image that they were made from"
        )
    readings = [
        reading_of(seen, index, len(class_names))
        for index in range(min(limit, len(seen.instances)))
    ]
    names = [
        class_names[label] if label < len(class_names) else f"class {label}"
        for label in seen.instances.pred_classes[: len(readings)].tolist()
    ]
    overview = _overview(image, seen, readings, names)
    if not readings:
        return _framed(overview)
    column = _stacked([overview, _legend(readings)], axis=0)
    width = math.ceil(math.sqrt(len(readings)))
    side = _PANELS.get(len(readings), _SMALL_PANEL)
    panels = []
    for index, reading in enumerate(readings):
        title = _title(
            names[index],
            side,
            tail=f" {float(seen.instances.scores[index]):.2f}",
            badge=f"{index + 1}",
            color=reading.color,
            note=f"found at {seen.level_names[reading.level]}, "
            f"stride {seen.strides[reading.level]}",
        )
        panel = draw_panel(image, reading, seen.level_names, side=side)
        panels.append(np.concatenate((title, panel)))
    rows = [_stacked(panels[i : i + width], axis=1) for i in range(0, len(panels), width)]
    return _framed(_stacked([column, _stacked(rows, axis=0)], axis=1))


def _overview(
    image: np.ndarray, seen: DetectionPoints, readings: Sequence[Reading], names: Sequence[str]
) -> np.ndarray:
    """The whole image, as wide as the legend or as high, with the boxes that have a panel."""
    scale = _COLUMN / max(image.shape[:2])
    drawn = draw_boxes(
        image,
        np.array([reading.box for reading in readings]),
        [f"{index + 1} {name}" for index, name in enumerate(names)],
        colors=[reading.color for reading in readings],
        scale=scale,
    )
    picture = np.full((drawn.shape[0], _COLUMN, 3), 255, dtype=np.uint8)
    picture[:, : drawn.shape[1]] = drawn
    total = len(seen.instances)
    text = f"{total} detection" + "s" * (total != 1)
    if 1 < len(readings) < total:
        text += f", the strongest {len(readings)} shown"
    elif len(readings) < total:
        text += ", the strongest shown"
    return np.concatenate((_title(text, _COLUMN), picture))


def _title(
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
    sheet = _sheet(width, height)
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


def _legend(readings: Sequence[Reading]) -> np.ndarray:
    """What the marks mean, as far as they occur."""
    rows = _legend_rows(readings)
    font = text_font(17)
    sheet = _sheet(_COLUMN, _ROW * len(rows) + _GAP)
    for number, (draw_icon, _) in enumerate(rows):
        draw_icon(sheet, (number + 0.5) * _ROW + _GAP)
    picture = Image.fromarray(sheet.pixels())
    draw = ImageDraw.Draw(picture)
    for number, (_, text) in enumerate(rows):
        middle = (number + 0.5) * _ROW + _GAP
        draw.text((_ICON_WIDTH + 14, middle), text, fill=INK, font=font, anchor="lm")
    return np.asarray(picture)


def _legend_rows(readings: Sequence[Reading]) -> list[tuple[_Icon, str]]:
    middle, color = _ICON_WIDTH / 2, readings[0].color
    rows: list[tuple[_Icon, str]] = [
        (lambda sheet, y: sheet.box((8, y - 9, _ICON_WIDTH - 8, y + 9), color, 3), "detection"),
    ]
    for name in dict.fromkeys(name for reading in readings for name in reading.other_boxes):
        rows.append((_dashed_icon, _MEANINGS.get(name, name.replace("_", " "))))
    rows.append(
        (lambda sheet, y: sheet.cross((middle, y), 7, BLACK), "the cell that found the object")
    )
    if any(len(reading.boundary) for reading in readings):
        rows.append((_boundary_icon(color), "boundary point: the side it leads to is read there"))
        rows += _level_rows(readings)
    for number, name in enumerate(readings[0].dots):
        dot = DOT_COLORS[number % len(DOT_COLORS)]
        rows.append((_dot_icon(dot), _MEANINGS.get(name, name.replace("_", " "))))
    return rows


def _level_rows(readings: Sequence[Reading]) -> list[tuple[_Icon, str]]:
    """A row for each level, relative to a cell's own, that something was read from."""
    steps = {
        level - reading.level
        for reading in readings
        for level in np.flatnonzero((reading.shares > 0).any(axis=0)).tolist()
    }
    # Levels that are farther away share a colour, and so a row.
    shown = sorted({step if abs(step) < 2 else 2 for step in steps}, key=[*_LEVEL_NAMES].index)
    rows: list[tuple[_Icon, str]] = [
        (_level_icon(step), f"... from {_LEVEL_NAMES[step]}") for step in shown
    ]
    if len(shown) > 1:
        # An example: where two levels are mixed, the colours alone do not say what a slice is.
        rows.append((_mixed_icon(shown), "... mixed: its slices are the levels' weights"))
    return rows


def _dashed_icon(sheet: Canvas, y: float) -> None:
    sheet.box((8, y - 9, _ICON_WIDTH - 8, y + 9), BLACK, 1.6, dashed=True)


def _boundary_icon(color: Color) -> _Icon:
    def draw(sheet: Canvas, y: float) -> None:
        sheet.line((20, y), (_ICON_WIDTH - 10, y), color, 1.6)
        sheet.line((_ICON_WIDTH - 10, y - 11), (_ICON_WIDTH - 10, y + 11), color, 3)
        sheet.dot((_ICON_WIDTH - 10, y), 4, color, seam=PAPER)
        sheet.pie((20, y), MARK_RADIUS, [(1.0, (205, 208, 214))], square=False)

    return draw


def _level_icon(step: int) -> _Icon:
    slices = [(1.0, LEVEL_COLORS.get(step, FARTHER))]
    return lambda sheet, y: sheet.pie((_ICON_WIDTH / 2, y), MARK_RADIUS, slices, square=step != 0)


def _mixed_icon(steps: Sequence[int]) -> _Icon:
    slices = [(1 / len(steps), LEVEL_COLORS.get(step, FARTHER)) for step in steps]
    return lambda sheet, y: sheet.pie((_ICON_WIDTH / 2, y), MARK_RADIUS, slices, square=False)


def _dot_icon(color: Color) -> _Icon:
    return lambda sheet, y: sheet.dot((_ICON_WIDTH / 2, y), DOT_RADIUS, color)


def _sheet(width: int, height: int) -> Canvas:
    """White paper; a place on it is a pixel of the picture."""
    white = np.full((height, width, 3), 255, dtype=np.uint8)
    return Canvas(white, (0, 0, width, height), (width, height))


def _stacked(parts: Sequence[np.ndarray], *, axis: int) -> np.ndarray:
    """Pictures below (axis 0) or beside (axis 1) each other, with gaps, filled up with white."""
    across = 1 - axis
    extent = max(part.shape[across] for part in parts)
    filled: list[np.ndarray] = []
    for number, part in enumerate(parts):
        missing = [(0, 0), (0, 0), (0, 0)]
        missing[across] = (0, extent - part.shape[across])
        missing[axis] = (_GAP if number else 0, 0)
        filled.append(np.pad(part, missing, constant_values=255))
    return np.concatenate(filled, axis=axis)


def _framed(picture: np.ndarray) -> np.ndarray:
    return np.pad(picture, ((0, _GAP), (_GAP, _GAP), (0, 0)), constant_values=255)
