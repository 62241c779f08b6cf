# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN, three stages, ResNet-50-FPN, COCO 1x, with the paper's values.

Lambda is the same as the code's, stages count alike (Eq. 8), and scores begin at 0.05.
"""

from .decoupled_rcnn_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.roi_heads.update(box_loss_weight=0.5, stage_loss_weights=[1.0, 1.0, 1.0])
model.roi_heads.selection.test_score_thresh = 0.05
