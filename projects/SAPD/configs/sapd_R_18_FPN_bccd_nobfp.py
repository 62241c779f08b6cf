# SPDX-License-Identifier: Apache-2.0
"""SAPD without BFP in the small-data experiment: the network, data and schedule of the FCOS there.

Its towers have the group norm that FCOS has: without a norm, weights of 0.01 on 64 channels let a
signal shrink by a factor of six in each convolution, and nothing is learned in this time.
"""

from ....configs.baselines.fcos_R_18_FPN_bccd import dataloader, lr_multiplier, optimizer, train
from ....configs.baselines.fcos_R_18_FPN_bccd import model as _fcos
from ....configs.common.models.sapd import model

model.backbone = _fcos.backbone
model.backbone.top_block.update(in_feature="res5", in_channels=512)
model.head.predictor.in_channels = 64
model.head.update(cls_conv_dims=_fcos.head.cls_conv_dims, box_conv_dims=_fcos.head.box_conv_dims)
model.head.norm = _fcos.head.norm
model.update(num_classes=_fcos.num_classes, pixel_std=_fcos.pixel_std)
