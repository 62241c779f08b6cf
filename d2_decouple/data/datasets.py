# SPDX-License-Identifier: Apache-2.0
"""The sets that the recipes name, and what is done with a set of any format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.structures import Instances

from ..config import nearest
from .records import DATASETS_PREFIX
from .voc import register_voc

__all__ = [
    "BCCD_CLASSES",
    "ground_truth",
    "register_bccd",
    "require_dataset",
]

BCCD_CLASSES = ("RBC", "WBC", "Platelets")


def register_bccd() -> None:
    """Register the blood cells: ``bccd_train`` (its trainval), ``bccd_test``, ``bccd_mini_*``.

    The full set is looked for in ``$DETECTRON2_DATASETS/BCCD``. The mini set of 60 images comes
    with a checkout; a wheel does not carry it and looks in ``$DETECTRON2_DATASETS/bccd_mini``.
    """
    full = f"{DATASETS_PREFIX}/BCCD"
    register_voc("bccd_train", full, "trainval", classes=BCCD_CLASSES)
    register_voc("bccd_test", full, "test", classes=BCCD_CLASSES)
    checkout = Path(__file__).resolve().parents[2] / "tests" / "data" / "bccd_mini"
    mini = str(checkout) if checkout.is_dir() else f"{DATASETS_PREFIX}/bccd_mini"
    register_voc("bccd_mini_train", mini, "train", classes=BCCD_CLASSES)
    register_voc("bccd_mini_val", mini, "val", classes=BCCD_CLASSES)


def require_dataset(name: str) -> None:
    """Raise ValueError, naming the nearest known dataset, unless ``name`` is registered."""
    if name in DatasetCatalog:
        return
    raise ValueError(
        f"unknown dataset {name!r}; {nearest(name, DatasetCatalog.list())} To add a folder in VOC "
        "format: from d2_decouple.data import register_voc; "
        f"register_voc({name!r}, 'FOLDER', 'SPLIT', classes=[...]); a file in COCO format: "
        f"register_coco({name!r}, 'FILE.json', 'FOLDER_OF_IMAGES')"
    )


def ground_truth(record: dict[str, Any]) -> Instances:
    """The objects of a dataset dict, without crowds, in pixels of the image as it is on disk.

    Returns:
        ``gt_boxes`` (M, 4) absolute xyxy pixels and ``gt_classes`` (M,).
    """
    objects = [item for item in record["annotations"] if not item.get("iscrowd", 0)]
    return annotations_to_instances(objects, (record["height"], record["width"]))
