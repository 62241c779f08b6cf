# SPDX-License-Identifier: Apache-2.0
"""TSCODE on OTA, ResNet-50-FPN, COCO 1x: 41.5 AP in the paper (Table 4)."""

from detectron2.config import LazyCall as L

from d2_decouple.modeling import TSCODE, TSCODEOptions

from ....configs.baselines.ota_R_50_FPN_1x import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.head.context = L(TSCODE)(channels="${...backbone.out_channels}", options=L(TSCODEOptions)())
model.head.cls_conv_dims = [512, 512]
model.head_in_features = ["res2", *model.head_in_features]
