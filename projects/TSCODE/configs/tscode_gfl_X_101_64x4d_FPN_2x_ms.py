# SPDX-License-Identifier: Apache-2.0
"""TSCODE on GFL, ResNeXt-101-64x4d-FPN, COCO 2x: 48.3 AP on test-dev in the paper (Table 5)."""

from .tscode_gfl_X_101_32x4d_FPN_2x_ms import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.num_groups = 64
train.init_checkpoint = (
    "https://download.openmmlab.com/pretrain/third_party/resnext101_64x4d-ee2c6f71.pth"
)
