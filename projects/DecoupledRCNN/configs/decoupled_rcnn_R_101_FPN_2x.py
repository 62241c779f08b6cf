# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN, ResNet-101-FPN, COCO 2x: 43.3 AP on test-dev in the paper (Table IX), 42.8 on
val2017 with the authors' code."""

from .decoupled_rcnn_R_50_FPN_2x import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.depth = 101
train.init_checkpoint = "torchvision://resnet101.IMAGENET1K_V1"
