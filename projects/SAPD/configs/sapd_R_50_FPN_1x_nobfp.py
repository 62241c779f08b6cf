# SPDX-License-Identifier: Apache-2.0
"""SAPD without BFP, ResNet-50-FPN, COCO 1x: 38.0 AP on val2017 in the paper (Table 2)."""

from ....configs.common.data.coco import dataloader
from ....configs.common.models.sapd import model
from ....configs.common.schedules.coco import multiplier
from ....configs.common.schedules.default import optimizer, train

train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
lr_multiplier = multiplier(1, 500, 0.001)
