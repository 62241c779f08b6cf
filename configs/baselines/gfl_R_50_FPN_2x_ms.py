# SPDX-License-Identifier: Apache-2.0
"""GFL, ResNet-50-FPN, COCO 2x at many sizes: what TSCODE's Table 5 is built on."""

from ..common.schedules.epochs import iterations, multiplier
from .gfl_R_50_FPN_1x import dataloader, model, optimizer, train

train.max_iter = iterations(24)
lr_multiplier = multiplier(24, [16, 22])
dataloader.train.mapper.augmentations[0].update(short_edge_length=[480, 800], sample_style="range")
