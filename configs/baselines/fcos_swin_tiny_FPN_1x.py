# SPDX-License-Identifier: Apache-2.0
"""FCOS, Swin-T-FPN, COCO 1x."""

from ..common.data.coco_rgb import dataloader
from ..common.models.backbones import swin_tiny
from ..common.models.fcos import model
from ..common.schedules.adamw import optimizer
from ..common.schedules.coco import multiplier
from ..common.schedules.default import train

swin_tiny(model)
lr_multiplier = multiplier(1, 1000, 0.001)
# The authors' weights, of ImageNet's 1,000 classes.
train.init_checkpoint = (
    "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
    "swin_tiny_patch4_window7_224.pth"
)
