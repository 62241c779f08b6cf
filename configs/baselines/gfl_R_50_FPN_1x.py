# SPDX-License-Identifier: Apache-2.0
"""GFL, ResNet-50-FPN, COCO 1x: the baseline of TSCODE's Table 1 (40.2 AP)."""

from ..common.models.gfl import model
from .atss_R_50_FPN_1x import dataloader, lr_multiplier, optimizer, train
