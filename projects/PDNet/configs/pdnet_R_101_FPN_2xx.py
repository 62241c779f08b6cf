# SPDX-License-Identifier: Apache-2.0
"""PDNet, ResNet-101-FPN, COCO 2x at two scales far apart: 46.6 AP on test-dev in the paper."""

from .pdnet_R_50_FPN_2xx import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.depth = 101
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
