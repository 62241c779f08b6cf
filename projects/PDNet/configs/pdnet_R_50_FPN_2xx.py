# SPDX-License-Identifier: Apache-2.0
"""PDNet, ResNet-50-FPN, COCO 2x, scales further apart: 45.0 AP on test-dev in the paper."""

from .pdnet_R_50_FPN_2x import dataloader, lr_multiplier, model, optimizer, train

dataloader.train.mapper.augmentations[0].short_edge_length = [480, 960]
