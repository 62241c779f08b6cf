# SPDX-License-Identifier: Apache-2.0
"""GFL, ViT-B with ViTDet's simple pyramid, COCO 1x; weights of MAE."""

from d2_decouple.modeling.detectron2_backbones import decayed_by_layer

from ..common.models.backbones import vitdet_base
from ..common.models.gfl import model
from .fcos_swin_tiny_FPN_1x import dataloader, lr_multiplier, optimizer, train

vitdet_base(model)
train.init_checkpoint = "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_base.pth"
optimizer.params._target_ = decayed_by_layer
optimizer.params.update(decay=0.7, depth=12)
