# SPDX-License-Identifier: Apache-2.0
"""A picture in which every box can be found again by its colour."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

HEIGHT, WIDTH = 48, 64
# One red, one green and one blue rectangle on black: a box can be found again in the picture.
BOXES = [[4.0, 6.0, 20.0, 16.0], [30.0, 8.0, 40.0, 30.0], [44.0, 32.0, 60.0, 44.0]]


def picture(boxes: Any = BOXES) -> np.ndarray:
    """(H, W, 3) BGR: the first box is blue, the second green, the third red."""
    image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    for channel, box in enumerate(boxes):
        left, top, right, bottom = (int(x) for x in box)
        image[top:bottom, left:right, channel] = 250
    return image


def seen(boxes: Any = BOXES) -> T.AugInput:
    return T.AugInput(picture(boxes), boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4))


def where(image: np.ndarray, channel: int) -> list[int]:
    """The box around what shows a colour."""
    rows, columns = (image[:, :, channel] > 125).nonzero()
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def moved_together(sight: T.AugInput, tolerance: float) -> int:
    """Each box that is left lies around its own colour; how many these are."""
    size = sight.image.shape[:2]
    inside = np.clip(sight.boxes, 0, [size[1], size[0]] * 2)
    left = ((inside[:, 2:] - inside[:, :2]) > 2).all(1).nonzero()[0]
    for index in left:
        assert where(sight.image, index) == pytest.approx(inside[index].tolist(), abs=tolerance)
    return len(left)


def record_of(folder: Path) -> dict[str, Any]:
    """Detectron2's dict of the picture, written to a folder; its second object is a crowd."""
    file = folder / "image.png"
    Image.fromarray(picture()[:, :, ::-1]).save(file)
    objects = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 10 + index}
        for index, box in enumerate(BOXES)
    ]
    crowd = {**objects[0], "category_id": 99, "iscrowd": 1}
    return {
        "file_name": str(file),
        "image_id": "image",
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": [*objects[:1], crowd, *objects[1:]],
    }
