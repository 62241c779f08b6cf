# SPDX-License-Identifier: Apache-2.0
"""DDOD in the small-data experiment: the network, data and schedule of the FCOS there."""

from ..common.models.ddod import model
from .fcos_R_18_FPN_bccd import dataloader, lr_multiplier, optimizer, train
from .fcos_R_18_FPN_bccd import model as _fcos

model.backbone.update(bottom_up=_fcos.backbone.bottom_up, out_channels=64)
model.head.predictor.in_channels = 64
model.head.update(cls_conv_dims=_fcos.head.cls_conv_dims, box_conv_dims=_fcos.head.box_conv_dims)
model.num_classes = _fcos.num_classes
model.update({key: _fcos[key] for key in ("pixel_mean", "pixel_std", "input_format")})
