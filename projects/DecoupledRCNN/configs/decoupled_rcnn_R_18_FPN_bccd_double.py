# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN with Double-Head's convolutions in one regressor, in the small-data
experiment."""

from detectron2.config import LazyCall as L

from d2_decouple.modeling import ConvBoxBranch, ConvHead

from .decoupled_rcnn_R_18_FPN_bccd_single import dataloader, lr_multiplier, model, optimizer, train

(_branch,) = model.roi_heads.box_branches
_branch._target_ = ConvBoxBranch
# A quarter of the channels, as of the fully connected layers.
_branch.head = L(ConvHead)(in_channels="${.....backbone.out_channels}", out_channels=256)
