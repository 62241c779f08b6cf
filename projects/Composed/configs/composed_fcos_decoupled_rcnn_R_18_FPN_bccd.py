# SPDX-License-Identifier: Apache-2.0
"""FCOS as the proposal generator of Decoupled R-CNN in the small-data experiment."""

from ....configs.baselines.fcos_R_18_FPN_bccd import dataloader, lr_multiplier, optimizer, train
from ....configs.baselines.fcos_R_18_FPN_bccd import model as _dense
from ....configs.common.models.dense_rcnn import dense_rcnn
from ...DecoupledRCNN.configs.decoupled_rcnn_R_18_FPN_bccd import model as _rcnn

model = dense_rcnn(_dense, _rcnn)
