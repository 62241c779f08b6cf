# SPDX-License-Identifier: Apache-2.0
"""A picture of where detections were read: coarse boxes, points, and the levels they read.

No paper's method is known here: whatever boxes and points a model says of its detections is
drawn. Boundary points, of which each gives a side, have marks of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .canvas import BLACK, PAPER, Canvas, Color
from .page import (
    ICON_WIDTH,
    Icon,
    check_image,
    detection_title,
    found_at,
    page_of,
    shown_classes,
)
from .point_panel import (
    DOT_COLORS,
    DOT_RADIUS,
    FARTHER,
    LEVEL_COLORS,
    MARK_RADIUS,
    Reading,
    draw_panel,
    reading_of,
)

if TYPE_CHECKING:
    from d2_decouple.engine.points import DetectionPoints

__all__ = ["draw_points"]

_PANELS = {1: 800, 2: 720, 3: 520, 4: 520}  # pixels: side of a panel, by how many there are
_SMALL_PANEL = 400
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
    check_image(image, seen.instances, limit)
    readings = [
        reading_of(seen, index, len(class_names))
        for index in range(min(limit, len(seen.instances)))
    ]
    names = shown_classes(seen.instances, class_names, limit)
    side = _PANELS.get(len(readings), _SMALL_PANEL)
    panels = []
    for index, reading in enumerate(readings):
        note = found_at(seen.level_names, seen.strides, reading.level)
        title = detection_title(
            names[index], seen.instances, index, side, color=reading.color, note=note
        )
        panel = draw_panel(image, reading, seen.level_names, side=side)
        panels.append(np.concatenate((title, panel)))
    return page_of(
        image,
        seen.instances,
        names,
        [(reading.box, reading.color) for reading in readings],
        _legend_rows(readings),
        panels,
        columns=math.ceil(math.sqrt(len(readings))),
    )


def _legend_rows(readings: Sequence[Reading]) -> list[tuple[Icon, str]]:
    if not readings:
        return []
    middle, color = ICON_WIDTH / 2, readings[0].color
    rows: list[tuple[Icon, str]] = [
        (lambda sheet, y: sheet.box((8, y - 9, ICON_WIDTH - 8, y + 9), color, 3), "detection"),
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


def _level_rows(readings: Sequence[Reading]) -> list[tuple[Icon, str]]:
    """A row for each level, relative to a cell's own, that something was read from."""
    steps = {
        level - reading.level
        for reading in readings
        for level in np.flatnonzero((reading.shares > 0).any(axis=0)).tolist()
    }
    # Levels that are farther away share a colour, and so a row.
    shown = sorted({step if abs(step) < 2 else 2 for step in steps}, key=[*_LEVEL_NAMES].index)
    rows: list[tuple[Icon, str]] = [
        (_level_icon(step), f"... from {_LEVEL_NAMES[step]}") for step in shown
    ]
    if len(shown) > 1:
        # An example: where two levels are mixed, the colours alone do not say what a slice is.
        rows.append((_mixed_icon(shown), "... mixed: its slices are the levels' weights"))
    return rows


def _dashed_icon(sheet: Canvas, y: float) -> None:
    sheet.box((8, y - 9, ICON_WIDTH - 8, y + 9), BLACK, 1.6, dashed=True)


def _boundary_icon(color: Color) -> Icon:
    def draw(sheet: Canvas, y: float) -> None:
        sheet.line((20, y), (ICON_WIDTH - 10, y), color, 1.6)
        sheet.line((ICON_WIDTH - 10, y - 11), (ICON_WIDTH - 10, y + 11), color, 3)
        sheet.dot((ICON_WIDTH - 10, y), 4, color, seam=PAPER)
        sheet.pie((20, y), MARK_RADIUS, [(1.0, (205, 208, 214))], square=False)

    return draw


def _level_icon(step: int) -> Icon:
    slices = [(1.0, LEVEL_COLORS.get(step, FARTHER))]
    return lambda sheet, y: sheet.pie((ICON_WIDTH / 2, y), MARK_RADIUS, slices, square=step != 0)


def _mixed_icon(steps: Sequence[int]) -> Icon:
    slices = [(1 / len(steps), LEVEL_COLORS.get(step, FARTHER)) for step in steps]
    return lambda sheet, y: sheet.pie((ICON_WIDTH / 2, y), MARK_RADIUS, slices, square=False)


def _dot_icon(color: Color) -> Icon:
    return lambda sheet, y: sheet.dot((ICON_WIDTH / 2, y), DOT_RADIUS, color)
