# SPDX-License-Identifier: Apache-2.0
"""RetinaNet, ResNet-50-FPN, COCO 1x, with Detectron2's schedule and image sizes.

Its moving average of the number of positives is not followed: the normaliser here is exact.
"""

from ..common.models.retinanet import model
from .fcos_R_50_FPN_1x_d2 import dataloader, lr_multiplier, optimizer, train
