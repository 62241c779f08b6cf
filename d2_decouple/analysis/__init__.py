# SPDX-License-Identifier: Apache-2.0
"""Comparing detectors: costs by slot, kinds of errors, misalignment of score and IoU."""

from .costs import SlotCost, slot_costs
from .error_kinds import KINDS, ORACLES, Judgement, ap_of_oracles, judge, kind_counts
from .intervals import Estimate, estimate, image_weights, rank_correlation
from .misalignment import (
    ObjectView,
    Pairs,
    RawPredictions,
    correlation_within_classes,
    detection_pairs,
    object_measures,
    view_objects,
)
from .observation import Observed, first_images, observe, read_kept
from .report import render_report
from .summary import MEASURES, Comparison, Summary, compare_models, summarise

__all__ = [
    "KINDS",
    "MEASURES",
    "ORACLES",
    "Comparison",
    "Estimate",
    "Judgement",
    "ObjectView",
    "Observed",
    "Pairs",
    "RawPredictions",
    "SlotCost",
    "Summary",
    "ap_of_oracles",
    "compare_models",
    "correlation_within_classes",
    "detection_pairs",
    "estimate",
    "first_images",
    "image_weights",
    "judge",
    "kind_counts",
    "object_measures",
    "observe",
    "rank_correlation",
    "read_kept",
    "render_report",
    "slot_costs",
    "summarise",
    "view_objects",
]
