# SPDX-License-Identifier: Apache-2.0
"""SALT-Net, ResNet-50-FPN, COCO 1x: 42.8 AP on val2017 in the paper (Table 4)."""

from ....configs.baselines.gfl_R_50_FPN_1x import dataloader, lr_multiplier, optimizer, train
from ....configs.common.models.salt import model
