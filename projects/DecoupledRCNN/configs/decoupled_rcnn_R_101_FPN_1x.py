# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN, ResNet-101-FPN, COCO 1x.

41.9 to 42.1 AP on val2017 in the paper: what Section VI-C says of it beside Double-Head's branch.
"""

from .decoupled_rcnn_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.depth = 101
train.init_checkpoint = "torchvision://resnet101.IMAGENET1K_V1"
