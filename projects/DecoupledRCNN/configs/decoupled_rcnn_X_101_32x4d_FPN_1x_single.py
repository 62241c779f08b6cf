# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN with one regressor, ResNeXt-101-32x4d-FPN, COCO 1x: in the paper 1.1 to 1.2 AP
above FPN (Table VIII)."""

from .decoupled_rcnn_R_50_FPN_1x_single import dataloader, lr_multiplier, model, optimizer
from .decoupled_rcnn_X_101_32x4d_FPN_1x import model as _cascade
from .decoupled_rcnn_X_101_32x4d_FPN_1x import train

model.backbone = _cascade.backbone
