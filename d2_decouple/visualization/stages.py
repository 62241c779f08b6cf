# SPDX-License-Identifier: Apache-2.0
"""A picture of how boxes come about: proposals at two densities, and boxes after every stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .canvas import Canvas, Color
from .page import (
    GAP,
    ICON_WIDTH,
    Icon,
    bar_icon,
    check_image,
    detection_title,
    framed,
    legend,
    shown_classes,
    shown_of,
    stacked,
    title_strip,
)
from .stage_panel import (
    OTHER,
    Course,
    course_of,
    draw_course,
    draw_density,
    draw_line,
    draw_truth,
    stage_colors,
)

if TYPE_CHECKING:
    from d2_decouple.engine.stages import DetectionStages

__all__ = ["draw_stages"]

_WIDTH = 1746  # pixels of all columns and the gaps between them; whole for three and for four


def draw_stages(
    image: np.ndarray, seen: DetectionStages, class_names: Sequence[str], *, limit: int = 4
) -> np.ndarray:
    """The image's proposals at the two densities, and a panel for each of the strongest detections.

    Of the proposals those near a shown detection have its class's colour, others are faint. A
    panel shows the proposal dashed and the box after each stage, from light to dark, and a bar for
    the IoU of each: with the last box, or with the object, where ground truth is known, whose box
    then lies below the others.

    Args:
        image: (H, W, 3) RGB, uint8.
        seen: what :meth:`~d2_decouple.engine.predictor.Predictor.stages` says about it.
        class_names: K names; classes beyond them are called by their number.
        limit: detections to show, the strongest first.

    Returns:
        (height, width, 3) RGB, uint8; about 1,800 pixels wide for two detections or more.
    """
    check_image(image, seen.instances, limit)
    names = shown_classes(seen.instances, class_names, limit)
    courses = [course_of(seen, index, len(class_names)) for index in range(len(names))]
    third = _column(3)
    densities = [
        _density(image, seen, which, courses, names, side=third) for which in ("class", "box")
    ]
    heading = title_strip(shown_of(len(seen.instances), len(names)), third)
    explained = [heading, legend(_legend_rows(seen, courses), third)]
    explanation = np.concatenate(explained) if courses else heading
    columns = 3 if len(names) <= 3 else 4
    panels = [
        _panel(image, seen, index, course, names[index], side=_column(columns))
        for index, course in enumerate(courses)
    ]
    if len(panels) == 1:  # the legend beside it
        rows = [stacked(densities, axis=1), stacked([panels[0], explanation], axis=1)]
    else:
        rows = [stacked([*densities, explanation], axis=1)]
        starts = range(0, len(panels), columns)
        rows += [stacked(panels[start : start + columns], axis=1) for start in starts]
    return framed(stacked(rows, axis=0))


def _column(columns: int) -> int:
    return (_WIDTH - (columns - 1) * GAP) // columns


def _density(
    image: np.ndarray,
    seen: DetectionStages,
    which: str,
    courses: Sequence[Course],
    names: Sequence[str],
    *,
    side: int,
) -> np.ndarray:
    """The proposals of one branch, "class" or "box", with their numbers."""
    branch = ("class", "box").index(which)
    proposals = (seen.class_proposals, seen.box_proposals)[branch]
    owners = seen.owners(len(courses))[branch].numpy()
    counts = seen.instances.near_proposals[:, branch].tolist()
    number = f"{len(proposals.boxes)} proposals"
    if proposals.survivors > len(proposals.boxes):
        number = f"best {len(proposals.boxes)} of {proposals.survivors} proposals"
    title = title_strip(
        f"{which} branch: NMS {proposals.nms_thresh:g}",
        side,
        note=f"{number}, {int((owners >= 0).sum())} coloured",
    )
    picture = draw_density(
        image,
        proposals.boxes.numpy(),
        owners,
        courses,
        [f"{index + 1} {name}: {counts[index]}" for index, name in enumerate(names)],
        side=side,
    )
    return np.concatenate((title, picture))


def _panel(
    image: np.ndarray, seen: DetectionStages, index: int, course: Course, name: str, *, side: int
) -> np.ndarray:
    title = detection_title(name, seen.instances, index, side, color=course.color)
    return np.concatenate((title, draw_course(image, course, side=side)))


def _legend_rows(seen: DetectionStages, courses: Sequence[Course]) -> list[tuple[Icon, str]]:
    """What the marks mean, as far as they occur."""
    if not courses:
        return []
    stages = len(courses[0].boxes) - 1
    known = seen.gt_boxes is not None
    near = f"proposals near {'an object' if known else 'a detection'} (IoU from {seen.near_iou:g})"
    rows: list[tuple[Icon, str]] = [
        (_faint_icon(courses[0].color, 0.45), f"{near}, counted"),
        (_faint_icon(OTHER, 0.2), "other proposals"),
        (lambda sheet, y: draw_line(sheet, _icon_box(y), 0, stages), "proposal of the detection"),
    ]
    if any(course.truth for course in courses):
        rows.append((lambda sheet, y: draw_truth(sheet, _icon_box(y)), "the object itself"))
    if stages > 1:
        rows.append((_stages_icon(stages), "box after each stage, the darkest after the last"))
    else:
        rows.append((_stages_icon(stages), "box after the only stage"))
    rows.append((bar_icon, "IoU with the " + ("object" if known else "last box")))
    return rows


def _icon_box(y: float) -> tuple[float, float, float, float]:
    return 8, y - 9, ICON_WIDTH - 8, y + 9


def _faint_icon(color: Color, opacity: float) -> Icon:
    def draw(sheet: Canvas, y: float) -> None:
        for shift in (-4, -2, 0, 3):
            box = (8 + shift, y - 9 + shift / 2, ICON_WIDTH - 8 + shift / 2, y + 9 - shift / 2)
            sheet.outline(box, color, 1, opacity=opacity)

    return draw


def _stages_icon(stages: int) -> Icon:
    def draw(sheet: Canvas, y: float) -> None:
        colors = stage_colors(stages)
        step = (ICON_WIDTH - 16) / stages
        for stage, color in enumerate(colors):
            left = 8 + stage * step
            sheet.line((left, y), (left + step - 3, y), color, 5)

    return draw
