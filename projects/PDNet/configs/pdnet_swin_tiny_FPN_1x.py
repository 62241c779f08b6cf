# SPDX-License-Identifier: Apache-2.0
"""PDNet, Swin-T-FPN, COCO 1x. Not in the paper."""

from ....configs.baselines.fcos_swin_tiny_FPN_1x import (
    dataloader,
    lr_multiplier,
    optimizer,
    train,
)
from ....configs.common.models.backbones import swin_tiny
from ....configs.common.models.pdnet import model

swin_tiny(model)
