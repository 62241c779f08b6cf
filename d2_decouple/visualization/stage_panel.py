# SPDX-License-Identifier: Apache-2.0
"""One detection's box after every stage, enlarged, and the proposals of a whole image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .canvas import BLACK, Canvas, Color, Rectangle, rectangle, square_around
from .detections import class_color, draw_boxes
from .page import Bar, Icon, bars

if TYPE_CHECKING:
    from d2_decouple.engine.stages import DetectionStages

__all__ = [
    "OTHER",
    "Course",
    "course_of",
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
        boxes=tuple(rectangle(box) for box in found.stage_boxes[index].tolist()),
        ious=tuple(found.stage_ious[index].tolist()),
        truth=rectangle(seen.references[index].tolist()) if known else None,
        color=class_color(label, num_classes),
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


def _bars(course: Course, width: int) -> np.ndarray:
    """A line for each stage: how it is drawn, its name, and its IoU as a bar and a number."""
    stages = len(course.boxes) - 1
    colors = (BLACK, *stage_colors(stages))

    def icon(stage: int) -> Icon:
        return lambda sheet, y: draw_line(sheet, (4, y - 6, 30, y + 6), stage, stages)

    rows = [
        Bar(f"stage {stage}" if stage else "proposal", iou, f"{iou:.2f}", color, icon(stage))
        for stage, (iou, color) in enumerate(zip(course.ious, colors, strict=True))
    ]
    return bars(rows, width)


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
            box = rectangle(proposals[index].tolist())
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
