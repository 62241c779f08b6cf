# SPDX-License-Identifier: Apache-2.0
"""SAPD, ResNeXt-101-64x4d-FPN, COCO 2x: 45.4 AP on test-dev in the paper (Table 6)."""

from d2_decouple.layers.deform import resnext_block

from .sapd_R_101_FPN_2x_ms import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.update(
    block_class=resnext_block, num_groups=64, width_per_group=4, stride_in_1x1=False
)
train.init_checkpoint = "detectron2://ImageNetPretrained/FAIR/X-101-64x4d.pkl"
