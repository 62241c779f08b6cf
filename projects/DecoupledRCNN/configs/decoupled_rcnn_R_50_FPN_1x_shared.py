# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN with one regressor that reads the classifier's layers ("shared-FC"), COCO 1x.

Table II compares it with `decoupled_rcnn_R_50_FPN_1x_single_paper`, on VOC, with ResNet-101 and
`model.proposal_generator.nms_thresh_reg=0.7`.
"""

from d2_decouple.modeling import SharedBoxBranch

from .decoupled_rcnn_R_50_FPN_1x_single_paper import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

(_branch,) = model.roi_heads.box_branches
_branch._target_ = SharedBoxBranch
del _branch.head
_branch.in_features = "${...class_branch.head.fc_dims[1]}"
