# SPDX-License-Identifier: Apache-2.0
"""Datasets: VOC and COCO folders as Detectron2 datasets, their checks, and training batches.

``checks`` and ``shapes`` are commands, too, and so imported by their own names.
"""

from d2_decouple.data.coco import load_coco, register_coco
from d2_decouple.data.datasets import (
    BCCD_CLASSES,
    ground_truth,
    register_bccd,
    require_dataset,
)
from d2_decouple.data.folders import FolderDataset, register_folder
from d2_decouple.data.loader import DataError, TrainLoader
from d2_decouple.data.voc import load_voc, register_voc

__all__ = [
    "BCCD_CLASSES",
    "DataError",
    "FolderDataset",
    "TrainLoader",
    "ground_truth",
    "load_coco",
    "load_voc",
    "register_bccd",
    "register_coco",
    "register_folder",
    "register_voc",
    "require_dataset",
]
