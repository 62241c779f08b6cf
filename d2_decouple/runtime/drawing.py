# SPDX-License-Identifier: Apache-2.0
"""Boxes on images with OpenCV alone; :mod:`d2_decouple.visualization` draws finer ones."""

from collections.abc import Sequence

import cv2
import numpy as np

from .selection import Detections

__all__ = ["class_color", "draw_detections"]

_PALETTE = (  # red, green, blue
    (11, 138, 61),
    (23, 71, 209),
    (217, 4, 43),
    (224, 123, 0),
    (122, 31, 162),
    (0, 131, 143),
    (194, 24, 122),
    (107, 75, 27),
)
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_TEXT_SCALE = 0.45
_PADDING = 3  # pixels around a label's text


def class_color(label: int) -> tuple[int, int, int]:
    """(R, G, B) of a class; beyond the eighth they begin again."""
    return _PALETTE[label % len(_PALETTE)]


def draw_detections(
    image: np.ndarray, found: Detections, names: Sequence[str], *, scale: float = 1.0
) -> np.ndarray:
    """Labelled boxes on an enlarged copy of an image, the best on top.

    Args:
        image: (H, W, 3) RGB, uint8.
        found: boxes in pixels of ``image``.
        names: of the D detections.
        scale: enlargement of the picture; lines and text keep their size.

    Returns:
        (round(H * scale), round(W * scale), 3) RGB, uint8.
    """
    height, width = (max(round(side * scale), 1) for side in image.shape[:2])
    way = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
    picture = cv2.resize(image, (width, height), interpolation=way)
    frame = np.array([width / image.shape[1], height / image.shape[0]] * 2)
    corners = np.clip(np.rint(found.boxes * frame), 0, [width - 1, height - 1] * 2).astype(int)
    for index in reversed(range(len(names))):
        x1, y1, x2, y2 = corners[index].tolist()
        color = class_color(int(found.classes[index]))
        cv2.rectangle(picture, (x1, y1), (x2, y2), color, 2)
        text = f"{names[index]} {found.scores[index]:.2f}"
        (long, high), below = cv2.getTextSize(text, _FONT, _TEXT_SCALE, 1)
        left = max(min(x1, width - long - 2 * _PADDING), 0)
        top = max(y1 - high - below - 2 * _PADDING, 0)
        bottom = top + high + below + 2 * _PADDING
        cv2.rectangle(picture, (left, top), (left + long + 2 * _PADDING, bottom), color, -1)
        place = (left + _PADDING, bottom - below - _PADDING)
        cv2.putText(picture, text, place, _FONT, _TEXT_SCALE, (255, 255, 255), 1, cv2.LINE_AA)
    return picture
