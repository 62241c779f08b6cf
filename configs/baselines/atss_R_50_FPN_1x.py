# SPDX-License-Identifier: Apache-2.0
"""ATSS, ResNet-50-FPN, COCO 1x: the baseline of TSCODE's Table 1 (39.4 AP)."""

from ..common.data.coco_rgb import dataloader
from ..common.models.atss import model
from ..common.schedules.default import optimizer, train
from ..common.schedules.epochs import iterations, multiplier

# Those of the papers' time; torchvision's newer ones come from another way to train.
train.init_checkpoint = "torchvision://resnet50.IMAGENET1K_V1"
train.max_iter = iterations(12)
lr_multiplier = multiplier(12, [8, 11])
