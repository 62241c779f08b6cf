# SPDX-License-Identifier: Apache-2.0
"""The evidence of one branch for a detection: a heat map over the image, and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .canvas import BLACK, Canvas, Color, Point, Rectangle, rectangle, square_around
from .detections import class_color
from .page import Bar, bars, title_strip

if TYPE_CHECKING:
    from d2_decouple.engine.context import DetectionContext, Evidence

__all__ = ["BRANCHES", "Ground", "Heat", "draw_heat", "ground_of", "heat_color", "heat_of"]

# From little to much, so that the order is seen in any kind of colour vision, and in grey.
BRANCHES: dict[str, tuple[Color, ...]] = {
    "class": ((255, 224, 130), (247, 112, 40), (165, 0, 38)),
    "box": ((150, 222, 235), (40, 120, 215), (20, 20, 110)),
}
_TOP = 0.05  # of the evidence: the pixels that have it, the densest, all have the full colour
_TAIL = 0.05  # of the evidence on each side, which need not be seen
_PALE = 0.35  # white that is mixed into the grey image below
_OPACITY = 0.8  # of the full colour
_GAMMA = 0.7  # below 1, so that a little evidence is seen, too
_SIDE = 520  # pixels of a panel in which marks have their plain size


@dataclass(frozen=True, kw_only=True)
class Heat:
    """The evidence of one branch for one detection.

    Attributes:
        branch: "class" or "box".
        values: (H, W) from 0 to 1, of the image's pixels.
        extent: xyxy pixels of the image; few of the evidence lies outside on each side.
        share: of the evidence that lies inside the box.
        radius: of the evidence, in half diagonals of the box.
    """

    branch: str
    values: np.ndarray
    extent: Rectangle
    share: float
    radius: float


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What is drawn of one detection, in pixels of the image.

    Attributes:
        box: the detection.
        color: of its class.
        location: of the cell that found it.
        level: of that cell.
        heats: the evidence for its class, and for its box.
        overlap: what both have in common.
    """

    box: Rectangle
    color: Color
    location: Point
    level: int
    heats: tuple[Heat, Heat]
    overlap: float

    @property
    def view(self) -> Rectangle:
        """The square part of the image that is shown: the box, and most of the evidence near it."""
        extents = [heat.extent for heat in self.heats]
        corners = [corner for extent in extents for corner in (extent[:2], extent[2:])]
        return square_around(self.box, np.array([*corners, self.location]))


def ground_of(seen: DetectionContext, index: int, num_classes: int) -> Ground:
    """Everything that is drawn of one detection."""
    found = seen.instances
    x, y = found.locations[index].tolist()
    return Ground(
        box=rectangle(found.pred_boxes.tensor[index].tolist()),
        color=class_color(int(found.pred_classes[index]), num_classes),
        location=(x, y),
        level=int(found.levels[index]),
        heats=(
            _heat("class", seen.class_evidence, index),
            _heat("box", seen.box_evidence, index),
        ),
        overlap=float(seen.overlaps[index]),
    )


def heat_of(evidence: np.ndarray) -> np.ndarray:
    """(H, W) shares of the evidence -> values from 0 to 1, in proportion up to a robust maximum.

    That is the evidence of the weakest of the densest pixels which together hold a twentieth of
    it: a few spikes do not make the rest invisible, however large the image is.
    """
    values = np.sort(evidence, axis=None)[::-1]
    sums = np.cumsum(values, dtype=np.float64)
    top = values[np.searchsorted(sums, _TOP * sums[-1])]
    return np.clip(evidence / max(top, np.finfo(np.float32).tiny), 0, 1)


def heat_color(values: np.ndarray, branch: str) -> np.ndarray:
    """(..., 3) colours of values (...) from 0 to 1."""
    ramp = np.array(BRANCHES[branch], dtype=np.float64)
    places = np.linspace(0, 1, len(ramp))
    return np.stack([np.interp(values, places, channel) for channel in ramp.T], axis=-1)


def draw_heat(image: np.ndarray, ground: Ground, heat: Heat, *, side: int) -> np.ndarray:
    """(height, side, 3) RGB, uint8: evidence over the image in grey, and its numbers below.

    The box is drawn in its class's colour, the cell that found it as a cross, and the evidence's
    radius as a ring around the middle of the box.
    """
    canvas = Canvas(_heated(image, heat), ground.view, (side, side), pen=max(side / _SIDE, 0.8))
    x1, y1, x2, y2 = ground.box
    half_diagonal = float(np.hypot(x2 - x1, y2 - y1)) / 2
    strongest = BRANCHES[heat.branch][-1]
    canvas.ring(((x1 + x2) / 2, (y1 + y2) / 2), heat.radius * half_diagonal, strongest, 1.6)
    canvas.box(ground.box, ground.color, 3)
    canvas.cross(ground.location, 7, BLACK)
    numbers = [
        Bar("in the box", heat.share, f"{100 * heat.share:.0f}%", strongest),
        Bar("radius", None, f"{heat.radius:.2f} half diagonals", strongest),
    ]
    title = title_strip(f"evidence for the {heat.branch}", side)
    return np.concatenate((title, canvas.pixels(), bars(numbers, side)))


def _heat(branch: str, evidence: Evidence, index: int) -> Heat:
    values = evidence.maps[index].numpy()
    left, right = _middle_part(values.sum(axis=0))
    top, bottom = _middle_part(values.sum(axis=1))
    return Heat(
        branch=branch,
        values=heat_of(values),
        extent=(left, top, right, bottom),
        share=float(evidence.shares[index]),
        radius=float(evidence.radii[index]),
    )


def _middle_part(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Places on an axis before and behind which there is little of what lies at its pixels."""
    sums = np.cumsum(values)
    low, high = np.searchsorted(sums, (_TAIL * sums[-1], (1 - _TAIL) * sums[-1]))
    return float(low), float(high + 1)


def _heated(image: np.ndarray, heat: Heat) -> np.ndarray:
    """(H, W, 3) uint8: the image in pale grey below the evidence."""
    grey = (image @ np.array((0.299, 0.587, 0.114)))[..., None]
    pale = grey + _PALE * (255 - grey)
    opacity = (_OPACITY * heat.values**_GAMMA)[..., None]
    mixed = pale + opacity * (heat_color(heat.values, heat.branch) - pale)
    return np.round(mixed).astype(np.uint8)
