# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN with one regressor, ResNet-101-FPN, COCO 1x: in the paper 1.4 to 1.5 AP below the
one with three stages (Table VIII)."""

from .decoupled_rcnn_R_50_FPN_1x_single import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.depth = 101
train.init_checkpoint = "torchvision://resnet101.IMAGENET1K_V1"
