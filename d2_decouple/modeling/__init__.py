# SPDX-License-Identifier: Apache-2.0
"""The detector and what goes into its slots. Importing this registers with Detectron2."""

from .atss import ATSSAssigner, ATSSPredictor
from .augmented import TestTimeAugmentation
from .autoassign import (
    AutoAssignAssigner,
    AutoAssignPredictor,
    CenterPriorTerm,
    NegativeTerm,
    PositiveTerm,
)
from .cascaded_classes import CascadedClassROIHeads
from .ddod import BoxQualityTerm, DDODAssigner, box_targets
from .decoupled_rcnn import DecoupledROIHeads
from .decoupled_rpn import DecoupledProposals, DecoupledRPN
from .dense_proposals import DenseProposals, ProbabilisticROIHeads
from .detector import OneStageDetector
from .dynamic_points import (
    BoundaryPoints,
    EdgeMidpoints,
    GridOffsetPoints,
    GridPoints,
    SemanticPoints,
)
from .fcos import FCOSAssigner, FCOSPredictor, unit_weight
from .feature_selection import FeatureSelectionNet, LevelSelectionTerm
from .free_points import FreePoints
from .gfl import (
    DistributionFocalTerm,
    DistributionQuality,
    GFLAssigner,
    GFLPredictor,
    GFLv2Predictor,
    QualityFocalTerm,
    box_distribution,
)
from .head import ClassPredictor, DenseHead, SharedContext
from .ota import OTAAssigner
from .pdnet import PDNetAssigner, PDNetPredictor
from .pyramid import (
    BFP,
    FPN,
    PAFPN,
    BalancedFeatures,
    FoldedConv2d,
    LinearP6P7,
    fold_frozen_norms,
)
from .regions import RegionSelection
from .retinanet import DeltaL1Term, RetinaNetAssigner, RetinaNetPredictor
from .roi_branches import (
    BoxBranch,
    ClassBranch,
    ConvBoxBranch,
    ConvHead,
    FCHead,
    SharedBoxBranch,
)
from .salt import SALT, SALTOptions, SelfDistillationTerm
from .sapd import SAPDAssigner, SAPDOptions, SAPDPredictor
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
    coarse_boxes,
    geometric_mean_score,
    predicted_boxes,
    product_score,
)
from .soft_weights import SoftWeights, WeightedQualityTerm
from .terms import (
    FocalTerm,
    GIoUTerm,
    IoUTerm,
    QualityTerm,
    coarse_targets,
    loss_terms,
    main_targets,
)
from .tscode import TSCODE, RearrangedClassPredictor, TSCODEOptions

__all__ = [
    "FPN",
    "PAFPN",
    "TSCODE",
    "ATSSAssigner",
    "ATSSPredictor",
    "BestLocations",
    "BestPairs",
    "BoundaryPoints",
    "BoxBranch",
    "CascadedClassROIHeads",
    "ClassBranch",
    "ClassPredictor",
    "ConvBoxBranch",
    "ConvHead",
    "DecoupledProposals",
    "DecoupledROIHeads",
    "DecoupledRPN",
    "DenseHead",
    "EdgeMidpoints",
    "FCHead",
    "FCOSAssigner",
    "FCOSPredictor",
    "FocalTerm",
    "FoldedConv2d",
    "GIoUTerm",
    "GaussianDecay",
    "GridOffsetPoints",
    "GridPoints",
    "HardNMS",
    "LinearDecay",
    "OneStageDetector",
    "PDNetAssigner",
    "PDNetPredictor",
    "QualityTerm",
    "RegionSelection",
    "Selection",
    "SemanticPoints",
    "SharedBoxBranch",
    "SharedContext",
    "SoftNMS",
    "TestTimeAugmentation",
    "class_score",
    "clip_to_image",
    "coarse_boxes",
    "coarse_targets",
    "fold_frozen_norms",
    "geometric_mean_score",
    "loss_terms",
    "main_targets",
    "predicted_boxes",
    "product_score",
    "unit_weight",
    "LinearP6P7",
    "RearrangedClassPredictor",
    "TSCODEOptions",
    "DistributionFocalTerm",
    "DistributionQuality",
    "GFLAssigner",
    "GFLPredictor",
    "GFLv2Predictor",
    "QualityFocalTerm",
    "box_distribution",
    "AutoAssignAssigner",
    "AutoAssignPredictor",
    "CenterPriorTerm",
    "NegativeTerm",
    "PositiveTerm",
    "BoxQualityTerm",
    "DDODAssigner",
    "box_targets",
    "DeltaL1Term",
    "RetinaNetAssigner",
    "RetinaNetPredictor",
    "OTAAssigner",
    "FreePoints",
    "SALT",
    "SALTOptions",
    "SelfDistillationTerm",
    "FeatureSelectionNet",
    "IoUTerm",
    "LevelSelectionTerm",
    "SAPDAssigner",
    "SAPDOptions",
    "SAPDPredictor",
    "BFP",
    "BalancedFeatures",
    "DenseProposals",
    "ProbabilisticROIHeads",
    "SoftWeights",
    "WeightedQualityTerm",
]
