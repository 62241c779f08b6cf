# SPDX-License-Identifier: Apache-2.0
"""SAPD, ResNet-101-FPN, COCO 2x at many sizes: 43.5 AP on test-dev in the paper (Table 6)."""

from .sapd_R_50_FPN_2x_ms import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.depth = 101
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-101.pkl"
