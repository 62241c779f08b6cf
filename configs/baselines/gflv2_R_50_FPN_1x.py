# SPDX-License-Identifier: Apache-2.0
"""GFLv2, ResNet-50-FPN, COCO 1x: the baseline of SALT-Net (41.0 AP with its authors' code)."""

from ..common.models.gflv2 import model
from .gfl_R_50_FPN_1x import dataloader, lr_multiplier, optimizer, train
