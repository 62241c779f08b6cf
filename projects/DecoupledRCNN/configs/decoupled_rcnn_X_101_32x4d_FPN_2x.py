# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN, ResNeXt-101-32x4d-FPN, COCO 2x: 44.5 AP on test-dev in the paper (Section V-D),
44.4 on val2017 with the authors' code."""

from ....configs.common.schedules.epochs import iterations, multiplier
from .decoupled_rcnn_X_101_32x4d_FPN_1x import dataloader, model, optimizer, train

train.max_iter = iterations(24)
lr_multiplier = multiplier(24, [16, 22])
