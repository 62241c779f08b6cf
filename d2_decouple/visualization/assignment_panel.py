# SPDX-License-Identifier: Apache-2.0
"""The cells of one level that learn an image's objects: coloured squares over the image in grey."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from .canvas import GREY, INK, PAPER, Canvas, Color, Rectangle, rectangle
from .detections import draw_boxes, text_font
from .page import blank, title_strip

if TYPE_CHECKING:
    from d2_decouple.engine.assignment import LabelSet

__all__ = [
    "PALETTE",
    "Learned",
    "LevelCells",
    "draw_level",
    "draw_square",
    "has_dots",
    "hatched",
    "level_cells",
    "object_colors",
    "opacity_of",
]

# Told apart in any kind of colour vision (Okabe and Ito), without the yellow, which pales on grey.
PALETTE: tuple[Color, ...] = (
    (213, 94, 0),
    (0, 114, 178),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
)
_PALE = 0.45  # white that is mixed into the grey image below
_FULL, _LEAST = 0.92, 0.14  # opacity of the strongest cell, and of one that learns next to nothing
_FRAMED = 6.0  # pixels of the picture: squares from this side on have an edge and a gap
_DOTTED = 6.5  # the same, and a dot for the box's weight
_LEAST_DOT = 1.5  # pixels: a smaller radius is not seen
_HATCH = (7, 2)  # pixels from line to line, and of a line
_ROW, _DISC = 25, 9  # pixels: a line of counts, and the radius of an object's number
_WIDEST = 360  # pixels that a panel has at least, for its title


@dataclass(frozen=True, kw_only=True)
class Learned:
    """How many cells of a level learn an object, and the sum of their weights."""

    index: int
    cells: int
    weight: float


@dataclass(frozen=True, kw_only=True)
class LevelCells:
    """What is drawn of one level, in pixels of the image.

    Attributes:
        squares: (C, 4) xyxy; those of a cell that learns several objects follow each other.
        objects: (C,) what each learns.
        strengths: (C,) from 0 to 1, relative to the strongest cell of all levels.
        box_strengths: (C,) the same of the box's weights, or None where they say nothing new.
        ignored: (I, 4) xyxy.
        learned: the objects that it learns.
    """

    squares: np.ndarray
    objects: np.ndarray
    strengths: np.ndarray
    box_strengths: np.ndarray | None
    ignored: np.ndarray
    learned: tuple[Learned, ...]


def level_cells(labels: LabelSet, level: int) -> LevelCells:
    """What is drawn of one level of a label set."""
    own = (labels.levels == level).numpy()
    weights = labels.strengths.numpy()
    strengths, boxes = _shares(weights), None
    if has_dots(labels) and labels.box_weights is not None:
        boxes = _shares(labels.box_weights.numpy())
    objects = labels.gt_index.numpy()[own]
    counts = {
        index: (int((objects == index).sum()), float(weights[own][objects == index].sum()))
        for index in np.unique(objects).tolist()
    }
    return LevelCells(
        squares=labels.cells.numpy()[own],
        objects=objects,
        strengths=strengths[own],
        box_strengths=None if boxes is None else boxes[own],
        ignored=labels.ignored.numpy()[(labels.ignored_levels == level).numpy()],
        learned=tuple(
            Learned(index=index, cells=cells, weight=weight)
            for index, (cells, weight) in counts.items()
        ),
    )


def has_dots(labels: LabelSet) -> bool:
    """Whether the box's weights are not in proportion to the class's, and so are drawn."""
    if labels.cls_weights is None or labels.box_weights is None:
        return False
    cls, box = (_shares(x.numpy()) for x in (labels.cls_weights, labels.box_weights))
    return not np.allclose(cls, box, atol=0.01)


def opacity_of(strength: float) -> float:
    """Of a cell, from its strength between 0 and 1."""
    return _LEAST + (_FULL - _LEAST) * strength


def object_colors(boxes: np.ndarray) -> list[Color]:
    """A colour for each of M boxes (M, 4); boxes of one colour are as far apart as may be."""
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    chosen: list[int] = []
    for index in range(len(boxes)):
        away = np.linalg.norm(middles[:index] - middles[index], axis=1)
        room = [
            min(
                (far for far, other in zip(away, chosen, strict=True) if other == color),
                default=math.inf,
            )
            for color in range(len(PALETTE))
        ]
        chosen.append(int(np.argmax(room)))
    return [PALETTE[color] for color in chosen]


def draw_level(
    image: np.ndarray,
    cells: LevelCells,
    boxes: np.ndarray,
    colors: Sequence[Color],
    *,
    side: int,
    title: str,
    note: str,
) -> np.ndarray:
    """(height, width, 3) RGB, uint8: a level's title, the image with its cells, and numbers.

    Args:
        image: (H, W, 3) RGB, uint8.
        cells: of the level.
        boxes: (M, 4) of all objects, xyxy pixels of the image.
        colors: of these.
        side: longer side of the image in the picture, in pixels.
        title: of the level.
        note: of the title.
    """
    height, width = image.shape[:2]
    scale = side / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    zoom = np.tile(np.array(size) / (width, height), 2)
    view = (0.0, 0.0, float(width), float(height))
    ground = Canvas(_pale(image), view, size).pixels().astype(np.float64)
    _hatch(ground, cells.ignored * zoom)
    places = _slices(cells.squares * zoom)
    for place, index, strength in zip(places, cells.objects, cells.strengths, strict=True):
        draw_square(ground, rectangle(place), colors[index], float(strength))
    if cells.box_strengths is not None:
        for place, strength in zip(places, cells.box_strengths, strict=True):
            _dot(ground, rectangle(place), float(strength))
    learned = [x.index for x in cells.learned]
    for index in set(range(len(boxes))) - set(learned):
        _outline(ground, boxes[index] * zoom)
    drawn = draw_boxes(
        np.round(ground).astype(np.uint8),
        boxes[learned] * zoom,
        [f"{index + 1}" for index in learned],
        colors=[colors[index] for index in learned],
    )
    across = max(size[0], _WIDEST)
    drawn = np.pad(drawn, ((0, 0), (0, across - size[0]), (0, 0)), constant_values=255)
    counts = _counts(cells.learned, colors, across)
    return np.concatenate((title_strip(title, across, note=note), drawn, counts))


def draw_square(ground: np.ndarray, place: Rectangle, color: Color, strength: float) -> None:
    """Fill a square (xyxy pixels) of a picture (H, W, 3) of floats, in place.

    Neighbours are told apart by a gap and an edge, if the square is large enough.
    """
    x1, y1, x2, y2 = (max(round(value), 0) for value in place)
    if min(place[2] - place[0], place[3] - place[1]) >= _FRAMED:
        x2, y2 = x2 - 1, y2 - 1
        edge = ground[y1:y2, x1:x2]
        inner = edge[1:-1, 1:-1].copy()
        edge += 0.8 * (np.array(color) - edge)
        edge[1:-1, 1:-1] = inner
        x1, y1, x2, y2 = x1 + 1, y1 + 1, x2 - 1, y2 - 1
    part = ground[y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)]
    part += opacity_of(strength) * (np.array(color) - part)


def hatched(height: int, width: int) -> np.ndarray:
    """(height, width) where the lines are of what is ignored."""
    rows, columns = np.mgrid[:height, :width]
    return (rows + columns) % _HATCH[0] < _HATCH[1]


def _hatch(ground: np.ndarray, squares: np.ndarray) -> None:
    lines, mask = hatched(*ground.shape[:2]), np.zeros(ground.shape[:2], dtype=bool)
    for square in squares:
        x1, y1, x2, y2 = (max(round(value), 0) for value in square.tolist())
        mask[y1:y2, x1:x2] = True
    ground[mask & lines] += 0.55 * (np.array(INK) - ground[mask & lines])


def _slices(squares: np.ndarray) -> np.ndarray:
    """(C, 4) squares; equal ones, which follow each other, share theirs side by side."""
    places = squares.astype(np.float64)
    start = 0
    for end in range(1, len(squares) + 1):
        if end == len(squares) or (squares[end] != squares[start]).any():
            edges = np.linspace(squares[start, 0], squares[start, 2], end - start + 1)
            places[start:end, 0], places[start:end, 2] = edges[:-1], edges[1:]
            start = end
    return places


def _dot(ground: np.ndarray, place: Rectangle, strength: float) -> None:
    """A dot in a square's middle whose area is the box's weight, with a smooth edge."""
    x1, y1, x2, y2 = place
    side = min(x2 - x1, y2 - y1)
    if side < _DOTTED or strength <= 0:
        return
    radius = max(0.32 * side * math.sqrt(strength), _LEAST_DOT)
    x, y = (x1 + x2 - 1) / 2, (y1 + y2 - 1) / 2
    left, top = (max(math.floor(value - radius - 1), 0) for value in (x, y))
    part = ground[top : max(math.ceil(y + radius + 1), 0), left : max(math.ceil(x + radius + 1), 0)]
    rows, columns = np.ogrid[: part.shape[0], : part.shape[1]]
    away = np.hypot(rows + top + 0.5 - y, columns + left + 0.5 - x)
    part += np.clip(radius - away + 0.5, 0, 1)[..., None] * (np.array(INK) - part)


def _outline(ground: np.ndarray, box: np.ndarray) -> None:
    """The edge of a box (4,) that is not learned, one pixel wide; it may leave the picture."""
    height, width = ground.shape[:2]
    limits = np.array((width, height, width, height)) - 1
    x1, y1, x2, y2 = np.clip(np.round(box), 0, limits).astype(int).tolist()
    mask = np.zeros((height, width), dtype=bool)
    mask[y1 : y2 + 1, [x1, x2]] = mask[[y1, y2], x1 : x2 + 1] = True
    ground[mask] += 0.6 * (np.array(GREY) - ground[mask])


def _pale(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: the image in pale grey."""
    grey = (image @ np.array((0.299, 0.587, 0.114)))[..., None]
    return np.repeat(np.round(grey + _PALE * (255 - grey)).astype(np.uint8), 3, axis=2)


def _shares(weights: np.ndarray) -> np.ndarray:
    """(C,) of the greatest; zeros where all are."""
    return weights / max(float(weights.max(initial=0.0)), np.finfo(np.float32).tiny)


def _counts(learned: Sequence[Learned], colors: Sequence[Color], width: int) -> np.ndarray:
    """Each object's number in a disc, and how many cells learn it; lines of ``width`` pixels."""
    font, bold = text_font(15), text_font(11, bold=True)
    texts = [_count_text(x) for x in learned]
    places, x, row = [], 2.0, 0
    for text in texts:
        needed = 2 * _DISC + 5 + font.getlength(text)
        if x + needed > width and x > 2:
            x, row = 2.0, row + 1
        places.append((x, (row + 0.5) * _ROW + 4))
        x += needed + 16
    sheet = blank(width, (row + 1) * _ROW + 8)
    for item, (left, y) in zip(learned, places, strict=True):
        color = colors[item.index]
        sheet.dot((left + _DISC, y), _DISC, color, seam=color)
    picture = Image.fromarray(sheet.pixels())
    draw = ImageDraw.Draw(picture)
    for item, text, (left, y) in zip(learned, texts, places, strict=True):
        draw.text((left + _DISC, y), f"{item.index + 1}", PAPER, bold, anchor="mm")
        draw.text((left + 2 * _DISC + 5, y), text, INK, font, anchor="lm")
    return np.asarray(picture)


def _count_text(item: Learned) -> str:
    text = f"{item.cells}"
    if abs(item.weight - item.cells) >= 0.005 * item.cells:
        text += f" (Σ {item.weight:.2g})" if item.weight < 10 else f" (Σ {item.weight:.0f})"
    return text
