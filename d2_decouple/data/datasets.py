# SPDX-License-Identifier: Apache-2.0
"""Folders in the layout of Pascal VOC, as datasets of Detectron2.

A folder holds ``Annotations/ID.xml``, ``JPEGImages/ID.jpg`` and ``ImageSets/Main/SPLIT.txt`` with
one ID a line. Registering reads nothing: a recipe can name a set that is not on this machine, and
the first one who asks for its images is told where they were looked for.
"""

from __future__ import annotations

import logging
import math
import os
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import convert_to_coco_json
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import BoxMode, Instances

from ..config import nearest

__all__ = [
    "BCCD_CLASSES",
    "coco_evaluator",
    "ground_truth",
    "load_voc",
    "register_bccd",
    "register_voc",
    "require_dataset",
]

BCCD_CLASSES = ("RBC", "WBC", "Platelets")

_logger = logging.getLogger(__name__)
_DATASETS_VARIABLE = "DETECTRON2_DATASETS"
_DATASETS_PREFIX = f"${_DATASETS_VARIABLE}"
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def load_voc(
    root: str | os.PathLike[str], split: str, classes: Sequence[str]
) -> list[dict[str, Any]]:
    """Read one split of a VOC folder as Detectron2 dataset dicts.

    Boxes are absolute xyxy pixels with the origin at the image's upper left corner. VOC counts
    pixels from 1 and includes both corners, so (1, 1, W, H) is the whole image and becomes
    (0, 0, W, H): one is taken from the first corner and none from the second. Sets that count
    from 0 would start at -1 and are clipped to 0. The image size is the annotation's. Boxes that
    reach beyond it are cut, those without area inside it dropped; one warning counts both.

    ``difficult`` objects become ``iscrowd=1``. VOC asks neither to find nor to miss them, and
    crowds are what Detectron2 has for that: its mapper takes them out of the training targets
    (their place counts as background), and COCO's evaluation neither demands them nor counts a
    detection that lies on one as false.

    Args:
        root: the folder that holds Annotations, ImageSets and JPEGImages. A leading
            ``$DETECTRON2_DATASETS`` stands for that variable's folder, ``datasets`` if unset.
        split: a file name in ImageSets/Main, without its suffix.
        classes: class names in the order of their ids.

    Raises:
        FileNotFoundError: the folder, the split, an annotation or images are missing.
        ValueError: an annotation cannot be read, or names an unknown class.
    """
    folder = _existing_root(root)
    ids = {name: index for index, name in enumerate(classes)}
    records = [_load_image(folder, image_id, ids) for image_id in _split_ids(folder, split)]
    missing = [x["file_name"] for x in records if not os.path.isfile(x["file_name"])]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(records)} images of split {split!r} are missing, the "
            f"first is {missing[0]}; put them there, or take their ids out of the split"
        )
    _keep_inside(records, folder, split)
    return records


def _keep_inside(records: list[dict[str, Any]], folder: Path, split: str) -> None:
    """Cut boxes to their image and drop those without area, in place; say so once."""
    cut: list[str] = []
    dropped: list[str] = []
    for record in records:
        limits = np.array([record["width"], record["height"]] * 2, dtype=float)
        kept = []
        for item in record["annotations"]:
            box = np.minimum(item["bbox"], limits)
            if (box[2:] <= box[:2]).any():
                dropped.append(record["image_id"])
                continue
            if (box != item["bbox"]).any():
                cut.append(record["image_id"])
            kept.append({**item, "bbox": box.tolist()})
        record["annotations"] = kept
    for count, what in (
        (cut, "reach beyond their image and are cut"),
        (dropped, "have no area and are dropped"),
    ):
        if count:
            _logger.warning(
                "%s, split %r: %d boxes %s, the first in %s",
                folder,
                split,
                len(count),
                what,
                count[0],
            )


def register_voc(
    name: str,
    root: str | os.PathLike[str],
    split: str,
    *,
    classes: Sequence[str] | None = None,
) -> None:
    """Make a split of a VOC folder known to Detectron2 under ``name``; see :func:`load_voc`.

    Nothing is read before somebody asks for the images. Registering the same set twice does
    nothing; another set under a name in use is an error. Without ``classes`` they are the sorted
    names in *all* annotations of the folder, not in this split's alone: a class that is rare
    enough to be missing from one split would shift the ids of the others. The metadata know
    such classes only after the images were asked for.
    """
    source = _VOCSource(name, os.fspath(root), split, None if classes is None else tuple(classes))
    if name in DatasetCatalog:
        known = DatasetCatalog[name]
        if known != source:
            raise ValueError(
                f"dataset {name!r} is already registered as {known!r} and cannot become "
                f"{source!r}; choose another name, or call DatasetCatalog.remove({name!r}) and "
                f"MetadataCatalog.remove({name!r}) first"
            )
        return
    DatasetCatalog.register(name, source)
    metadata = MetadataCatalog.get(name).set(evaluator_type="coco", split=split)
    if classes is not None:
        metadata.set(thing_classes=list(classes))


def register_bccd() -> None:
    """Register the blood cells: ``bccd_train`` (its trainval), ``bccd_test``, ``bccd_mini_*``.

    The full set is looked for in ``$DETECTRON2_DATASETS/BCCD``. The mini set of 60 images comes
    with a checkout; a wheel does not carry it and looks in ``$DETECTRON2_DATASETS/bccd_mini``.
    """
    full = f"{_DATASETS_PREFIX}/BCCD"
    register_voc("bccd_train", full, "trainval", classes=BCCD_CLASSES)
    register_voc("bccd_test", full, "test", classes=BCCD_CLASSES)
    checkout = Path(__file__).resolve().parents[2] / "tests" / "data" / "bccd_mini"
    mini = str(checkout) if checkout.is_dir() else f"{_DATASETS_PREFIX}/bccd_mini"
    register_voc("bccd_mini_train", mini, "train", classes=BCCD_CLASSES)
    register_voc("bccd_mini_val", mini, "val", classes=BCCD_CLASSES)


def require_dataset(name: str) -> None:
    """Raise ValueError, naming the nearest known dataset, unless ``name`` is registered."""
    if name in DatasetCatalog:
        return
    raise ValueError(
        f"unknown dataset {name!r}; {nearest(name, DatasetCatalog.list())} To add a folder in VOC "
        "format: from d2_decouple.data import register_voc; "
        f"register_voc({name!r}, 'FOLDER', 'SPLIT', classes=[...]); for COCO format use "
        "detectron2.data.datasets.register_coco_instances"
    )


def ground_truth(record: dict[str, Any]) -> Instances:
    """The objects of a dataset dict, without crowds, in pixels of the image as it is on disk.

    Returns:
        ``gt_boxes`` (M, 4) absolute xyxy pixels and ``gt_classes`` (M,).
    """
    objects = [item for item in record["annotations"] if not item.get("iscrowd", 0)]
    return annotations_to_instances(objects, (record["height"], record["width"]))


def coco_evaluator(*, dataset_name: str, output_dir: str, **options: Any) -> COCOEvaluator:
    """Detectron2's ``COCOEvaluator``, which never measures against an earlier run's annotations.

    For a set without a COCO file Detectron2 writes one into ``output_dir``, takes an old one it
    finds there for good, and remembers the path for the whole process, even for an evaluator
    with another ``output_dir``. So an edited annotation would not count, and an output folder
    deleted between two evaluations would stop the second. Here sets of :func:`register_voc` are
    converted anew for each evaluator; other sets are left to Detectron2.
    """
    require_dataset(dataset_name)
    if not isinstance(DatasetCatalog[dataset_name], _VOCSource):
        return COCOEvaluator(dataset_name, output_dir=output_dir, **options)
    # Metadata refuse a second value for a key, so the path is put in and taken out by hand.
    metadata = vars(MetadataCatalog.get(dataset_name))
    json_file = os.path.join(output_dir, f"{dataset_name}_coco_format.json")
    convert_to_coco_json(dataset_name, json_file, allow_cached=False)
    metadata["json_file"] = json_file
    try:
        return COCOEvaluator(dataset_name, output_dir=output_dir, **options)
    finally:
        del metadata["json_file"]


@dataclass(frozen=True)
class _VOCSource:
    """What the catalog calls; equal when it would give the same images."""

    name: str
    root: str
    split: str
    classes: tuple[str, ...] | None

    def __call__(self) -> list[dict[str, Any]]:
        classes = self.classes
        if classes is None:
            classes = _annotated_classes(_existing_root(self.root))
            MetadataCatalog.get(self.name).set(thing_classes=list(classes))
        return load_voc(self.root, self.split, classes)

    def __repr__(self) -> str:
        classes = "those annotated" if self.classes is None else ", ".join(self.classes)
        return f"VOC folder {self.root!r}, split {self.split!r}, classes {classes}"


class _NoDoctype(ET.TreeBuilder):
    """Refuses the declaration that every entity needs, before expat reads on into it."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> NoReturn:
        raise ValueError("a DOCTYPE (and with it entities) is not accepted in annotations")


def _existing_root(root: str | os.PathLike[str]) -> Path:
    text = os.fspath(root)
    value = os.environ.get(_DATASETS_VARIABLE)
    if text == _DATASETS_PREFIX or text.startswith(f"{_DATASETS_PREFIX}/"):
        text = (value or "datasets") + text[len(_DATASETS_PREFIX) :]
    folder = Path(text).expanduser().absolute()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no dataset folder {folder} ({_DATASETS_VARIABLE} is "
            f"{'not set' if value is None else repr(value)}); put {folder.name!r} there, or type: "
            f"export {_DATASETS_VARIABLE}=FOLDER, with the folder that holds {folder.name!r}"
        )
    return folder


def _split_ids(folder: Path, split: str) -> list[str]:
    listing = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not listing.is_file():
        known = sorted(file.stem for file in listing.parent.glob("*.txt"))
        raise FileNotFoundError(
            f"no split {split!r}: {listing} is missing; "
            f"splits found there: {', '.join(known) or 'none'}"
        )
    # VOC's own per-class lists have a second column (1, 0, -1), which is of no use here.
    return [line.split()[0] for line in listing.read_text().splitlines() if line.strip()]


def _parse(file: Path) -> ET.Element:
    if not file.is_file():
        raise FileNotFoundError(f"annotation {file} is missing, though its split lists {file.stem}")
    try:
        return ET.parse(file, ET.XMLParser(target=_NoDoctype())).getroot()
    except (ET.ParseError, ValueError) as error:
        raise ValueError(f"cannot read annotation {file}: {error}") from error


def _number(element: ET.Element, path: str, file: Path) -> float:
    text = element.findtext(path)
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"{file}: <{path}> is {text!r}, wanted a number that is finite; correct it"
        )
    return value


def _load_image(folder: Path, image_id: str, ids: dict[str, int]) -> dict[str, Any]:
    file = folder / "Annotations" / f"{image_id}.xml"
    root = _parse(file)
    suffix = Path(root.findtext("filename") or "").suffix or ".jpg"
    return {
        "file_name": str(folder / "JPEGImages" / f"{image_id}{suffix}"),
        "image_id": image_id,
        "height": int(_number(root, "size/height", file)),
        "width": int(_number(root, "size/width", file)),
        "annotations": [_load_object(item, file, ids) for item in root.iterfind("object")],
    }


def _load_object(item: ET.Element, file: Path, ids: dict[str, int]) -> dict[str, Any]:
    name = (item.findtext("name") or "").strip()
    if name not in ids:
        raise ValueError(
            f"{file}: unknown class {name!r}; known classes: {', '.join(ids)}; correct the file, "
            "or register the dataset with a list of classes that has it"
        )
    x1, y1, x2, y2 = (_number(item, f"bndbox/{corner}", file) for corner in _CORNERS)
    return {
        "bbox": [max(x1 - 1, 0.0), max(y1 - 1, 0.0), max(x2, 0.0), max(y2, 0.0)],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": ids[name],
        "iscrowd": int((item.findtext("difficult") or "0").strip() == "1"),
    }


def _annotated_classes(folder: Path) -> tuple[str, ...]:
    names = {
        (item.findtext("name") or "").strip()
        for file in sorted((folder / "Annotations").glob("*.xml"))
        for item in _parse(file).iterfind("object")
    }
    if not names:
        raise ValueError(f"no object in {folder / 'Annotations'}: pass classes=[...] instead")
    return tuple(sorted(names))
