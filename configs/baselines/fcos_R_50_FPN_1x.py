# SPDX-License-Identifier: Apache-2.0
"""FCOS, ResNet-50-FPN, COCO 1x: the baseline of TSCODE's Table 1 (38.7 AP)."""

from ..common.data.coco import dataloader
from ..common.models.fcos import model
from ..common.schedules.coco import multiplier
from ..common.schedules.default import optimizer, train

train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
lr_multiplier = multiplier(1, 500, 1 / 3)
# As the paper's host: biases learn twice as fast and do not decay.
optimizer.params.base_lr = "${..lr}"
optimizer.params.bias_lr_factor = 2.0
optimizer.params.weight_decay_bias = 0.0
