# SPDX-License-Identifier: Apache-2.0
"""One detection's box after every stage, enlarged, and the proposals of a whole image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from .canvas import BLACK, INK, PAPER, Canvas, Color, Rectangle, square_around
from .detections import class_colors, draw_boxes, text_font
from .page import blank

if TYPE_CHECKING:
    from d2_decouple.engine.stages import DetectionStages

__all__ = [
    "OTHER",
    "TRACK",
    "Course",
    "course_of",
    "draw_bar",
    "draw_course",
    "draw_density",
    "draw_line",
    "draw_truth",
    "stage_colors",
]

# From light to dark, so that the order is seen in any kind of colour vision, and in grey.
_STAGES: tuple[Color, ...] = ((253, 170, 40), (219, 71, 106), (76, 2, 161))
OTHER: Color = (60, 62, 70)
_TRUTH: Color = (70, 215, 240)
_THIN, _THICK = 1.8, 3.2  # pixels of the picture: the first stage's line, and the last one's
_FADE, _DENSITY_FADE = 0.2, 0.35  # white that is mixed into the image
_FAINT, _CLEAR = 0.05, 0.45  # opacity of proposals' outlines: of others, of those near an object
_SIDE = 520  # pixels of a panel in which lines have their plain width
_ROW = 25  # pixels of a bar with its texts
_BAR = 9  # pixels: its height; its ends are round
TRACK: Color = (232, 233, 237)


@dataclass(frozen=True, kw_only=True)
class Course:
    """What is drawn of one detection, in pixels of the image.

    Attributes:
        boxes: the proposal, and the box after each of K >= 1 stages.
        ious: of each of these with the reference.
        truth: the object, if it is known.
        color: of the detection's class.
    """

    boxes: tuple[Rectangle, ...]
    ious: tuple[float, ...]
    truth: Rectangle | None
    color: Color


def course_of(seen: DetectionStages, index: int, num_classes: int) -> Course:
    """Everything that is drawn of one detection."""
    found = seen.instances
    label = int(found.pred_classes[index])
    known = seen.gt_boxes is not None and int(found.gt_index[index]) >= 0
    return Course(
        boxes=tuple(_rectangle(box) for box in found.stage_boxes[index].tolist()),
        ious=tuple(found.stage_ious[index].tolist()),
        truth=_rectangle(seen.references[index].tolist()) if known else None,
        color=class_colors(max(num_classes, label + 1))[label],
    )


def stage_colors(count: int) -> list[Color]:
    """A colour for each of K stages, the darkest for the last."""
    places = np.linspace(0, 1, count) if count > 1 else np.ones(1)
    known = np.linspace(0, 1, len(_STAGES))
    channels = [np.interp(places, known, channel) for channel in np.array(_STAGES).T]
    return [(round(red), round(green), round(blue)) for red, green, blue in np.array(channels).T]


def draw_line(canvas: Canvas, box: Rectangle, stage: int, stages: int) -> None:
    """The outline of a box in the manner of its stage: 0 is the proposal, ``stages`` the last."""
    if stage == 0:
        canvas.box(box, BLACK, 1.6, dashed=True)
    else:
        width = np.interp(stage, (1, stages), (_THIN, _THICK)) if stages > 1 else _THICK
        canvas.box(box, stage_colors(stages)[stage - 1], float(width))


def draw_truth(canvas: Canvas, box: Rectangle) -> None:
    """The outline of an object, so wide that it is seen below the last stage's."""
    canvas.box(box, _TRUTH, 9)


def draw_course(image: np.ndarray, course: Course, *, side: int) -> np.ndarray:
    """(height, side, 3) RGB, uint8: the boxes of all stages, and below them a bar for each IoU."""
    boxes = [*course.boxes, *([course.truth] if course.truth else [])]
    spots = np.array([corner for box in boxes for corner in (box[:2], box[2:])])
    view = square_around(course.boxes[-1], spots)
    canvas = Canvas(image, view, (side, side), fade=_FADE, pen=max(side / _SIDE, 0.8))
    if course.truth:
        draw_truth(canvas, course.truth)
    for stage, box in enumerate(course.boxes):
        draw_line(canvas, box, stage, len(course.boxes) - 1)
    return np.concatenate((canvas.pixels(), _bars(course, side)))


def draw_bar(
    canvas: Canvas, ends: tuple[float, float], y: float, share: float, color: Color
) -> None:
    """A bar over a share of the way between two ends; nothing for 0."""
    length = share * (ends[1] - ends[0])
    if length > 0:
        first, last = ends[0] + _BAR / 2, ends[0] + max(length, _BAR) - _BAR / 2
        canvas.line((first, y), (last, y), color, _BAR, seam=PAPER)


def _bars(course: Course, width: int) -> np.ndarray:
    """A line for each stage: how it is drawn, its name, and its IoU as a bar and a number."""
    stages = len(course.boxes) - 1
    sheet = blank(width, _ROW * (stages + 1) + 10)
    left, right = 130, width - 52
    for stage, iou in enumerate(course.ious):
        y = 8 + (stage + 0.5) * _ROW
        draw_line(sheet, (4, y - 6, 30, y + 6), stage, stages)
        color = stage_colors(stages)[stage - 1] if stage else BLACK
        draw_bar(sheet, (left, right), y, 1.0, TRACK)
        draw_bar(sheet, (left, right), y, iou, color)
    picture = Image.fromarray(sheet.pixels())
    draw, font, bold = ImageDraw.Draw(picture), text_font(15), text_font(15, bold=True)
    for stage, iou in enumerate(course.ious):
        y = 8 + (stage + 0.5) * _ROW
        draw.text((42, y), f"stage {stage}" if stage else "proposal", INK, font, anchor="lm")
        draw.text((width - 2, y), f"{iou:.2f}", INK, bold, anchor="rm")
    return np.asarray(picture)


def draw_density(
    image: np.ndarray,
    proposals: np.ndarray,
    owners: np.ndarray,
    courses: Sequence[Course],
    labels: Sequence[str],
    *,
    side: int,
) -> np.ndarray:
    """The whole image, ``side`` pixels wide or high, with all proposals and some detections.

    Args:
        image: (H, W, 3) RGB, uint8.
        proposals: (P, 4) xyxy pixels of it.
        owners: (P,) which of the detections each proposal is near to, -1 for none.
        courses: the detections.
        labels: of these.
        side: longer side of the picture, in pixels.
    """
    height, width = image.shape[:2]
    scale = side / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    canvas = Canvas(image, (0.0, 0.0, width, height), size, fade=_DENSITY_FADE)
    for near in (False, True):
        for index in np.flatnonzero((owners >= 0) == near).tolist():
            color = courses[owners[index]].color if near else OTHER
            box = _rectangle(proposals[index].tolist())
            canvas.outline(box, color, 1, opacity=_CLEAR if near else _FAINT)
    drawn = draw_boxes(
        canvas.pixels(),
        np.array([course.truth or course.boxes[-1] for course in courses]).reshape(-1, 4)
        * np.tile(np.array(size) / (width, height), 2),
        labels,
        colors=[course.color for course in courses],
    )
    picture = np.full((size[1], side, 3), 255, dtype=np.uint8)
    picture[:, : size[0]] = drawn
    return picture


def _rectangle(values: Sequence[float]) -> Rectangle:
    x1, y1, x2, y2 = values
    return x1, y1, x2, y2
