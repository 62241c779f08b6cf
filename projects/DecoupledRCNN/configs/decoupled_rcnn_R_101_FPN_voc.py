# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN, three stages, ResNet-101-FPN, Pascal VOC, with the paper's scores.

The paper's numbers of it are in tables alone (IV to VII).
"""

from ....configs.common.data.voc import dataloader
from ....configs.common.schedules.epochs import iterations, multiplier
from .decoupled_rcnn_R_101_FPN_1x import model, optimizer, train

model.roi_heads.num_classes = 20
model.roi_heads.selection.test_score_thresh = 0.05
_voc = dict(images=16551, batch=8)
train.max_iter = iterations(12, **_voc)
lr_multiplier = multiplier(12, [9], **_voc)
optimizer.lr = 0.005
