# SPDX-License-Identifier: Apache-2.0
"""Smooth marks on an enlarged part of an image: drawn several times too large, then reduced."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["Canvas", "rectangle", "square_around"]

Color: TypeAlias = tuple[int, int, int]
Point: TypeAlias = tuple[float, float]
Rectangle: TypeAlias = tuple[float, float, float, float]

BLACK: Color = (20, 20, 24)
PAPER: Color = (255, 255, 255)
INK: Color = (28, 28, 28)
GREY: Color = (105, 108, 116)
_FINER = 3  # drawn pixels for one of the picture, in each direction
_OUTSIDE = (226, 228, 232)  # what lies beyond the image
_DASH = (8.0, 5.0)  # pixels of the picture: drawn, left out
_REACH = 0.75  # of the box's longer side: surroundings that may be shown
_MARGIN = 0.09  # of the view
_LEAST_VIEW = 8.0  # pixels of the image


class Canvas:
    """A part of an image, enlarged, that marks are drawn on.

    Places are pixels (x, y) of the image, fractions and places outside of the view included;
    widths and radii are pixels of the picture times ``pen``. Each mark has a light or dark seam,
    so that it can be seen on any ground.
    """

    def __init__(
        self,
        image: np.ndarray,
        view: Rectangle,
        size: tuple[int, int],
        *,
        fade: float = 0.0,
        pen: float = 1.0,
    ) -> None:
        """
        Args:
            image: (H, W, 3) RGB, uint8.
            view: the part to show, xyxy pixels of ``image``, with the proportions of ``size``; it
                may leave the image.
            size: (width, height) of the picture.
            fade: share of white that is mixed into the image, so that marks stand out.
            pen: enlargement of all marks.
        """
        self.view, self.size = view, size
        self._pen = pen * _FINER
        self.zoom = size[0] / (view[2] - view[0])  # pixels of the picture per pixel of the image
        fine = (size[0] * _FINER, size[1] * _FINER)
        self._picture = Image.new("RGB", fine, _OUTSIDE)
        part = _intersection(view, (0.0, 0.0, float(image.shape[1]), float(image.shape[0])))
        if part is not None:
            low = [round(value) for value in self._fine(part[:2])]
            high = [round(value) for value in self._fine(part[2:])]
            shape = (max(high[0] - low[0], 1), max(high[1] - low[1], 1))
            shown = Image.fromarray(image).resize(shape, Image.Resampling.BICUBIC, box=part)
            if fade:
                shown = Image.blend(shown, Image.new("RGB", shape, PAPER), fade)
            self._picture.paste(shown, (low[0], low[1]))
        self._draw = ImageDraw.Draw(self._picture)

    def pixels(self) -> np.ndarray:
        """What was drawn, (height, width, 3) RGB, uint8."""
        return np.array(self._picture.resize(self.size, Image.Resampling.BOX))

    def place(self, point: Point) -> Point:
        """A place of the image in pixels of the picture."""
        return (point[0] - self.view[0]) * self.zoom, (point[1] - self.view[1]) * self.zoom

    def shows(self, point: Point) -> bool:
        """Whether a place of the image lies in the view."""
        x, y = point
        return self.view[0] <= x <= self.view[2] and self.view[1] <= y <= self.view[3]

    def line(
        self, start: Point, end: Point, color: Color, width: float, *, seam: Color = PAPER
    ) -> None:
        """A straight line with round ends."""
        first, last = self._fine(start), self._fine(end)
        self._stroke(first, last, seam, width + 2)
        self._stroke(first, last, color, width)

    def box(self, box: Rectangle, color: Color, width: float, *, dashed: bool = False) -> None:
        """The outline of an xyxy box, the middle of the line on its edges; it may be inverted."""
        x1, y1, x2, y2 = self._limited(box)
        corners = ((x1, y1), (x2, y1), (x2, y2), (x1, y2))
        sides = list(zip(corners, (*corners[1:], corners[0]), strict=True))
        for start, end in sides:
            self._stroke(start, end, PAPER, width + 2)
        for start, end in sides:
            for first, last in _dashes(start, end, self._pen) if dashed else ((start, end),):
                self._stroke(first, last, color, width, round_ends=not dashed)

    def outline(self, box: Rectangle, color: Color, width: float, *, opacity: float) -> None:
        """The outline of an xyxy box without a seam, so faint that many can lie on each other."""
        x1, y1, x2, y2 = self._limited(box)
        corners = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        thickness = max(round(width * self._pen), 1)
        ink = (*color, round(255 * opacity))
        ImageDraw.Draw(self._picture, "RGBA").rectangle(corners, outline=ink, width=thickness)

    def dot(self, center: Point, radius: float, color: Color, *, seam: Color = BLACK) -> None:
        """A filled disc."""
        x, y = self._fine(center)
        for reach, fill in ((radius, seam), (radius - 1.5, color)):
            self._draw.ellipse(_square(x, y, reach * self._pen), fill=fill)

    def ring(self, center: Point, radius: float, color: Color, width: float) -> None:
        """A circle; its radius is pixels of the image, and it may leave the view."""
        reach = radius * self.zoom * _FINER
        if reach > _FINER * math.hypot(*self.size):  # beyond the corners, from any place in view
            return
        for extra, ink in ((2.0, PAPER), (0.0, color)):
            half = max((width + extra) * self._pen / 2, 0.5)
            place = _square(*self._fine(center), reach + half)
            self._draw.ellipse(place, outline=ink, width=max(round(2 * half), 1))

    def cross(self, center: Point, radius: float, color: Color) -> None:
        """An upright cross."""
        x, y = self._fine(center)
        reach = radius * self._pen
        for extra, ink in ((2.0, PAPER), (0.0, color)):
            self._stroke((x - reach, y), (x + reach, y), ink, 2 + extra)
            self._stroke((x, y - reach), (x, y + reach), ink, 2 + extra)

    def pie(
        self, center: Point, radius: float, slices: Sequence[tuple[float, Color]], *, square: bool
    ) -> None:
        """A disc, or a square on its tip, cut into slices clockwise from the top.

        Args:
            center: of the mark.
            radius: from the middle to the edge; a square has the area of the disc.
            slices: (share, colour) of each; the shares add up to 1.
            square: whether it is a square on its tip.
        """
        x, y = (round(value) for value in self._fine(center))
        for extra, fill in ((2.5, BLACK), (1.5, PAPER)):
            _shape(self._draw, (x, y), (radius + extra) * self._pen, fill, square=square)
        reach = math.ceil(2 * radius * self._pen)
        cake = Image.new("RGB", (2 * reach + 1, 2 * reach + 1))
        cutter = Image.new("L", cake.size)
        knife, angle = ImageDraw.Draw(cake), -90.0
        for share, color in slices:
            knife.pieslice(_square(reach, reach, 2 * reach), angle, angle + 360 * share, fill=color)
            angle += 360 * share
        _shape(ImageDraw.Draw(cutter), (reach, reach), radius * self._pen, 255, square=square)
        self._picture.paste(cake, (x - reach, y - reach), cutter)

    def arrow(self, toward: Point, radius: float, color: Color) -> None:
        """A triangle at the edge of the view that points to a place outside of it."""
        aim, inset = self._fine(toward), (radius + 3) * self._pen
        tip = [
            min(max(value, inset), limit * _FINER - inset)
            for value, limit in zip(aim, self.size, strict=True)
        ]
        angle = math.atan2(aim[1] - tip[1], aim[0] - tip[0])
        for extra, fill in ((2.5, BLACK), (1.5, PAPER), (0.0, color)):
            reach = (radius + extra) * self._pen
            turns = (angle, angle + 2.4, angle - 2.4)
            corners = [(tip[0] + reach * math.cos(t), tip[1] + reach * math.sin(t)) for t in turns]
            self._draw.polygon(corners, fill=fill)

    def _fine(self, point: Sequence[float]) -> Point:
        scale = self.zoom * _FINER
        return (point[0] - self.view[0]) * scale, (point[1] - self.view[1]) * scale

    def _limited(self, box: Rectangle) -> Rectangle:
        """A box in drawn pixels; what lies far outside the view is brought near it."""
        # Dashes of an endless line would never end, and Pillow's numbers have 32 bits.
        values = (*self._fine(box[:2]), *self._fine(box[2:]))
        x1, y1, x2, y2 = (
            min(max(value, -50.0 * _FINER), (limit + 50.0) * _FINER)
            for value, limit in zip(values, (*self.size, *self.size), strict=True)
        )
        return x1, y1, x2, y2

    def _stroke(
        self, first: Point, last: Point, color: Color, width: float, *, round_ends: bool = True
    ) -> None:
        thickness = max(round(width * self._pen), 1)
        self._draw.line((first, last), fill=color, width=thickness)
        if round_ends:
            for x, y in (first, last):
                self._draw.ellipse(_square(x, y, (thickness - 1) / 2), fill=color)


def rectangle(values: Iterable[float]) -> Rectangle:
    """The four numbers of an xyxy box."""
    x1, y1, x2, y2 = values
    return float(x1), float(y1), float(x2), float(y2)


def square_around(box: Rectangle, spots: np.ndarray) -> Rectangle:
    """The square view of a box and of places (S, 2), as far as these are near it."""
    x1, y1, x2, y2 = box
    reach = _REACH * max(x2 - x1, y2 - y1, _LEAST_VIEW / 2)
    spots = np.clip(spots, (x1 - reach, y1 - reach), (x2 + reach, y2 + reach))
    low = np.minimum(spots.min(axis=0), (x1, y1))
    high = np.maximum(spots.max(axis=0), (x2, y2))
    half = max(float((high - low).max()) * (1 + 2 * _MARGIN), _LEAST_VIEW) / 2
    x, y = ((low + high) / 2).tolist()
    return x - half, y - half, x + half, y + half


def _square(x: float, y: float, reach: float) -> Rectangle:
    return x - reach, y - reach, x + reach, y + reach


def _intersection(one: Rectangle, other: Rectangle) -> Rectangle | None:
    x1, y1 = max(one[0], other[0]), max(one[1], other[1])
    x2, y2 = min(one[2], other[2]), min(one[3], other[3])
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _shape(
    draw: ImageDraw.ImageDraw, center: Point, reach: float, fill: Color | int, *, square: bool
) -> None:
    """A disc of radius ``reach``, or a square of the same area on its tip."""
    x, y = center
    if square:
        reach *= math.sqrt(math.pi / 2)
        draw.polygon([(x, y - reach), (x + reach, y), (x, y + reach), (x - reach, y)], fill)
    else:
        draw.ellipse(_square(x, y, reach), fill=fill)


def _dashes(start: Point, end: Point, pen: float) -> list[tuple[Point, Point]]:
    """A line cut into dashes; both of its ends are drawn."""
    dash, gap = (value * pen for value in _DASH)
    length = math.dist(start, end)
    if length <= dash:
        return [(start, end)]
    count = max(round((length + gap) / (dash + gap)), 2)
    first, direction = np.array(start), (np.array(end) - np.array(start)) / length
    lows = np.linspace(0, length - dash, count)
    pieces = np.stack((lows, lows + dash), axis=1)[..., None] * direction + first
    return [((x1, y1), (x2, y2)) for (x1, y1), (x2, y2) in pieces.tolist()]
