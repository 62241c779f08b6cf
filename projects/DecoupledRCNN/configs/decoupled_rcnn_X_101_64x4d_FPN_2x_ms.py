# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN, ResNeXt-101-64x4d-FPN, COCO 2x at several sizes, with soft-NMS: 47.2 AP on
test-dev in the paper (Table IX), 46.8 on val2017 with the authors' code."""

from .decoupled_rcnn_R_101_FPN_2x_ms import dataloader, lr_multiplier, model, optimizer
from .decoupled_rcnn_X_101_64x4d_FPN_2x import model as _one_size
from .decoupled_rcnn_X_101_64x4d_FPN_2x import train

model.backbone = _one_size.backbone
