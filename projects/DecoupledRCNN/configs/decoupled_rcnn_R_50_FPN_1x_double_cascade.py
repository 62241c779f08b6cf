# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN with Double-Head's convolutions in three regression stages, COCO 1x: 40.4 AP on
val2017 in the paper (Table XI)."""

from detectron2.config import LazyCall as L

from d2_decouple.modeling import ConvBoxBranch, ConvHead

from .decoupled_rcnn_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

for _branch in model.roi_heads.box_branches:
    _branch._target_ = ConvBoxBranch
    _branch.head = L(ConvHead)(in_channels="${.....backbone.out_channels}", out_channels=1024)
