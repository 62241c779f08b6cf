# SPDX-License-Identifier: Apache-2.0
"""AutoAssign, ResNet-50-FPN, COCO 1x: 40.5 AP on val2017 with the authors' code."""

from ..common.models.autoassign import model
from .fcos_R_50_FPN_1x import dataloader, train
from .fcos_R_50_FPN_1x_d2 import lr_multiplier, optimizer  # norms do not decay
