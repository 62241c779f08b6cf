# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN, three stages, ResNet-50-FPN, COCO 1x, with the values of the authors' code.

40.1 to 40.3 AP on val2017 in the paper: what Section VI-C says of it beside Double-Head's branch.
"""

from ....configs.baselines.faster_rcnn_R_50_FPN_1x_d2 import (
    dataloader,
    lr_multiplier,
    optimizer,
    train,
)
from ....configs.common.models.decoupled_rcnn import model
