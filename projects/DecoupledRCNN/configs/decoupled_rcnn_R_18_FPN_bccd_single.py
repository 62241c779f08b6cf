# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN with one regressor in the small-data experiment."""

from .decoupled_rcnn_R_18_FPN_bccd import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.box_branches = model.roi_heads.box_branches[:1]
model.roi_heads.update(box_loss_weight=1.0, stage_loss_weights=[1.0])
