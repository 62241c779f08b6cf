# SPDX-License-Identifier: Apache-2.0
"""DDOD, ResNet-50-FPN, COCO 1x: all else is ATSS's, whose AP it raises by 2.2 in the paper."""

from ..common.models.ddod import model
from .atss_R_50_FPN_1x import dataloader, lr_multiplier, optimizer, train
