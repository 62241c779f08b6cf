# SPDX-License-Identifier: Apache-2.0
"""TSCODE on GFL, ResNet-101-FPN, COCO 2x at many sizes: 46.7 AP on test-dev (Table 5)."""

from detectron2.config import LazyCall as L

from d2_decouple.modeling import TSCODE, TSCODEOptions

from ....configs.baselines.gfl_R_50_FPN_2x_ms import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.head.context = L(TSCODE)(channels="${...backbone.out_channels}", options=L(TSCODEOptions)())
model.head.cls_conv_dims = [512, 512]
model.head_in_features = ["res2", *model.head_in_features]
model.backbone.bottom_up.stages.depth = 101
train.init_checkpoint = "torchvision://resnet101.IMAGENET1K_V1"
