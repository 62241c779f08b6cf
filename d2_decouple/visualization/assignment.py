# SPDX-License-Identifier: Apache-2.0
"""A picture of supervision: which cells of which level learn each object, and how strongly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .assignment_panel import (
    PALETTE,
    draw_level,
    has_dots,
    level_cells,
    object_colors,
    opacity_of,
)
from .canvas import GREY, INK, PAPER, Canvas, Color
from .detections import draw_boxes
from .page import GAP, ICON_WIDTH, Icon, blank, framed, legend, stacked, title_strip

if TYPE_CHECKING:
    from d2_decouple.engine.assignment import Assignment, LabelSet

__all__ = ["draw_assignment"]

_OVERVIEW = 560  # pixels: longer side of the whole image
_LEGEND = 900  # pixels: width of the legend
_WIDTH = 1900  # pixels of a row's panels and the gaps between them, as far as their sides allow
_SIDES = (360, 760)  # pixels: longer side of the image in a level's panel


def draw_assignment(
    image: np.ndarray, seen: Sequence[tuple[str, Assignment]], class_names: Sequence[str]
) -> np.ndarray:
    """Objects and a legend, and below them a row for each model's label sets, a panel a level.

    A panel has the image in pale grey. Each cell that learns an object is a square of its stride
    in that object's colour, the fuller, the greater its weight in the class's loss (in the box's,
    where the set teaches boxes alone), relative to the row's strongest cell. A dot has the box's
    weight, where that is another. A cell that learns several objects is divided between them; one
    whose class learns nothing is hatched. Below are the numbers of cells, and sums of weights, for
    each object.

    Args:
        image: (H, W, 3) RGB, uint8.
        seen: name of each model, and what
            :meth:`~d2_decouple.engine.predictor.Predictor.assignment` says about the image, with
            the same objects for all.
        class_names: K names; classes beyond them are called by their number.

    Returns:
        (height, width, 3) RGB, uint8; for five levels about 2,000 to 2,900 pixels wide.
    """
    _check(image, seen)
    boxes = seen[0][1].gt_boxes.numpy()
    colors = object_colors(boxes)
    levels = _used_levels(seen)
    rows = [
        _row(image, name, assignment, labels, levels, colors)
        for name, assignment in seen
        for labels in assignment.sets
    ]
    overview = _overview(image, seen[0][1], colors, class_names)
    head = stacked([overview, _legend(seen, levels)], axis=1)
    return framed(stacked([head, *rows], axis=0))


def _used_levels(seen: Sequence[tuple[str, Assignment]]) -> list[int]:
    """The levels of which some row has a cell to show; all, if there is none."""
    sets = [labels for _, assignment in seen for labels in assignment.sets]
    used = {level for x in sets for level in (*x.levels.tolist(), *x.ignored_levels.tolist())}
    return sorted(used) or list(range(max(len(x.level_names) for _, x in seen)))


def _check(image: np.ndarray, seen: Sequence[tuple[str, Assignment]]) -> None:
    if not seen:
        raise ValueError("nothing to draw; give at least one (name, assignment)")
    for name, assignment in seen:
        size = tuple(assignment.instances.image_size)
        if size != image.shape[:2]:
            raise ValueError(
                f"the assignment {name} is for an image of height and width {size}, the image has "
                f"{image.shape[:2]}; give the image that it was made from"
            )
        if not np.array_equal(assignment.gt_boxes.numpy(), seen[0][1].gt_boxes.numpy()):
            raise ValueError(
                f"{name} and {seen[0][0]} have different objects; give all models the same ones"
            )


def _overview(
    image: np.ndarray,
    assignment: Assignment,
    colors: Sequence[Color],
    class_names: Sequence[str],
) -> np.ndarray:
    """The whole image with numbered objects."""
    names = [
        class_names[label] if label < len(class_names) else f"class {label}"
        for label in assignment.gt_classes.tolist()
    ]
    drawn = draw_boxes(
        image,
        assignment.gt_boxes.numpy(),
        [f"{index + 1} {name}" for index, name in enumerate(names)],
        colors=list(colors),
        scale=_OVERVIEW / max(image.shape[:2]),
    )
    picture = np.full((drawn.shape[0], _OVERVIEW, 3), 255, dtype=np.uint8)
    picture[:, : drawn.shape[1]] = drawn
    count = len(names)
    title = f"{count} annotated object{'' if count == 1 else 's'}"
    return np.concatenate((title_strip(title, _OVERVIEW), picture))


def _row(
    image: np.ndarray,
    name: str,
    assignment: Assignment,
    labels: LabelSet,
    levels: Sequence[int],
    colors: Sequence[Color],
) -> np.ndarray:
    """A label set: its title, and a panel for each of some levels."""
    boxes = assignment.gt_boxes.numpy()
    share = (_WIDTH - (len(levels) - 1) * GAP) / len(levels)
    height, width = image.shape[:2]
    side = round(min(max(share * max(height / width, 1), _SIDES[0]), _SIDES[1]))
    panels = []
    for level in levels:
        if level >= len(assignment.strides):  # another model has more levels
            continue
        cells = level_cells(labels, level)
        count = len(np.unique(cells.squares, axis=0))
        note = f"stride {assignment.strides[level]}, {count} cell{'' if count == 1 else 's'}"
        title = assignment.level_names[level]
        panels.append(draw_level(image, cells, boxes, colors, side=side, title=title, note=note))
    row = stacked(panels, axis=1)
    missing = sorted(set(range(len(boxes))) - set(labels.gt_index.tolist()))
    text = f"{name} ({assignment.assigner})" if name else assignment.assigner
    text += f": cells that learn {labels.learns}"
    return np.concatenate((title_strip(text, row.shape[1], note=_row_note(labels, missing)), row))


def _row_note(labels: LabelSet, missing: Sequence[int]) -> str:
    """What full colour means, and which objects nobody learns."""
    parts = []
    if len(labels.cells):
        parts.append(f"full colour: weight {float(labels.strengths.max()):.2g}")
    if missing:
        shown = ", ".join(f"{index + 1}" for index in missing[:12]) + ", …" * (len(missing) > 12)
        parts.append(f"learned by no cell: {shown}")
    return "; ".join(parts)


def _legend(seen: Sequence[tuple[str, Assignment]], levels: Sequence[int]) -> np.ndarray:
    """What the marks mean, as far as they occur."""
    sets = [labels for _, assignment in seen for labels in assignment.sets]
    names = seen[0][1].level_names
    rows: list[tuple[Icon, str]] = []
    if any(len(x.cells) for x in sets):
        rows += [
            (_squares_icon, "a cell that learns the object of its colour; the fuller, the greater"),
            (_nothing, "its weight in the loss of the class, relative to the row's greatest"),
        ]
    if any(has_dots(x) for x in sets):
        rows.append((_dot_icon, "area of the dot: the same of the box's loss, where it differs"))
    if any(len(x.ignored) for x in sets):
        rows.append(
            (_hatch_icon, "ignored: a prediction here learns no class, no background either")
        )
    if len(seen[0][1].gt_boxes):
        rows += [
            (_pale_box_icon, "an object that this level does not learn"),
            (_number_icon, "5 (Σ 2.1): five cells learn this object; the sum of their weights"),
        ]
    unused = [name for level, name in enumerate(names) if level not in levels]
    if unused:
        rows.append((_nothing, f"no cell of {', '.join(unused)} learns an object: not shown"))
    if not rows:
        return blank(1, 1).pixels()
    return np.concatenate((title_strip("which cells learn them", _LEGEND), legend(rows, _LEGEND)))


def _nothing(sheet: Canvas, y: float) -> None:
    """No mark."""


def _block(sheet: Canvas, left: float, y: float, color: Color, strength: float) -> None:
    """A filled square of 18 pixels."""
    opacity = opacity_of(strength)
    mixed = [round(255 + opacity * (value - 255)) for value in color]
    ink = (mixed[0], mixed[1], mixed[2])
    for step in range(5):
        x = left + 2 + 3.5 * step
        sheet.line((x, y - 7), (x, y + 7), ink, 4, seam=ink)
    sheet.outline((left, y - 9, left + 18, y + 9), color, 1, opacity=1)


def _squares_icon(sheet: Canvas, y: float) -> None:
    for step, strength in enumerate((1.0, 0.5, 0.0)):
        _block(sheet, 8 + 20 * step, y, PALETTE[1], strength)


def _dot_icon(sheet: Canvas, y: float) -> None:
    for step, radius in enumerate((6.0, 4.0, 2.0)):
        _block(sheet, 8 + 20 * step, y, PALETTE[1], 1.0)
        sheet.dot((8 + 20 * step + 9, y), radius, INK, seam=INK)


def _hatch_icon(sheet: Canvas, y: float) -> None:
    for step in range(7):
        x = 12 + 7 * step
        sheet.line((x, y + 8), (x + 16, y - 8), GREY, 1, seam=PAPER)


def _pale_box_icon(sheet: Canvas, y: float) -> None:
    sheet.outline((8, y - 9, ICON_WIDTH - 8, y + 9), GREY, 1, opacity=0.8)


def _number_icon(sheet: Canvas, y: float) -> None:
    sheet.dot((ICON_WIDTH / 2, y), 9, PALETTE[0], seam=PALETTE[0])
