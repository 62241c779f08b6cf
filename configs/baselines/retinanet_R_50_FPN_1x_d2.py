# SPDX-License-Identifier: Apache-2.0
"""Detectron2's own RetinaNet, ResNet-50-FPN, COCO 1x, with Detectron2's schedule and image sizes.

Its head has no norm, as in Detectron2's recipe.
"""

from detectron2.modeling.backbone import FPN

from ..common.models.fcos import model as _ours
from .fcos_R_50_FPN_1x_d2 import dataloader, lr_multiplier, optimizer, train
from .retinanet_R_18_FPN_bccd_d2 import model

model.update(
    backbone=_ours.backbone,
    num_classes=_ours.num_classes,
    pixel_mean=_ours.pixel_mean,
    pixel_std=_ours.pixel_std,
    input_format=_ours.input_format,
)
model.backbone._target_ = FPN
model.backbone.top_block.update(in_feature="res5", in_channels=2048)  # P6 comes from C5
model.head.update(conv_dims=[256, 256, 256, 256], norm="")
