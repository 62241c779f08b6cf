# SPDX-License-Identifier: Apache-2.0
"""Pictures: the course of a training, and detections beside the ground truth."""

from d2_decouple.visualization.assignment import draw_assignment
from d2_decouple.visualization.context import draw_context
from d2_decouple.visualization.curves import plot_curves, read_metrics
from d2_decouple.visualization.detections import class_colors, compare, draw_boxes
from d2_decouple.visualization.points import draw_points
from d2_decouple.visualization.precision_recall import plot_precision_recall
from d2_decouple.visualization.stages import draw_stages

__all__ = [
    "class_colors",
    "compare",
    "draw_assignment",
    "draw_boxes",
    "draw_context",
    "draw_points",
    "draw_stages",
    "plot_curves",
    "plot_precision_recall",
    "read_metrics",
]
