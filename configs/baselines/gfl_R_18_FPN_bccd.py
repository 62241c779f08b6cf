# SPDX-License-Identifier: Apache-2.0
"""GFL in the small-data experiment: the network, data and schedule of the FCOS there."""

from ..common.models.gfl import model
from .atss_R_18_FPN_bccd import dataloader, lr_multiplier, optimizer, train
from .atss_R_18_FPN_bccd import model as _atss

model.backbone = _atss.backbone
model.head.predictor.in_channels = 64
model.head.update(cls_conv_dims=_atss.head.cls_conv_dims, box_conv_dims=_atss.head.box_conv_dims)
model.num_classes = _atss.num_classes
model.update({key: _atss[key] for key in ("pixel_mean", "pixel_std", "input_format")})
