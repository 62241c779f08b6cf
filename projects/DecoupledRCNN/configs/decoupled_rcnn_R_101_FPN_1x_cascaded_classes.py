# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN with three classifiers, too, ResNet-101-FPN, COCO 1x: 41.8 AP (Table X)."""

from detectron2.config import LazyCall as L
from detectron2.modeling.matcher import Matcher

from d2_decouple.modeling import CascadedClassROIHeads, ClassBranch, FCHead

from .decoupled_rcnn_R_101_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

del model.roi_heads.box_matcher
model.roi_heads._target_ = CascadedClassROIHeads
model.roi_heads.update(
    class_branches=[
        L(ClassBranch)(
            head=L(FCHead)(in_channels="${.....backbone.out_channels}", fc_dims=[1024, 1024]),
            num_classes="${...num_classes}",
        )
        for _ in range(2)
    ],
    # The overlaps of Cascade R-CNN, for both branches.
    stage_matchers=[
        L(Matcher)(thresholds=[overlap], labels=[0, 1], allow_low_quality_matches=False)
        for overlap in (0.5, 0.6, 0.7)
    ],
)
