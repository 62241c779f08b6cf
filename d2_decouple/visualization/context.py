# SPDX-License-Identifier: Apache-2.0
"""A picture of where the evidence for detections lies: for their class, and for their box."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .canvas import BLACK, Canvas
from .context_panel import BRANCHES, Ground, draw_heat, ground_of, heat_color
from .page import (
    GAP,
    ICON_WIDTH,
    Bar,
    Icon,
    bar_icon,
    bars,
    check_image,
    detection_title,
    found_at,
    page_of,
    shown_classes,
    stacked,
)

if TYPE_CHECKING:
    from d2_decouple.engine.context import DetectionContext

__all__ = ["draw_context"]

_PANELS = {1: 480, 2: 420}  # pixels: side of a panel, by the number of detections
_SMALL_PANEL = 330
_MEANINGS = {
    "class": "evidence for the class: |gradient| of its logit",
    "box": "evidence for the box: |gradient| of its four sides",
}


def draw_context(
    image: np.ndarray, seen: DetectionContext, class_names: Sequence[str], *, limit: int = 4
) -> np.ndarray:
    """The whole image with its strongest detections, and two enlarged panels for each of them.

    One panel shows the evidence for the class, the other that for the box, each from light to dark
    over the image in grey: the colour is full in the densest pixels that together have a twentieth
    of the evidence. The box is in its class's colour, the cell that found the object a cross; a
    ring around the middle of the box has the radius of the evidence. Numbers are below: what
    of the evidence lies inside the box, its radius, and what both maps have in common.

    Args:
        image: (H, W, 3) RGB, uint8.
        seen: what :meth:`~d2_decouple.engine.predictor.Predictor.context` says about it.
        class_names: K names; classes beyond them are called by their number.
        limit: detections to show, the strongest first, as far as ``seen`` has their evidence.

    Returns:
        (height, width, 3) RGB, uint8, at least 640 pixels wide whatever the image's size; for
        four detections about 2,050.
    """
    check_image(image, seen.instances, limit)
    count = min(limit, len(seen.overlaps))
    grounds = [ground_of(seen, index, len(class_names)) for index in range(count)]
    names = shown_classes(seen.instances, class_names, count)
    side = _PANELS.get(count, _SMALL_PANEL)
    panels = []
    for index, ground in enumerate(grounds):
        width = 2 * side + GAP
        note = found_at(seen.level_names, seen.strides, ground.level)
        title = detection_title(
            names[index], seen.instances, index, width, color=ground.color, note=note
        )
        heats = [draw_heat(image, ground, heat, side=side) for heat in ground.heats]
        common = bars([Bar("overlap", ground.overlap, f"{ground.overlap:.2f}", BLACK)], width)
        panels.append(np.concatenate((title, stacked(heats, axis=1), common)))
    return page_of(
        image,
        seen.instances,
        names,
        [(ground.box, ground.color) for ground in grounds],
        _legend_rows(grounds),
        panels,
        columns=math.ceil(math.sqrt(count / 2)),  # a panel is twice as wide as high
    )


def _legend_rows(grounds: Sequence[Ground]) -> list[tuple[Icon, str]]:
    if not grounds:
        return []
    middle, color = ICON_WIDTH / 2, grounds[0].color
    return [
        (lambda sheet, y: sheet.box((8, y - 9, ICON_WIDTH - 8, y + 9), color, 3), "detection"),
        (lambda sheet, y: sheet.cross((middle, y), 7, BLACK), "the cell that found the object"),
        *((_ramp_icon(branch), text) for branch, text in _MEANINGS.items()),
        (_ring_icon, "radius of the evidence: 1 reaches the box's corners"),
        (bar_icon, "in the box: the evidence that lies inside of it"),
        (bar_icon, "overlap: the evidence that both have in common"),
    ]


def _ramp_icon(branch: str) -> Icon:
    def draw(sheet: Canvas, y: float) -> None:
        places = np.linspace(8, ICON_WIDTH - 8, ICON_WIDTH // 2)
        colors = heat_color(np.linspace(0, 1, len(places)), branch).round().astype(int).tolist()
        for x, (red, green, blue) in zip(places.tolist(), colors, strict=True):
            color = (red, green, blue)
            sheet.line((x, y - 8), (x, y + 8), color, 3, seam=color)

    return draw


def _ring_icon(sheet: Canvas, y: float) -> None:
    for branch, x in zip(BRANCHES, (ICON_WIDTH / 2 - 13, ICON_WIDTH / 2 + 13), strict=True):
        sheet.ring((x, y), 10, BRANCHES[branch][-1], 1.6)
