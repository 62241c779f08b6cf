# SPDX-License-Identifier: Apache-2.0
"""TSCODE under PDNet's predictor, COCO 1x, which no paper has.

PDNet's nine class maps are made at half the resolution and rearranged before they are gathered.
"""

from detectron2.config import LazyCall as L

from d2_decouple.modeling import TSCODE, TSCODEOptions

from ...PDNet.configs.pdnet_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.head.context = L(TSCODE)(channels="${...backbone.out_channels}", options=L(TSCODEOptions)())
model.head.cls_conv_dims = [512, 512]
model.head_in_features = ["res2", *model.head_in_features]
