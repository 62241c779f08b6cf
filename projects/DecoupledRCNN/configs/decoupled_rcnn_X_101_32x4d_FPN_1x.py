# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN, ResNeXt-101-32x4d-FPN, COCO 1x: in the paper 1.4 to 1.5 AP above that
with one regressor (Table VIII)."""

from d2_decouple.layers.deform import resnext_block

from .decoupled_rcnn_R_101_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.update(block_class=resnext_block, num_groups=32, width_per_group=4)
# The weights of the authors' code. torchvision and Detectron2 have none of this network; timm's
# (timm://resnext101_32x4d.gluon_in1k) fit as well, but were trained elsewhere.
train.init_checkpoint = (
    "https://download.openmmlab.com/pretrain/third_party/resnext101_32x4d-a5af3160.pth"
)
