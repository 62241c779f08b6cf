# SPDX-License-Identifier: Apache-2.0
"""The report's photographs: objects whose best box is not chosen, and detections by error."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..evaluation.truth import ImageId
from ..visualization import draw_boxes
from ..visualization.canvas import Canvas, Color, rectangle, square_around
from ..visualization.stage_panel import draw_truth
from .error_kinds import KINDS, RIGHT
from .misalignment import ObjectView
from .summary import Summary

__all__ = [
    "BY_IOU",
    "BY_SCORE",
    "KIND_COLORS",
    "TRUTH",
    "Panel",
    "error_panels",
    "jpeg",
    "misaligned_panels",
    "worst_objects",
]

BY_SCORE: Color = (230, 96, 0)
BY_IOU: Color = (0, 92, 200)
TRUTH: Color = (70, 215, 240)  # as draw_truth has it
KIND_COLORS: dict[str, Color] = {
    "right": (11, 138, 61),
    "classification": (122, 31, 162),
    "localisation": (224, 123, 0),
    "both": (107, 74, 27),
    "duplicate": (23, 71, 209),
    "background": (217, 4, 43),
    "missed": (40, 40, 40),
}
_SIDE = 300  # pixels of an object's panel
_WIDTH = 560  # pixels of an image's
_FADE = 0.2
_SHOWN_SCORE = 0.3  # detections below it would hide the image

ReadImage = Callable[[int], np.ndarray]
"""Place of an image in the ground truth -> (H, W, 3) RGB, uint8."""


class Panel(NamedTuple):
    """A picture with what is written below it: (H, W, 3) RGB, uint8."""

    pixels: np.ndarray
    caption: str


def worst_objects(summaries: Sequence[Summary], limit: int) -> list[int]:
    """Places of the objects with the largest mean IoU gap of all models, one of each image.

    Objects that a model does not reach are left out, so that each has a panel in every model.
    """
    rows = [[view.iou_gap for view in x.observed.views] for x in summaries if x.observed.views]
    if not rows:
        return []
    views = next(x.observed.views for x in summaries if x.observed.views) or []
    gaps = np.array(rows).mean(axis=0)
    chosen: dict[int, int] = {}
    for place in np.argsort(-gaps, kind="stable").tolist():  # NaN last
        if not np.isnan(gaps[place]):
            chosen.setdefault(views[place].image, place)
    return list(chosen.values())[:limit]


def misaligned_panels(
    summaries: Sequence[Summary], read: ReadImage, limit: int
) -> Iterator[list[Panel]]:
    """For each of the worst objects a panel of every model that has views."""
    dense = [summary for summary in summaries if summary.observed.views]
    for place in worst_objects(summaries, limit):
        views = [(summary.name, (summary.observed.views or [])[place]) for summary in dense]
        image = read(views[0][1].image)
        yield [Panel(_draw_view(image, view), _caption(name, view)) for name, view in views]


def _caption(name: str, view: ObjectView) -> str:
    best = view.best_iou
    return (
        f"{name}: chosen score {view.scores[0]:.2f}, IoU {best - view.iou_gap:.2f}; "
        f"best score {view.scores[1]:.2f}, IoU {best:.2f}; {view.distance:.1f} cells apart"
    )


def _draw_view(image: np.ndarray, view: ObjectView) -> np.ndarray:
    around = rectangle(view.box.tolist())
    spots = np.concatenate((view.boxes.reshape(-1, 2), view.locations))
    canvas = Canvas(image, square_around(around, spots), (_SIDE, _SIDE), fade=_FADE)
    draw_truth(canvas, around)
    canvas.box(rectangle(view.boxes[1].tolist()), BY_IOU, 3)
    canvas.box(rectangle(view.boxes[0].tolist()), BY_SCORE, 2.4, dashed=True)
    for location, color in zip(view.locations[::-1], (BY_IOU, BY_SCORE), strict=True):
        x, y = location.tolist()
        canvas.dot((x, y), 6, color)
    return canvas.pixels()


def error_panels(
    summaries: Sequence[Summary], image_ids: Sequence[ImageId], read: ReadImage
) -> list[Panel]:
    """The image with most wrong detections that score from 0.3, as each model sees it."""
    totals = np.zeros(summaries[0].judgement.image_count)
    for summary in summaries:
        judged = summary.judgement
        wrong = (judged.kinds >= 0) & (judged.scores >= _SHOWN_SCORE)
        totals += np.bincount(judged.images[wrong], minlength=len(totals))
    place = int(totals.argmax())
    image = read(place)
    return [_draw_errors(image, summary, place, image_ids[place]) for summary in summaries]


def _draw_errors(image: np.ndarray, summary: Summary, place: int, image_id: ImageId) -> Panel:
    judged = summary.judgement
    here = (judged.images == place) & (judged.scores >= _SHOWN_SCORE) & (judged.kinds >= RIGHT)
    kinds = ["right" if kind == RIGHT else KINDS[kind] for kind in judged.kinds[here]]
    found = summary.observed.detections.get(image_id)
    boxes = np.empty((0, 4)) if found is None else found.boxes[judged.places[here]]
    names = [judged.class_names[label] for label in judged.classes[here]]
    texts = [
        name if kind == "right" else f"{kind}: {name}"
        for kind, name in zip(kinds, names, strict=True)
    ]
    colors = [KIND_COLORS[kind] for kind in kinds]
    scale = _WIDTH / image.shape[1]
    pixels = draw_boxes(image, boxes, texts, judged.scores[here], colors, scale=scale)
    return Panel(pixels, f"{summary.name}: {kinds.count('right')} right of {len(kinds)}")


def jpeg(pixels: np.ndarray) -> bytes:
    """A picture, small enough for many in one file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return file.getvalue()
