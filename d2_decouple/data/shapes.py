# SPDX-License-Identifier: Apache-2.0
"""A generated toy set: ``python -m d2_decouple.data.shapes DIR``.

Rectangles, circles and triangles in strong colours on a cloudy, grainy background, with exact
boxes. The same arguments give the same files, byte for byte, with the same versions of numpy and
Pillow.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from PIL import Image

from .loader import DataError

__all__ = ["SHAPES", "Layout", "main", "make_shapes"]

Layout: TypeAlias = Literal["voc", "coco"]
SHAPES = ("circle", "rectangle", "triangle")

_SIDES = (0.16, 0.5)  # of an object, in parts of the image's shorter side
_MAX_OBJECTS = 5
_ATTEMPTS = 50  # to place an object clear of the others
_GAP = 2  # pixels between two boxes
_FAINT = 0.18  # how much of a difficult object's colour is left


@dataclass(frozen=True)
class _Shape:
    """An object; ``box`` is xyxy in whole pixels, and exact: each side touches the shape."""

    kind: int
    box: tuple[int, int, int, int]
    difficult: bool


@dataclass(frozen=True)
class _Picture:
    """An image of the set; ``name`` is its file's, without the suffix."""

    name: str
    split: str
    pixels: np.ndarray
    shapes: list[_Shape]


def make_shapes(
    root: str | os.PathLike[str],
    *,
    images: int = 60,
    size: tuple[int, int] = (120, 160),
    seed: int = 0,
    layout: Layout = "voc",
    val_fraction: float = 0.25,
    negatives: float = 0.1,
    difficult: float = 0.05,
) -> Path:
    """Write a folder of images with objects of the classes SHAPES.

    In VOC's layout: Annotations, JPEGImages and ImageSets/Main with train and val. In COCO's:
    annotations/instances_train.json and instances_val.json, train and val. The images are PNG.

    Args:
        root: a new or empty folder.
        images: number of images, two or more; the last ones are those of val.
        size: (height, width) in pixels, 16 or more each.
        seed: of everything that is drawn.
        layout: "voc" or "coco".
        val_fraction: share of the images in val; each split gets one at least.
        negatives: share of images without objects, spread evenly.
        difficult: probability that an object is faint, and marked difficult (COCO: iscrowd).

    Returns:
        The folder.

    Raises:
        DataError: the folder is not empty, or an argument makes no sense.
    """
    folder = Path(root)
    if layout not in get_args(Layout):
        raise DataError(f"layout must be one of {', '.join(get_args(Layout))}, got {layout!r}")
    if images < 2 or min(size) < 16:
        raise DataError(
            f"wanted 2 or more images of 16 x 16 pixels or more, got {images} of {size}"
        )
    for name, share in (
        ("val_fraction", val_fraction),
        ("negatives", negatives),
        ("difficult", difficult),
    ):
        if not 0 <= share <= 1:
            raise DataError(f"{name} must lie between 0 and 1, got {share}")
    if folder.exists() and (not folder.is_dir() or next(folder.iterdir(), None) is not None):
        raise DataError(f"{folder} is not an empty folder; name a new one, or delete it first")
    first_of_val = images - min(max(round(val_fraction * images), 1), images - 1)
    write = _VOCWriter if layout == "voc" else _COCOWriter
    writer = write(folder)
    for index in range(images):
        # The numbers of one image do not depend on how many there are.
        random = np.random.default_rng((seed, index))
        empty = int((index + 1) * negatives) > int(index * negatives)
        pixels = _background(random, size)
        shapes = [] if empty else _draw_shapes(random, pixels, difficult)
        split = "train" if index < first_of_val else "val"
        writer.add(_Picture(f"shapes_{index:05d}", split, pixels, shapes))
    writer.finish()
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m d2_decouple.data.shapes", description=(__doc__ or "").split("\n\n")[1]
    )
    parser.add_argument("folder", metavar="DIR", help="a new or empty folder")
    parser.add_argument("--images", type=int, default=60, help="number of images (%(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=(120, 160), metavar=("H", "W"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", choices=get_args(Layout), default="voc")
    parser.add_argument("--val-fraction", type=float, default=0.25)
    parser.add_argument("--negatives", type=float, default=0.1)
    parser.add_argument("--difficult", type=float, default=0.05)
    options = vars(parser.parse_args(arguments))
    options["size"] = tuple(options["size"])
    try:
        folder = make_shapes(options.pop("folder"), **options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options['images']} images in {folder}")
    return 0


def _background(random: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8: smooth clouds of a pale colour, and grain."""
    coarse = random.integers(135, 210, (5, 6, 3), dtype=np.uint8)
    clouds = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
    grain = random.normal(0, 6, (*size, 1))
    return np.clip(np.asarray(clouds) + grain, 0, 255).astype(np.uint8)


def _draw_shapes(random: np.random.Generator, pixels: np.ndarray, difficult: float) -> list[_Shape]:
    """Draw one to _MAX_OBJECTS shapes that do not touch each other onto ``pixels``."""
    shapes: list[_Shape] = []
    for _ in range(int(random.integers(1, _MAX_OBJECTS + 1))):
        shape = _place(random, pixels.shape[:2], shapes)
        if shape is None:
            continue
        shape = replace(shape, difficult=bool(random.random() < difficult))
        _paint(random, pixels, shape)
        shapes.append(shape)
    return shapes


def _place(
    random: np.random.Generator, size: tuple[int, ...], others: Sequence[_Shape]
) -> _Shape | None:
    """A shape in a free place, or None if none was found."""
    height, width = size
    for _ in range(_ATTEMPTS):
        kind = int(random.integers(len(SHAPES)))
        w, h = (int(x) for x in np.rint(random.uniform(*_SIDES, 2) * min(size)))
        h = w if SHAPES[kind] == "circle" else h
        x, y = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
        box = (x, y, x + w, y + h)
        if all(_apart(box, other.box) for other in others):
            return _Shape(kind, box, difficult=False)
    return None


def _apart(box: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return (
        box[2] + _GAP <= other[0]
        or other[2] + _GAP <= box[0]
        or box[3] + _GAP <= other[1]
        or other[3] + _GAP <= box[1]
    )


def _paint(random: np.random.Generator, pixels: np.ndarray, shape: _Shape) -> None:
    x1, y1, x2, y2 = shape.box
    inside = _mask(SHAPES[shape.kind], y2 - y1, x2 - x1)
    # One channel is dark and one is strong, so that no colour is the background's.
    color = random.permutation(
        [random.integers(0, 60), random.integers(0, 256), random.integers(180, 256)]
    ).astype(float)
    opacity = _FAINT if shape.difficult else 1.0
    place = pixels[y1:y2, x1:x2]
    mixed = place * (1 - opacity) + (color + random.normal(0, 5, place.shape)) * opacity
    place[inside] = np.clip(mixed, 0, 255).astype(np.uint8)[inside]


def _mask(kind: str, height: int, width: int) -> np.ndarray:
    """(H, W) bool, which touches all four sides."""
    # Middles of the pixels, from -1 to 1 at the outermost ones.
    y = np.linspace(-1, 1, height)[:, None]
    x = np.linspace(-1, 1, width)[None]
    if kind == "circle":
        return x**2 + y**2 <= 1 + 1 / min(height, width)
    if kind == "triangle":
        # At least a pixel wide at its tip, which lies in the middle of the upper side.
        return np.abs(x) <= np.maximum((y + 1) / 2, 1.01 / (width - 1))
    return np.ones((height, width), dtype=bool)


class _VOCWriter:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ids: dict[str, list[str]] = {"train": [], "val": []}
        for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (folder / name).mkdir(parents=True)

    def add(self, picture: _Picture) -> None:
        height, width, _ = picture.pixels.shape
        objects = "".join(
            f"<object><name>{SHAPES[shape.kind]}</name><difficult>{int(shape.difficult)}"
            # Counted from 1, both corners inside.
            f"</difficult><bndbox><xmin>{shape.box[0] + 1}</xmin><ymin>{shape.box[1] + 1}</ymin>"
            f"<xmax>{shape.box[2]}</xmax><ymax>{shape.box[3]}</ymax></bndbox></object>\n"
            for shape in picture.shapes
        )
        text = (
            f"<annotation>\n<filename>{picture.name}.png</filename>\n<size><width>{width}</width>"
            f"<height>{height}</height><depth>3</depth></size>\n{objects}</annotation>\n"
        )
        (self._folder / "Annotations" / f"{picture.name}.xml").write_text(text, newline="\n")
        Image.fromarray(picture.pixels).save(self._folder / "JPEGImages" / f"{picture.name}.png")
        self._ids[picture.split].append(picture.name)

    def finish(self) -> None:
        for split, ids in self._ids.items():
            file = self._folder / "ImageSets" / "Main" / f"{split}.txt"
            file.write_text("\n".join(ids) + "\n", newline="\n")


class _COCOWriter:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        categories = [{"id": index + 1, "name": name} for index, name in enumerate(SHAPES)]
        self._content: dict[str, dict[str, Any]] = {
            split: {"info": {}, "images": [], "annotations": [], "categories": categories}
            for split in ("train", "val")
        }
        for name in ("annotations", *self._content):
            (folder / name).mkdir(parents=True)

    def add(self, picture: _Picture) -> None:
        content = self._content[picture.split]
        height, width, _ = picture.pixels.shape
        name = f"{picture.name}.png"
        index = len(content["images"]) + 1
        content["images"].append({"id": index, "file_name": name, "height": height, "width": width})
        for shape in picture.shapes:
            x1, y1, x2, y2 = shape.box
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": index,
                    "category_id": shape.kind + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": int(shape.difficult),
                }
            )
        Image.fromarray(picture.pixels).save(self._folder / picture.split / name)

    def finish(self) -> None:
        for split, content in self._content.items():
            file = self._folder / "annotations" / f"instances_{split}.json"
            file.write_text(json.dumps(content), newline="\n")


if __name__ == "__main__":
    sys.exit(main())
