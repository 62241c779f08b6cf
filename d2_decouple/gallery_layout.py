# SPDX-License-Identifier: Apache-2.0
"""How the gallery puts panels together, and keeps its pictures small."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from .analysis.pictures import Panel
from .visualization.canvas import INK
from .visualization.detections import text_font
from .visualization.page import blank, framed, stacked, title_strip

__all__ = ["captioned", "jpeg_within", "listed", "rows_of"]

_WIDEST = 1400  # pixels of a picture
_QUALITIES = (90, 85, 80, 75, 70)
_SMALLER = 0.9  # in each direction, where no quality is low enough
_TEXT = 14


def rows_of(rows: Sequence[tuple[str, str, Sequence[np.ndarray]]]) -> np.ndarray:
    """Rows of panels, each below its name and a note."""
    parts = []
    for name, note, panels in rows:
        row = stacked(panels, axis=1)
        parts.append(np.concatenate((title_strip(name, row.shape[1], note=note), row)))
    return framed(stacked(parts, axis=0)) if parts else blank(1, 1).pixels()


def captioned(panel: Panel) -> np.ndarray:
    """A panel below its model's name, and above the rest of its caption, broken into lines."""
    font, width = text_font(_TEXT), panel.pixels.shape[1]
    name, _, caption = panel.caption.partition(": ")
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width - 4:
            lines.append(word)
        else:
            lines[-1] = longer
    height = sum(font.getmetrics())
    picture = Image.fromarray(blank(width, height * len(lines) + 12).pixels())
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        draw.text((2, 6 + number * height), line, fill=INK, font=font)
    return np.concatenate((title_strip(name, width), panel.pixels, np.asarray(picture)))


def listed(names: Iterable[str]) -> str:
    """In words."""
    *some, last = names
    return f"{', '.join(some)} and {last}" if some else last


def jpeg_within(pixels: np.ndarray, limit: int) -> bytes:
    """A picture as JPEG of at most ``limit`` bytes: with less quality, then smaller."""
    picture = Image.fromarray(pixels)
    if picture.width > _WIDEST:
        picture = _scaled(picture, _WIDEST / picture.width)
    while True:
        for quality in _QUALITIES:
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=quality, optimize=True)
            if len(file.getvalue()) <= limit:
                return file.getvalue()
        if min(picture.size) < 16:
            raise ValueError(f"no JPEG has {limit} bytes or less; wanted is a larger limit")
        picture = _scaled(picture, _SMALLER)


def _scaled(picture: Image.Image, scale: float) -> Image.Image:
    size = (round(picture.width * scale), round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)
