# SPDX-License-Identifier: Apache-2.0
"""FCOS, ResNet-18-FPN from scratch on BCCD: small enough to train on a laptop's CPU."""

from ..common.data.bccd import dataloader
from ..common.models.fcos import model
from ..common.schedules.bccd import lr_multiplier, optimizer, train

# From scratch: nothing is frozen, and batch norm learns its statistics.
model.backbone.bottom_up.freeze_at = 0
model.backbone.bottom_up.stem.norm = "BN"
model.backbone.bottom_up.stages.depth = 18
model.backbone.bottom_up.stages.norm = "BN"
del model.backbone.bottom_up.stages.stride_in_1x1  # basic blocks have no 1x1
model.backbone.out_channels = 64
model.head.predictor.in_channels = 64
model.head.cls_conv_dims = [64, 64, 64, 64]
model.head.box_conv_dims = [64, 64, 64, 64]
model.num_classes = 3
model.pixel_std = [57.375, 57.120, 58.395]
