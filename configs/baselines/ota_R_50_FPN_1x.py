# SPDX-License-Identifier: Apache-2.0
"""OTA, ResNet-50-FPN, COCO 1x: 40.7 AP on val2017 in the paper."""

from ..common.models.ota import model
from .fcos_R_50_FPN_1x import dataloader, train
from .fcos_R_50_FPN_1x_d2 import lr_multiplier, optimizer  # norms do not decay
