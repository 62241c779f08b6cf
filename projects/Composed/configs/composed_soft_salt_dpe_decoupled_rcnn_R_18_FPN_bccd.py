# SPDX-License-Identifier: Apache-2.0
"""SALT-Net with DPE and soft anchor weights as the proposal generator of Decoupled R-CNN, in the
small-data experiment."""

from ....configs.common.models.dense_rcnn import dense_rcnn
from ...DecoupledRCNN.configs.decoupled_rcnn_R_18_FPN_bccd import model as _rcnn
from .composed_soft_salt_dpe_R_18_FPN_bccd import dataloader, lr_multiplier, optimizer, train
from .composed_soft_salt_dpe_R_18_FPN_bccd import model as _dense

model = dense_rcnn(_dense, _rcnn)
