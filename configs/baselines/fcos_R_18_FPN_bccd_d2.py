# SPDX-License-Identifier: Apache-2.0
"""Detectron2's own FCOS in the small-data experiment, with its own values for COCO."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead

from d2_decouple.layers.norms import group_norm

from ..common.data.bccd import dataloader
from ..common.schedules.bccd import lr_multiplier, optimizer, train
from .fcos_R_18_FPN_bccd import model as _ours

model = L(FCOS)(
    backbone=_ours.backbone,
    head=L(FCOSHead)(
        input_shape=[L(ShapeSpec)(channels="${....backbone.out_channels}") for _ in range(5)],
        num_classes="${..num_classes}",
        conv_dims=[64, 64, 64, 64],
        prior_prob=0.01,
        norm=group_norm,  # "GN", which fails in the Detectron2 of 2022 with today's torch
    ),
    num_classes=_ours.num_classes,
    head_in_features=_ours.head_in_features,
    test_score_thresh=0.2,
    test_nms_thresh=0.6,
    pixel_mean=_ours.pixel_mean,
    pixel_std=_ours.pixel_std,
)
model.backbone._target_ = FPN
