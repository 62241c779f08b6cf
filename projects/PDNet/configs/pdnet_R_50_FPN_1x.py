# SPDX-License-Identifier: Apache-2.0
"""PDNet, ResNet-50-FPN, COCO 1x: 41.8 AP on val2017 in the paper (Table I)."""

from ....configs.common.data.coco import dataloader
from ....configs.common.models.pdnet import model
from ....configs.common.schedules.coco import multiplier
from ....configs.common.schedules.default import optimizer, train  # everything decays, norms too

train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
lr_multiplier = multiplier(1, 500, 0.001)
