# SPDX-License-Identifier: Apache-2.0
"""Measuring detections: COCO's and Pascal VOC's AP, and how sure a difference is."""

from .bootstrap import Interval, ap_on_draws, match_images, paired_difference, weighted_ap
from .coco import IOU_THRESHOLDS, Curves, coco_curves
from .evaluator import BoxEvaluator
from .truth import (
    EvaluationError,
    GroundTruth,
    ImageDetections,
    ImageTruth,
    read_ground_truth,
)
from .voc import area_below, eleven_points, voc_ap

__all__ = [
    "IOU_THRESHOLDS",
    "BoxEvaluator",
    "Curves",
    "EvaluationError",
    "GroundTruth",
    "ImageDetections",
    "ImageTruth",
    "Interval",
    "ap_on_draws",
    "area_below",
    "coco_curves",
    "eleven_points",
    "match_images",
    "paired_difference",
    "read_ground_truth",
    "voc_ap",
    "weighted_ap",
]
