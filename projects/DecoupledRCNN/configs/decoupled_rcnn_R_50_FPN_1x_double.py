# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN with Double-Head's convolutions in one regressor, COCO 1x: 40.0 AP on val2017 in
the paper (Table XI)."""

from .decoupled_rcnn_R_50_FPN_1x_double_cascade import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.roi_heads.box_branches = model.roi_heads.box_branches[:1]
model.roi_heads.stage_loss_weights = [1.0]
