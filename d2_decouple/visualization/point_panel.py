# SPDX-License-Identifier: Apache-2.0
"""One detection, enlarged, with the points that it was read at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from .canvas import BLACK, INK, PAPER, Canvas, Color, Point, Rectangle, rectangle, square_around
from .detections import class_color, common_area, text_font

if TYPE_CHECKING:
    from d2_decouple.engine.points import DetectionPoints

__all__ = ["Reading", "draw_panel", "level_slices", "panel_view", "reading_of"]

# By the distance from the level of the cell itself; bright, as the classes' colours are dark.
LEVEL_COLORS: dict[int, Color] = {0: (0, 190, 255), -1: (255, 170, 0), 1: (190, 130, 255)}
FARTHER: Color = (150, 225, 60)
DOT_COLORS: tuple[Color, ...] = ((255, 255, 255), (255, 240, 60), (255, 150, 190), (130, 240, 210))
MARK_RADIUS, DOT_RADIUS = 10.0, 6.0  # pixels of the picture
_OUTWARD = ((-1, 0), (0, -1), (1, 0), (0, 1))  # of the left, top, right, bottom side
_RELUCTANCE = 0.04  # of a text's area: what a place may hide before the next one is taken
_FADE = 0.2  # white that is mixed into the image
_SIDE = 520  # pixels of a panel in which marks have their plain size


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is drawn of one detection, in pixels of the image.

    Attributes:
        box: the detection.
        color: of its class.
        other_boxes: each other kind of box by its name, such as "coarse_boxes".
        boundary: (4, 2) points of the left, top, right and bottom side, or (0, 2).
        shares: (4, L) of the levels in what was read there, or (0, L).
        dots: (P, 2) of each other kind of points, by its name, such as "class_points".
        location: of the cell that found it.
        level: of that cell.
    """

    box: Rectangle
    color: Color
    other_boxes: dict[str, Rectangle]
    boundary: np.ndarray
    shares: np.ndarray
    dots: dict[str, np.ndarray]
    location: Point
    level: int


def reading_of(seen: DetectionPoints, index: int, num_classes: int) -> Reading:
    """Everything of one detection that can be drawn: what is not finite is left out."""
    values = {
        name: np.asarray(getattr(value, "tensor", value)[index].cpu(), dtype=np.float64)
        for name, value in seen.instances.get_fields().items()
    }
    values["pred_boxes"] = values["pred_boxes"].reshape(4)  # indexed Boxes keep a row
    kinds = {
        name: value[np.isfinite(value).all(axis=-1)]
        for name, value in values.items()
        if name.endswith("points") and value.ndim == 2
    }
    boundary = kinds.pop("boundary_points", np.zeros((0, 2)))
    if len(boundary) != len(_OUTWARD):
        boundary = np.zeros((0, 2))
    shares = values.get("box_level_weights")
    if shares is None:
        shares = np.eye(len(seen.level_names))[[int(values["levels"])] * len(_OUTWARD)]
    label = int(values["pred_classes"])
    return Reading(
        box=rectangle(values.pop("pred_boxes")),
        color=class_color(label, num_classes),
        other_boxes={
            name: rectangle(value)
            for name, value in values.items()
            if name.endswith("boxes") and np.isfinite(value).all()
        },
        boundary=boundary,
        shares=shares[: len(boundary)],
        dots=kinds,
        location=(float(values["locations"][0]), float(values["locations"][1])),
        level=int(values["levels"]),
    )


def level_slices(shares: np.ndarray, level: int) -> tuple[list[tuple[float, Color]], bool]:
    """How a boundary point is marked: (share, colour) of each level, and whether it is square.

    Args:
        shares: (L,) of the pyramid levels, finest first.
        level: the one that the detection's cell belongs to; where another has the largest share,
            the mark is square.
    """
    slices = [
        (share, LEVEL_COLORS.get(index - level, FARTHER))
        for index, share in enumerate(shares.tolist())
        if share > 0
    ]
    return slices, int(np.argmax(shares)) != level


def panel_view(reading: Reading) -> Rectangle:
    """The square part of the image that a detection's panel shows: its box, and what is near."""
    corners = [corner for box in reading.other_boxes.values() for corner in (box[:2], box[2:])]
    spots = np.array([*corners, reading.location])
    return square_around(
        reading.box, np.concatenate((spots, reading.boundary, *reading.dots.values()))
    )


def draw_panel(
    image: np.ndarray, reading: Reading, level_names: Sequence[str], *, side: int
) -> np.ndarray:
    """(side, side, 3) RGB, uint8: the :func:`panel_view` of an image (H, W, 3) with its marks."""
    pen = max(side / _SIDE, 0.8)
    canvas = Canvas(image, panel_view(reading), (side, side), fade=_FADE, pen=pen)
    for box in reading.other_boxes.values():
        canvas.box(box, BLACK, 1.6, dashed=True)
    canvas.box(reading.box, reading.color, 3)
    boundary = [(x, y) for x, y in reading.boundary.tolist()]
    for point, end in zip(boundary, _ends(reading), strict=True):
        if canvas.shows(point):
            canvas.line(point, end, reading.color, 1.6)
            canvas.dot(end, 4, reading.color, seam=PAPER)
    canvas.cross(reading.location, 7, BLACK)
    for point, shares in zip(boundary, reading.shares, strict=True):
        slices, square = level_slices(shares, reading.level)
        if canvas.shows(point):
            canvas.pie(point, MARK_RADIUS, slices, square=square)
        else:
            canvas.arrow(point, MARK_RADIUS, max(slices)[1])
    for number, points in enumerate(reading.dots.values()):
        color = DOT_COLORS[number % len(DOT_COLORS)]
        for x, y in points.tolist():
            if canvas.shows((x, y)):
                canvas.dot((x, y), DOT_RADIUS, color)
            else:
                canvas.arrow((x, y), DOT_RADIUS, color)
    return _with_shares(canvas, reading, level_names, pen)


def _ends(reading: Reading) -> list[Point]:
    """The place on each side of the box that its boundary point's line leads to."""
    if not len(reading.boundary):
        return []
    x1, y1, x2, y2 = reading.box
    x, y = np.clip(reading.boundary, (x1, y1), (x2, y2)).T.tolist()
    return [(x1, y[0]), (x[1], y1), (x2, y[2]), (x[3], y2)]


def _with_shares(
    canvas: Canvas, reading: Reading, level_names: Sequence[str], pen: float
) -> np.ndarray:
    """The canvas's pixels with the largest share written beside each boundary point."""
    picture = Image.fromarray(canvas.pixels())
    draw, font = ImageDraw.Draw(picture, "RGBA"), text_font(round(13 * pen))
    height = sum(font.getmetrics()) + 2
    dots = [(x, y) for points in reading.dots.values() for x, y in points.tolist()]
    boundary = [(x, y) for x, y in reading.boundary.tolist()]
    taken = [
        _around(canvas.place(place), radius * pen)
        for places, radius in (
            (dots, DOT_RADIUS),
            ([reading.location], MARK_RADIUS),
            (boundary, MARK_RADIUS + 2),
            (_ends(reading), DOT_RADIUS),
        )
        for place in places
    ]
    for point, shares, outward in zip(boundary, reading.shares, _OUTWARD, strict=False):
        if not canvas.shows(point):
            continue
        best = int(np.argmax(shares))
        text = level_names[best]
        if shares[best] < 0.995:
            text += f" {100 * shares[best]:.0f}%"
        size = (font.getlength(text) + 8 * pen, float(height))
        mark = _around(canvas.place(point), (MARK_RADIUS + 5) * pen)
        place = _free_place(mark, size, outward, taken, canvas.size)
        taken.append(place)
        draw.rounded_rectangle(place, radius=4 * pen, fill=(*PAPER, 215))
        draw.text((place[0] + 4 * pen, place[1] + 1), text, fill=INK, font=font)
    return np.asarray(picture)


def _around(place: Point, radius: float) -> Rectangle:
    return place[0] - radius, place[1] - radius, place[0] + radius, place[1] + radius


def _free_place(
    mark: Rectangle,
    size: Point,
    outward: tuple[int, int],
    taken: Sequence[Rectangle],
    limits: tuple[int, int],
) -> Rectangle:
    """Where beside a mark a text of ``size`` hides least: outward of its side, if that is free."""
    steps = np.array([(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if x or y])
    # Straight outward, then outward to one side, and so on.
    steps = steps[np.argsort(abs(steps).sum(axis=1) - 3 * (steps @ outward), kind="stable")]
    x1, y1, x2, y2 = mark
    reach = (np.array((x2 - x1, y2 - y1)) + size) / 2
    lower = np.array(((x1 + x2) / 2, (y1 + y2) / 2)) + steps * reach - np.array(size) / 2
    lower = np.clip(lower, 2, np.maximum(np.array(limits) - size - 2, 2))
    options = np.concatenate((lower, lower + size), axis=1)
    hidden = np.array([common_area(option, np.array(taken)).sum() for option in options])
    costs = hidden + _RELUCTANCE * size[0] * size[1] * np.arange(len(options))
    return rectangle(options[int(np.argmin(costs))])
