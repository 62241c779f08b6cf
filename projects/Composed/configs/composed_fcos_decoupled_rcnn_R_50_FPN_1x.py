# SPDX-License-Identifier: Apache-2.0
"""FCOS as the proposal generator of Decoupled R-CNN, COCO 1x, which no paper has."""

from ....configs.baselines.fcos_R_50_FPN_1x import dataloader, lr_multiplier, optimizer, train
from ....configs.baselines.fcos_R_50_FPN_1x import model as _dense
from ....configs.common.models.dense_rcnn import dense_rcnn
from ...DecoupledRCNN.configs.decoupled_rcnn_R_50_FPN_1x import model as _rcnn

model = dense_rcnn(_dense, _rcnn)
