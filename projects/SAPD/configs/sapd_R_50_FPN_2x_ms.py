# SPDX-License-Identifier: Apache-2.0
"""SAPD, ResNet-50-FPN, COCO 2x at many sizes: 41.7 AP on test-dev in the paper (Table 6)."""

from ....configs.common.schedules.coco import multiplier
from .sapd_R_50_FPN_1x import dataloader, model, optimizer, train

train.max_iter = 180000
lr_multiplier = multiplier(2, 500, 0.001)
dataloader.train.mapper.augmentations[0].update(short_edge_length=[640, 800], sample_style="range")
