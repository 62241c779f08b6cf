# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN with one regressor, ResNet-101-FPN, VOC: 56.6 AP in the paper (Table III).

Lambda is 1, which the paper and the authors' code agree on here.
"""

from .decoupled_rcnn_R_101_FPN_voc import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.box_branches = model.roi_heads.box_branches[:1]
model.roi_heads.update(box_loss_weight=1.0, stage_loss_weights=[1.0])
