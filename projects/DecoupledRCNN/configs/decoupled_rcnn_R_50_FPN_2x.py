# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN, ResNet-50-FPN, COCO 2x: 41.5 AP on val2017 with the authors' code."""

from ....configs.common.schedules.epochs import iterations, multiplier
from .decoupled_rcnn_R_50_FPN_1x import dataloader, model, optimizer, train

train.max_iter = iterations(24)
lr_multiplier = multiplier(24, [16, 22])
