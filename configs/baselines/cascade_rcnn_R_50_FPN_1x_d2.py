# SPDX-License-Identifier: Apache-2.0
"""Detectron2's own Cascade R-CNN, ResNet-50-FPN, COCO 1x, with the data and schedule of Decoupled
R-CNN's authors."""

from ..common.models.cascade_rcnn import model
from .faster_rcnn_R_50_FPN_1x_d2 import dataloader, lr_multiplier, optimizer, train
