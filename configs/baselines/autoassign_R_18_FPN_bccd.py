# SPDX-License-Identifier: Apache-2.0
"""AutoAssign in the small-data experiment: the network, data and schedule of the FCOS there."""

from ..common.models.autoassign import model
from .fcos_R_18_FPN_bccd import dataloader, lr_multiplier, optimizer, train
from .fcos_R_18_FPN_bccd import model as _fcos

model.backbone = _fcos.backbone
model.backbone.top_block.update(in_feature="res5", in_channels=512)
model.head.predictor.in_channels = 64
model.head.update(cls_conv_dims=_fcos.head.cls_conv_dims, box_conv_dims=_fcos.head.box_conv_dims)
model.update(num_classes=_fcos.num_classes, pixel_std=_fcos.pixel_std)
