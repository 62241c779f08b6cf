# SPDX-License-Identifier: Apache-2.0
"""What an evaluation compares: the objects of a data set, and the detections in its images.

Boxes are absolute xyxy pixels of the image as it is on disk; classes count from 0 in the order of
the data set's ``thing_classes``, whatever ids its files use.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

__all__ = [
    "EvaluationError",
    "GroundTruth",
    "ImageDetections",
    "ImageId",
    "ImageTruth",
    "read_ground_truth",
]

ImageId: TypeAlias = int | str

_logger = logging.getLogger(__name__)


class EvaluationError(ValueError):
    """Detections or ground truth that cannot be evaluated; the message names the image."""


class ImageDetections(NamedTuple):
    """What was found in one image: boxes (M, 4), scores (M,), classes (M,)."""

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray


class ImageTruth(NamedTuple):
    """The objects of one image: boxes (M, 4), classes (M,), crowds (M,) bool, areas (M,).

    A crowd need not be found, and what lies on it is not counted as false. Areas are the files'
    own (COCO's are those of the masks) and decide who is small, medium or large.
    """

    boxes: np.ndarray
    classes: np.ndarray
    crowds: np.ndarray
    areas: np.ndarray


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """The objects of a data set.

    Attributes:
        class_names: K names.
        dataset_ids: K ids that the data set's own files use for the classes.
        images: objects by image id, ids in ascending order.
        annotated: whether there are annotations at all; test sets of a challenge have none.
    """

    class_names: tuple[str, ...]
    dataset_ids: tuple[int, ...]
    images: Mapping[ImageId, ImageTruth]
    annotated: bool = True

    def count_objects(self) -> np.ndarray:
        """(K,) how many objects each class has, without crowds."""
        counts = np.zeros(len(self.class_names), dtype=np.int64)
        for image in self.images.values():
            np.add.at(counts, image.classes[~image.crowds], 1)
        return counts


def read_ground_truth(dataset_name: str) -> GroundTruth:
    """Read the objects of a registered data set, anew at each call.

    They come from the COCO file that the set's metadata name (``json_file``), as its published
    numbers do, else from its dicts in Detectron2's catalog. There an object with ``iscrowd`` is
    a crowd (VOC's difficult ones are), and its area is ``area`` or else that of its box.

    Raises:
        EvaluationError: an object without a known class or a sound box, two images with one id,
            or a set without ``thing_classes``.
    """
    json_file = MetadataCatalog.get(dataset_name).get("json_file")
    if json_file:
        return _from_json(dataset_name, json_file)
    return _from_catalog(dataset_name)


def _from_json(dataset_name: str, json_file: str) -> GroundTruth:
    with PathManager.open(json_file) as file:
        content = json.load(file)
    metadata = MetadataCatalog.get(dataset_name)
    names = {item["id"]: item["name"] for item in content["categories"]}
    # Detectron2 fills this in when the set is loaded; before that, it numbers them in this way.
    to_class = metadata.get("thing_dataset_id_to_contiguous_id") or {
        category: index for index, category in enumerate(sorted(names))
    }
    ids = sorted(to_class, key=lambda category: to_class[category])
    class_names = metadata.get("thing_classes") or [names[category] for category in ids]
    _require_classes(dataset_name, class_names, len(ids))
    objects: dict[ImageId, list[tuple[Any, ...]]] = {}
    for image in content["images"]:
        _add_image(objects, image["id"], json_file)
    unknown = set()
    for item in content.get("annotations", ()):
        if item["category_id"] not in to_class:
            unknown.add(item["category_id"])
            continue
        if item["image_id"] not in objects:
            raise EvaluationError(
                f"{json_file}: an annotation names image {item['image_id']!r}, which is not among "
                "its images; correct the file"
            )
        box = _xyxy(item["bbox"], BoxMode.XYWH_ABS)
        area = item.get("area")
        objects[item["image_id"]].append(
            (box, to_class[item["category_id"]], item.get("iscrowd", 0), area)
        )
    if unknown:
        _logger.warning(
            "%s: objects of categories %s are not evaluated: the metadata of %r do not have them",
            json_file,
            sorted(unknown),
            dataset_name,
        )
    return GroundTruth(
        class_names=tuple(class_names),
        dataset_ids=tuple(ids),
        images=_arrays(objects, len(ids), json_file),
        annotated="annotations" in content,
    )


def _from_catalog(dataset_name: str) -> GroundTruth:
    records = DatasetCatalog.get(dataset_name)
    # Only now: some sets learn their classes while they are read.
    metadata = MetadataCatalog.get(dataset_name)
    class_names = metadata.get("thing_classes")
    if not class_names:
        raise EvaluationError(
            f"data set {dataset_name!r} names no classes; type MetadataCatalog.get("
            f"{dataset_name!r}).thing_classes = [...] after registering it"
        )
    to_class = metadata.get("thing_dataset_id_to_contiguous_id") or {
        index: index for index in range(len(class_names))
    }
    _require_classes(dataset_name, class_names, len(to_class))
    where = f"data set {dataset_name!r}"
    objects: dict[ImageId, list[tuple[Any, ...]]] = {}
    for record in records:
        if "image_id" not in record:
            raise EvaluationError(
                f"{where}: the record of {record.get('file_name')} has no image_id; give each "
                "image a number or a name of its own"
            )
        _add_image(objects, record["image_id"], where)
        objects[record["image_id"]] = [
            (
                _xyxy(item["bbox"], item["bbox_mode"]),
                item["category_id"],
                item.get("iscrowd", 0),
                item.get("area"),
            )
            for item in record.get("annotations", ())
        ]
    return GroundTruth(
        class_names=tuple(class_names),
        dataset_ids=tuple(sorted(to_class, key=lambda category: to_class[category])),
        images=_arrays(objects, len(class_names), where),
        annotated=any("annotations" in record for record in records),
    )


def _xyxy(box: Sequence[float], mode: BoxMode) -> np.ndarray:
    # As an array: of a list, Detectron2 would make single precision.
    return BoxMode.convert(np.array([box], dtype=np.float64), mode, BoxMode.XYXY_ABS)[0]


def _require_classes(dataset_name: str, class_names: Iterable[str], ids: int) -> None:
    names = list(class_names)
    if len(names) != ids:
        raise EvaluationError(
            f"data set {dataset_name!r} has {ids} category ids, but {len(names)} thing_classes "
            f"({', '.join(names[:10])}); correct its metadata"
        )


def _add_image(objects: dict[ImageId, list[tuple[Any, ...]]], image: ImageId, where: str) -> None:
    if image in objects:
        raise EvaluationError(f"{where}: two images have the id {image!r}; give each its own")
    objects[image] = []


def _arrays(
    objects: Mapping[ImageId, list[tuple[Any, ...]]], num_classes: int, where: str
) -> dict[ImageId, ImageTruth]:
    truth = {}
    for image in _ascending(objects):
        boxes = np.array([box for box, *_ in objects[image]], dtype=np.float64).reshape(-1, 4)
        classes = np.array([item[1] for item in objects[image]], dtype=np.int64)
        crowds = np.array([item[2] for item in objects[image]], dtype=bool)
        sides = boxes[:, 2:] - boxes[:, :2]
        wrong = ~np.isfinite(boxes).all(axis=1) | (sides < 0).any(axis=1)
        if wrong.any():
            raise EvaluationError(
                f"{where}, image {image!r}: box {boxes[wrong][0].tolist()} (x1, y1, x2, y2) of an "
                "object is no box; correct the annotation"
            )
        outside = (classes < 0) | (classes >= num_classes)
        if outside.any():
            raise EvaluationError(
                f"{where}, image {image!r}: an object has the class id {classes[outside][0]}, "
                f"wanted 0 to {num_classes - 1}; correct the annotation, or name the class in "
                "thing_classes"
            )
        given = [item[3] for item in objects[image]]
        own = sides.prod(axis=1)
        areas = np.array([a if a is not None else b for a, b in zip(given, own, strict=True)])
        truth[image] = ImageTruth(boxes, classes, crowds, areas.astype(np.float64))
    return truth


def _ascending(ids: Iterable[ImageId]) -> list[ImageId]:
    """COCO's order, which decides between equal scores; numbers come before names."""
    return sorted(ids, key=lambda image: (isinstance(image, str), image))
