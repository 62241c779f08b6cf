# SPDX-License-Identifier: Apache-2.0
"""SALT-Net, ResNet-101-FPN, COCO 2x at many sizes. Not in the paper."""

from .salt_R_50_FPN_2x_ms import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.depth = 101
train.init_checkpoint = "torchvision://resnet101.IMAGENET1K_V1"
