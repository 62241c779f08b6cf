# SPDX-License-Identifier: Apache-2.0
"""PDNet, ResNeXt-101-64x4d-FPN, COCO 2x, scales far apart: 48.7 AP on test-dev in the paper."""

from .pdnet_X_101_64x4d_FPN_2x import dataloader, lr_multiplier, model, optimizer, train

dataloader.train.mapper.augmentations[0].short_edge_length = [480, 960]
