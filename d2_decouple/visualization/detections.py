# SPDX-License-Identifier: Apache-2.0
"""Boxes on images, and predictions beside the ground truth.

All boxes are absolute xyxy pixels of the image they are drawn on; images are RGB.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import matplotlib
import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

if TYPE_CHECKING:
    from detectron2.structures import Instances

__all__ = ["class_color", "class_colors", "common_area", "compare", "draw_boxes", "text_font"]

Color: TypeAlias = tuple[int, int, int]
Rectangle: TypeAlias = tuple[float, float, float, float]

_PALETTE = ("#0b8a3d", "#1747d1", "#d9042b", "#e07b00", "#7a1fa2", "#00838f", "#c2187a", "#6b4a1b")
_INK = (28, 28, 28)
_PAPER = (255, 255, 255)
_TEXT_SIZE = 13  # pixels of the drawn picture
_TITLE_SIZE = 19
_PADDING = 3  # pixels around a label's text
_GAP = 12  # pixels between the two halves of a comparison
# The cost of a label's places beside what they hide, in parts of its area: it belongs above its box
# or at its upper edge, since below and beside a box it looks like the neighbour's.
_RELUCTANCE = np.array((0.0, 0.1, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9))
_PANEL_SIDE = 800  # pixels: the longer side of a half is at least this


def class_colors(num_classes: int) -> list[Color]:
    """One strong colour (R, G, B) a class, the same for a class however many there are."""
    colors = []
    for index in range(num_classes):
        if index < len(_PALETTE):
            red, green, blue = ImageColor.getrgb(_PALETTE[index])[:3]
        else:
            # Steps of the golden ratio never come back to a hue that was used.
            value = colorsys.hsv_to_rgb(index * 0.618034 % 1.0, 0.85, 0.75)
            red, green, blue = (round(255 * channel) for channel in value)
        colors.append((red, green, blue))
    return colors


def class_color(label: int, num_classes: int) -> Color:
    """The colour of one class of several, also of one beyond them."""
    return class_colors(max(num_classes, label + 1))[label]


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[str],
    scores: np.ndarray | None = None,
    colors: Sequence[Color] | None = None,
    *,
    scale: float = 1.0,
) -> np.ndarray:
    """Draw M labelled boxes on an enlarged copy of an image.

    A label goes where it hides least: above, inside or below its box, clear of other labels and
    of small boxes as far as there is room.

    Args:
        image: (H, W, 3) RGB, uint8.
        boxes: (M, 4) xyxy pixels of ``image``.
        labels: M texts; an empty one draws the box alone.
        scores: (M,) numbers to put behind the labels, or None.
        colors: M colours (R, G, B); by default one for each different label.
        scale: enlargement of the picture; lines and text keep their size.

    Returns:
        (round(H * scale), round(W * scale), 3) RGB, uint8.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    _check(image, boxes, labels, scores, colors)
    height, width = (max(round(side * scale), 1) for side in image.shape[:2])
    picture = Image.fromarray(image)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    if colors is None:
        names = sorted(set(labels))
        colors = [class_colors(len(names))[names.index(label)] for label in labels]
    texts = list(labels)
    if scores is not None:
        texts = [
            f"{label} {score:.2f}".strip() for label, score in zip(labels, scores, strict=True)
        ]

    frame = np.array([width, height, width, height])
    scaled = np.clip(boxes * (frame / np.tile(image.shape[1::-1], 2)), 0, frame - 1)
    scaled[:, 2:] = np.maximum(scaled[:, 2:], scaled[:, :2])  # an inverted box shows as a point
    draw = ImageDraw.Draw(picture)
    order = np.argsort(-_area(scaled), kind="stable")  # small boxes last, on top
    for index in order:
        draw.rectangle(tuple(scaled[index]), outline=colors[index], width=2)
    places = _place_labels([texts[i] for i in order], scaled[order], (width, height))
    for index, place in zip(order, places, strict=True):
        if texts[index]:
            _draw_label(draw, texts[index], place, colors[index])
    return np.asarray(picture)


def compare(
    image: np.ndarray,
    ground_truth: Instances,
    detections: Instances,
    class_names: Sequence[str],
    *,
    score_thresh: float,
) -> np.ndarray:
    """Ground truth on the left, predictions with a score above the threshold on the right.

    Args:
        image: (H, W, 3) RGB, uint8; small ones are enlarged.
        ground_truth: with ``gt_boxes`` and ``gt_classes``, in pixels of ``image``.
        detections: with ``pred_boxes``, ``scores`` and ``pred_classes``, in pixels of ``image``.
        class_names: K names.
        score_thresh: predictions with this score or less are left out.

    Returns:
        One picture, RGB, uint8.
    """
    for name, instances in (("ground_truth", ground_truth), ("detections", detections)):
        if tuple(instances.image_size) != image.shape[:2]:
            raise ValueError(
                f"{name} are for an image of height and width {tuple(instances.image_size)}, the "
                f"image has {image.shape[:2]}; postprocess them to the image's own size"
            )
    kept = detections[detections.scores > score_thresh].to("cpu")
    colors = class_colors(len(class_names))
    scale = max(1.0, _PANEL_SIDE / max(image.shape[:2]))

    def half(boxes: np.ndarray, classes: np.ndarray, scores: np.ndarray | None) -> np.ndarray:
        labels = [class_names[index] for index in classes]
        return draw_boxes(
            image, boxes, labels, scores, [colors[index] for index in classes], scale=scale
        )

    truth = ground_truth.to("cpu")
    left = half(truth.gt_boxes.tensor.numpy(), truth.gt_classes.numpy(), None)
    right = half(kept.pred_boxes.tensor.numpy(), kept.pred_classes.numpy(), kept.scores.numpy())
    halves = (
        _with_title(left, f"ground truth ({len(ground_truth)})"),
        _with_title(right, f"predictions, score > {score_thresh:g} ({len(kept)})"),
    )
    gap = np.full((halves[0].shape[0], _GAP, 3), _PAPER, dtype=np.uint8)
    return np.concatenate((halves[0], gap, halves[1]), axis=1)


def _check(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[str],
    scores: np.ndarray | None,
    colors: Sequence[Color] | None,
) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"wanted an image (H, W, 3) of uint8, got {image.shape} of {image.dtype}")
    for name, values in (("labels", labels), ("scores", scores), ("colors", colors)):
        if values is not None and len(values) != len(boxes):
            raise ValueError(f"{len(boxes)} boxes, but {len(values)} {name}; wanted one for each")
    if not np.isfinite(boxes).all():
        raise ValueError(f"box {boxes[~np.isfinite(boxes).all(axis=1)][0]} is not finite")


@lru_cache(maxsize=8)
def text_font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font of all pictures, ``size`` pixels high."""
    # Matplotlib brings this font along, so pictures look the same on every machine.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)


def _area(boxes: np.ndarray) -> np.ndarray:
    return np.prod(np.maximum(boxes[..., 2:] - boxes[..., :2], 0), axis=-1)


def common_area(place: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(M,) areas that a rectangle (4,) has in common with others (M, 4), xyxy."""
    lower = np.maximum(place[:2], others[:, :2])
    upper = np.minimum(place[2:], others[:, 2:])
    return np.prod(np.maximum(upper - lower, 0), axis=1)


def _place_labels(
    texts: Sequence[str], boxes: np.ndarray, size: tuple[int, int]
) -> list[Rectangle]:
    """A rectangle for each text, as (x1, y1, x2, y2) inside a picture of (width, height)."""
    font = text_font(_TEXT_SIZE)
    ascent, descent = font.getmetrics()
    height = ascent + descent + 2
    places = np.zeros((len(texts), 4))
    small = boxes[_area(boxes) < 16 * height * height]
    # From the smallest box on: it has the least room around it that is surely its own.
    for index in reversed(range(len(texts))):
        width = font.getlength(texts[index]) + 2 * _PADDING if texts[index] else 0
        options = _label_options(boxes[index], width, height, size)
        hidden = np.array(
            [
                2 * common_area(option, places[index + 1 :]).sum()
                + common_area(option, small).sum()
                for option in options
            ]
        )
        costs = hidden + _RELUCTANCE * width * height
        places[index] = options[int(np.argmin(costs))]
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in places.tolist()]


def _label_options(
    box: np.ndarray, width: float, height: float, size: tuple[int, int]
) -> np.ndarray:
    """Places for a label of a box, in the order of _RELUCTANCE; all lie inside the picture."""
    x1, y1, x2, y2 = box
    above, below = y1 - height, y2 + 1
    corners = [(x1, above), (x1, y1), (x2 - width + 1, above), (x1, y2 - height + 1)]
    corners += [(x1, below), (x2 - width + 1, below), (x2 + 1, y1), (x1 - width, y1)]
    room = np.maximum(np.array(size) - (width, height), 0)
    lower = np.clip(np.array(corners), 0, room)
    return np.concatenate((lower, lower + np.array((width, height))), axis=1)


def _draw_label(draw: ImageDraw.ImageDraw, text: str, place: Rectangle, color: Color) -> None:
    x1, y1, x2, y2 = (round(value) for value in place)
    draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=color)
    brightness = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    ink = _INK if brightness > 150 else _PAPER
    draw.text((x1 + _PADDING, y1 + 1), text, fill=ink, font=text_font(_TEXT_SIZE))


def _with_title(panel: np.ndarray, title: str) -> np.ndarray:
    font = text_font(_TITLE_SIZE, bold=True)
    ascent, descent = font.getmetrics()
    strip = Image.new("RGB", (panel.shape[1], ascent + descent + 14), _PAPER)
    ImageDraw.Draw(strip).text((2, 7), title, fill=_INK, font=font)
    return np.concatenate((np.asarray(strip), panel), axis=0)
