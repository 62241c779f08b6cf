# SPDX-License-Identifier: Apache-2.0
"""Detectron2's own Faster R-CNN, ResNet-50-FPN, COCO 1x, with the data and schedule of Decoupled
R-CNN's authors."""

from ..common.data.coco_rgb import dataloader
from ..common.models.faster_rcnn import model
from ..common.schedules.default import optimizer, train
from ..common.schedules.epochs import iterations, multiplier

# Those of the paper's time; torchvision's newer ones come from another way to train.
train.init_checkpoint = "torchvision://resnet50.IMAGENET1K_V1"
train.max_iter = iterations(12)
lr_multiplier = multiplier(12, [8, 11])
optimizer.lr = 0.02
