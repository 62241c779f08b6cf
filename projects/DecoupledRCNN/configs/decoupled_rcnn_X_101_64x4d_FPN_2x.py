# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN, ResNeXt-101-64x4d-FPN, COCO 2x, which the paper has at several sizes only."""

from ....configs.common.schedules.epochs import iterations, multiplier
from .decoupled_rcnn_X_101_64x4d_FPN_1x import dataloader, model, optimizer, train

train.max_iter = iterations(24)
lr_multiplier = multiplier(24, [16, 22])
