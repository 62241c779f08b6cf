# SPDX-License-Identifier: Apache-2.0
"""Annotations in the format of COCO, as datasets of Detectron2.

Stricter than Detectron2's own loader about what would silently go wrong, and wider about what is
sound: category ids may have gaps, start at 0 and come in any order, ids of images may be texts,
and keys that detection does not need may be missing. Registering reads nothing.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from .foreign import LARGEST_SIDE, brief, read_json, unusable_name
from .loader import DataError
from .records import (
    Part,
    contained,
    data_path,
    existing_folder,
    keep_inside,
    refuse_duplicates,
    register_source,
    require_images,
)

__all__ = ["COCOContent", "COCOSource", "load_coco", "read_coco", "register_coco"]

_TABLES = ("images", "annotations", "categories")

_Kinds: TypeAlias = Mapping[str, type | tuple[type, ...]]


def load_coco(
    json_file: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Read a COCO file as Detectron2 dataset dicts, in the order of the images' ids.

    Boxes become absolute xyxy pixels with the origin at the image's upper left corner. Those that
    reach beyond their image are cut, those without area inside it (a negative size, too) or with a
    NaN or infinite coordinate dropped; one warning counts them all. ``iscrowd`` is kept, and an
    annotation to ``ignore`` becomes a crowd. Images without annotations are kept, with an empty
    list. Polygons, masks and keypoints are left out; ``area``, the mask's where the file says it,
    stays for the evaluation, if it is positive.

    Args:
        json_file: with ``images``, ``annotations`` and ``categories``. In both paths a leading
            ``$DETECTRON2_DATASETS`` stands for that variable's folder, ``datasets`` if unset.
        image_root: the folder that the images' ``file_name`` start from.
        classes: class names in the order of their ids; by default the declared categories in the
            order of theirs. A category that is not among them must have no annotation.

    Raises:
        FileNotFoundError: the file, the folder or images are missing.
        DataError: the file is not COCO; an id comes twice or is not declared; a ``file_name``
            leads out of the folder; there are no images.
    """
    names = None if classes is None else tuple(classes)
    return COCOSource("", os.fspath(json_file), os.fspath(image_root), names)()


def register_coco(
    name: str,
    json_file: str | os.PathLike[str],
    image_root: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
) -> None:
    """Make a COCO file known to Detectron2 under ``name``; see :func:`load_coco`.

    Nothing is read before somebody asks for the images; without ``classes`` the metadata know
    them only then. Registering the same set twice does nothing; another set under a name in use
    is an error.
    """
    names = None if classes is None else tuple(classes)
    register_source(COCOSource(name, os.fspath(json_file), os.fspath(image_root), names))


@dataclass(frozen=True)
class COCOSource:
    """What the catalog calls for a COCO file; ``part`` takes a part of its images."""

    name: str
    json_file: str
    image_root: str
    classes: tuple[str, ...] | None
    part: Part | None = None

    def __call__(self) -> list[dict[str, Any]]:
        """Dataset dicts, see :func:`load_coco`."""
        with _no_collection():
            return keep_inside(self.read(), self._what())

    def read(self, content: COCOContent | None = None) -> list[dict[str, Any]]:
        """The same with the boxes as annotated; ``content`` spares reading the file again."""
        content = content or read_coco(self.json_file)
        folder = existing_folder(self.image_root)
        classes, ids = content.class_ids(self.classes)
        if self.name:
            MetadataCatalog.get(self.name).set(
                thing_classes=list(classes), thing_dataset_id_to_contiguous_id=ids
            )
        records = content.records(folder, ids, self.part)
        require_images(records, self._what())
        return records

    def _what(self) -> str:
        part = {None: "", True: ", held-out part", False: ", training part"}[
            None if self.part is None else self.part.held_out
        ]
        return f"{self.json_file}{part}"

    def __repr__(self) -> str:
        classes = "those declared" if self.classes is None else ", ".join(self.classes)
        part = "" if self.part is None else f", {self.part!r}"
        return (
            f"COCO file {self.json_file!r}, images in {self.image_root!r}, classes {classes}{part}"
        )


@dataclass(frozen=True)
class COCOContent:
    """A COCO file whose ids are sound: each declared once, and none used that is not declared.

    Attributes:
        file: it was read from.
        images: as in the file, ordered by id.
        annotations: by image id, as in the file.
        categories: name by id, ordered by id.
        parents: by id of a category, its ``supercategory``.
    """

    file: Path
    images: list[dict[str, Any]]
    annotations: dict[Any, list[dict[str, Any]]]
    categories: dict[int, str]
    parents: dict[int, str]

    def used(self) -> set[int]:
        """Ids of the categories that have an annotation."""
        return {item["category_id"] for items in self.annotations.values() for item in items}

    def class_ids(self, classes: tuple[str, ...] | None) -> tuple[tuple[str, ...], dict[int, int]]:
        """Class names, and the position of each category id among them.

        Raises:
            DataError: ``classes`` lacks a category with annotations, or has one not declared.
        """
        if classes is None:
            return tuple(self.categories.values()), {x: i for i, x in enumerate(self.categories)}
        names = set(self.categories.values())
        used = self.used()
        surplus = [x for i, x in self.categories.items() if i in used and x not in classes]
        missing = [x for x in classes if x not in names]
        if surplus or missing:
            wrong = [f"has the surplus {', '.join(surplus)}"] if surplus else []
            wrong += [f"lacks {', '.join(missing)}"] if missing else []
            raise DataError(
                f"{self.file} {' and '.join(wrong)}; wanted the classes {', '.join(classes)}: "
                "correct its categories, or name its own classes"
            )
        return classes, {i: classes.index(x) for i, x in self.categories.items() if x in classes}

    def records(
        self, folder: Path, ids: dict[int, int], part: Part | None = None
    ) -> list[dict[str, Any]]:
        """Dataset dicts of the images, or of a part of them; boxes as annotated, but xyxy."""
        # By name: ids may be given anew when annotations are exported again.
        names = _part_names([image["file_name"] for image in self.images])
        chosen = set(names if part is None or not names else part.choose(names))
        images = [x for x, name in zip(self.images, names, strict=True) if name in chosen]
        try:
            with _no_collection():
                return [self._record(image, folder, ids) for image in images]
        except OverflowError as error:
            raise DataError(f"{self.file}: a number of a box is out of range ({error})") from error

    def _record(self, image: dict[str, Any], folder: Path, ids: dict[int, int]) -> dict[str, Any]:
        return {
            "file_name": image_path(folder, image["file_name"]),
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "annotations": [_object(item, ids) for item in self.annotations.get(image["id"], ())],
        }


def image_path(folder: str | os.PathLike[str], name: str) -> str:
    """Where an image lies; its ``file_name`` may have been written on Windows."""
    path = os.path.join(folder, name)
    if "\\" in name and not os.path.isfile(path):
        return os.path.join(folder, name.replace("\\", "/"))
    return path


def _part_names(files: list[str]) -> list[str]:
    """What a part is chosen by: names without suffix, where they tell the images apart.

    So the same images are held out as of a VOC or YOLO folder, which know them by that name.
    """
    short = [os.path.splitext(file)[0] for file in files]
    return short if len(set(short)) == len(set(files)) else files


def read_coco(json_file: str | os.PathLike[str]) -> COCOContent:
    """Read a COCO file and check its ids; see :func:`load_coco` for the errors."""
    file = data_path(json_file)
    tables = _tables(file)
    categories = tables["categories"]
    for entry in categories:
        _require(entry, {"id": int, "name": str}, f"{file}: a category")
        if not entry["name"].strip():
            raise DataError(f"{file}: category {entry['id']} has no name; write one")
        if reason := unusable_name(entry["name"]):
            raise DataError(f"{file}: category {entry['id']} needs another name: {reason}")
    categories = sorted(categories, key=lambda entry: entry["id"])
    for key in ("id", "name"):
        refuse_duplicates(
            (entry[key] for entry in categories),
            f"{file}: {key}s of categories",
            "give each category its own, and correct the annotations that use it",
        )
    images = sorted(_images(tables["images"], file), key=lambda x: (str(type(x["id"])), x["id"]))
    names = {entry["id"]: entry["name"] for entry in categories}
    return COCOContent(
        file=file,
        images=images,
        annotations=_annotations(tables["annotations"], {x["id"] for x in images}, names, file),
        categories=names,
        parents={entry["id"]: _parent(entry) for entry in categories},
    )


def _parent(category: dict[str, Any]) -> str:
    name = category.get("supercategory", "")
    return str(name) if isinstance(name, str | int) else ""


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's search for cycles stands still: it goes through all of a million new dicts often.

    A set of COCO's size is read in half the time. Nothing here makes a cycle.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _tables(file: Path) -> dict[str, list[Any]]:
    if not file.is_file():
        raise FileNotFoundError(f"no annotations {file}; put the COCO file there")
    with _no_collection():
        content = read_json(file)
    if not isinstance(content, dict) or any(
        not isinstance(content.get(key), list) for key in _TABLES
    ):
        got = type(content).__name__
        if isinstance(content, dict):
            got = ", ".join(key[:40] for key in islice(content, 8))
        raise DataError(
            f"{file} is not in COCO's format: got {got or 'an empty object'}, wanted an object "
            f"with the lists {', '.join(_TABLES)}"
        )
    return {key: content[key] for key in _TABLES}


def _require(entry: Any, kinds: _Kinds, what: str) -> None:
    for key, kind in kinds.items():
        value = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            wanted = " or ".join(x.__name__ for x in (kind if isinstance(kind, tuple) else (kind,)))
            raise DataError(
                f"{what} has {key} {brief(value)}, wanted {wanted}; the entry: {brief(entry)}"
            )


def _images(images: list[Any], file: Path) -> list[dict[str, Any]]:
    kinds: _Kinds = {"id": (int, str), "file_name": str, "width": int, "height": int}
    for image in images:
        _require(image, kinds, f"{file}: an image")
        contained(image["file_name"], f"{file}: file_name of image {image['id']!r}")
        sides = image["width"], image["height"]
        if not all(1 <= side <= LARGEST_SIDE for side in sides):
            raise DataError(
                f"{file}: image {image['file_name']!r} is {' x '.join(map(brief, sides))}, "
                "wanted its size in pixels"
            )
    refuse_duplicates(
        (image["id"] for image in images),
        f"{file}: ids of images",
        "give each image its own, and correct the annotations that use it",
    )
    return images


def _annotations(
    annotations: list[Any], images: set[Any], names: dict[int, str], file: Path
) -> dict[Any, list[dict[str, Any]]]:
    kinds: _Kinds = {"image_id": (int, str), "category_id": int, "bbox": list}
    by_image: dict[Any, list[dict[str, Any]]] = {}
    for item in annotations:
        which = item.get("id") if isinstance(item, dict) else None
        if not isinstance(which, int | str | None):
            raise DataError(f"{file}: an annotation has id {brief(which)}, wanted int or str")
        _require(item, kinds, f"{file}: annotation {which!r}")
        if item["category_id"] not in names:
            known = ", ".join(f"{key} {name}" for key, name in names.items())
            raise DataError(
                f"{file}: annotation {which!r} names category {brief(item['category_id'])}, which "
                f"is not declared; declared are: {known or 'none'}; add it to the categories, or "
                "correct the annotation"
            )
        if item["image_id"] not in images:
            raise DataError(
                f"{file}: annotation {which!r} names image {item['image_id']!r}, which is not "
                f"among the {len(images)} images; add the image, or take the annotation out"
            )
        if len(item["bbox"]) != 4 or not all(isinstance(x, int | float) for x in item["bbox"]):
            raise DataError(
                f"{file}: annotation {which!r} has bbox {brief(item['bbox'])}, wanted four "
                "numbers: x, y, width, height"
            )
        for key in ("iscrowd", "ignore"):
            if item.get(key) not in (None, 0, 1):  # "0" would count as true
                raise DataError(
                    f"{file}: annotation {which!r} has {key} {brief(item[key])}, wanted 0 or 1"
                )
        by_image.setdefault(item["image_id"], []).append(item)
    refuse_duplicates(
        (item["id"] for item in annotations if item.get("id") is not None),
        f"{file}: ids of annotations",
        "give each annotation its own",
    )
    return by_image


def _object(item: dict[str, Any], ids: dict[int, int]) -> dict[str, Any]:
    x, y, width, height = item["bbox"]
    found = {
        "bbox": [float(x), float(y), float(x + width), float(y + height)],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": ids[item["category_id"]],
        "iscrowd": int(bool(item.get("iscrowd")) or bool(item.get("ignore"))),
    }
    area = item.get("area")
    # Some tools write 0, which would make each object a small one.
    if isinstance(area, int | float) and 0 < area < math.inf:
        found["area"] = float(area)
    return found
