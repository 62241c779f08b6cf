# SPDX-License-Identifier: Apache-2.0
"""Datasets: Pascal VOC folders as Detectron2 datasets, and the sets that the recipes name."""

from d2_decouple.data.datasets import (
    BCCD_CLASSES,
    coco_evaluator,
    ground_truth,
    load_voc,
    register_bccd,
    register_voc,
    require_dataset,
)

__all__ = [
    "BCCD_CLASSES",
    "coco_evaluator",
    "ground_truth",
    "load_voc",
    "register_bccd",
    "register_voc",
    "require_dataset",
]
