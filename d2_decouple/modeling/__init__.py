# SPDX-License-Identifier: Apache-2.0
"""The detector and what goes into its slots. Importing this registers with Detectron2."""

from .augmented import TestTimeAugmentation
from .detector import OneStageDetector
from .fcos import FCOSAssigner, FCOSPredictor, unit_weight
from .head import ClassPredictor, DenseHead, SharedContext
from .pyramid import FPN, FoldedConv2d, fold_frozen_norms
from .selection import (
    BestLocations,
    BestPairs,
    GaussianDecay,
    HardNMS,
    LinearDecay,
    Selection,
    SoftNMS,
    class_score,
    clip_to_image,
    geometric_mean_score,
    predicted_boxes,
    product_score,
)
from .terms import FocalTerm, GIoUTerm, QualityTerm, loss_terms, main_targets

__all__ = [
    "FPN",
    "BestLocations",
    "BestPairs",
    "ClassPredictor",
    "DenseHead",
    "FCOSAssigner",
    "FCOSPredictor",
    "FocalTerm",
    "FoldedConv2d",
    "GIoUTerm",
    "GaussianDecay",
    "HardNMS",
    "LinearDecay",
    "OneStageDetector",
    "QualityTerm",
    "Selection",
    "SharedContext",
    "SoftNMS",
    "TestTimeAugmentation",
    "class_score",
    "clip_to_image",
    "fold_frozen_norms",
    "geometric_mean_score",
    "loss_terms",
    "main_targets",
    "predicted_boxes",
    "product_score",
    "unit_weight",
]
