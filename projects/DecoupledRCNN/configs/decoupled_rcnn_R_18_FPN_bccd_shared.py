# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN with one regressor that reads the classifier's layers, in the small-data
experiment."""

from d2_decouple.modeling import SharedBoxBranch

from .decoupled_rcnn_R_18_FPN_bccd_single import dataloader, lr_multiplier, model, optimizer, train

(_branch,) = model.roi_heads.box_branches
_branch._target_ = SharedBoxBranch
del _branch.head
_branch.in_features = "${...class_branch.head.fc_dims[1]}"
