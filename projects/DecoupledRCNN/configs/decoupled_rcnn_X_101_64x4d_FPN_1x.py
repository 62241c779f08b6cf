# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN, ResNeXt-101-64x4d-FPN, COCO 1x, which the paper does not have."""

from .decoupled_rcnn_X_101_32x4d_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.num_groups = 64
# The weights of the authors' code. Detectron2's (FAIR/X-101-64x4d) want other images (BGR), those
# of torchvision and timm (gluon_in1k) were trained elsewhere.
train.init_checkpoint = (
    "https://download.openmmlab.com/pretrain/third_party/resnext101_64x4d-ee2c6f71.pth"
)
