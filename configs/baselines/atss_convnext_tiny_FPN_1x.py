# SPDX-License-Identifier: Apache-2.0
"""ATSS, timm's ConvNeXt-T-FPN, COCO 1x; timm fetches the weights when the model is built."""

from ..common.models.atss import model
from ..common.models.backbones import timm_network
from .fcos_swin_tiny_FPN_1x import dataloader, lr_multiplier, optimizer, train

timm_network(model, "convnext_tiny.fb_in22k", 96)
train.init_checkpoint = ""
