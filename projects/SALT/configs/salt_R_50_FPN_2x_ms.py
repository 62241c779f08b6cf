# SPDX-License-Identifier: Apache-2.0
"""SALT-Net, ResNet-50-FPN, COCO 2x at many sizes: 46.1 AP on test-dev in the paper (Table 5)."""

from ....configs.baselines.gfl_R_50_FPN_2x_ms import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.salt import model

# As the authors' code has it; the paper begins at 400.
dataloader.train.mapper.augmentations[0].short_edge_length = [480, 960]
