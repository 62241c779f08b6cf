# SPDX-License-Identifier: Apache-2.0
"""PDNet, ResNet-50-FPN, COCO 2x at two scales: 44.3 AP on test-dev in the paper (Table VI)."""

from ....configs.common.schedules.coco import multiplier
from .pdnet_R_50_FPN_1x import dataloader, model, optimizer, train

train.max_iter = 180000
lr_multiplier = multiplier(2, 500, 0.001)
# One of the two, as the authors' configs; the paper speaks of the range between them.
dataloader.train.mapper.augmentations[0].update(short_edge_length=[640, 800], sample_style="choice")
