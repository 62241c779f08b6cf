# SPDX-License-Identifier: Apache-2.0
"""FCOS, MViTv2-T-FPN, COCO 1x."""

from ..common.models.backbones import mvitv2_tiny
from ..common.models.fcos import model
from .fcos_swin_tiny_FPN_1x import dataloader, lr_multiplier, optimizer, train

mvitv2_tiny(model)
train.init_checkpoint = "detectron2://ImageNetPretrained/mvitv2/MViTv2_T_in1k.pyth"
