# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN with ResNet-50-FPN and three regression stages: Faster R-CNN with another RPN
and other ROI heads.

Values are those of the authors' public code; `decoupled_rcnn_R_50_FPN_1x_paper` has the paper's.
"""

from detectron2.config import LazyCall as L
from detectron2.modeling.matcher import Matcher

from d2_decouple.layers.boxes import BoxTransform
from d2_decouple.modeling import (
    FPN,
    BoxBranch,
    ClassBranch,
    DecoupledROIHeads,
    DecoupledRPN,
    FCHead,
    HardNMS,
    RegionSelection,
)

from .faster_rcnn import model

model.backbone._target_ = FPN  # the same, with frozen norms folded into convolutions
model.backbone.passed_on = []
model.proposal_generator._target_ = DecoupledRPN
# nms_thresh and post_nms_topk are those of the class branch, and of the test.
model.proposal_generator.update(
    box2box_transform=L(BoxTransform)(), nms_thresh_reg=0.85, post_nms_topk_reg=1000
)


def _box_branch(deviations: list[float], **options: object) -> object:
    return L(BoxBranch)(
        head=L(FCHead)(in_channels="${.....backbone.out_channels}", fc_dims=[1024, 1024]),
        transform=L(BoxTransform)(weights=[1 / x for x in deviations]),
        **options,
    )


del model.roi_heads.box_head, model.roi_heads.box_predictor
model.roi_heads._target_ = DecoupledROIHeads
model.roi_heads.update(
    class_branch=L(ClassBranch)(
        head=L(FCHead)(in_channels="${....backbone.out_channels}", fc_dims=[1024, 1024]),
        num_classes="${..num_classes}",
    ),
    box_branches=[
        # The first has a change for each class, later ones have one for all.
        _box_branch([0.1, 0.1, 0.2, 0.2], num_classes="${...num_classes}"),
        _box_branch([0.05, 0.05, 0.1, 0.1]),
        _box_branch([0.033, 0.033, 0.067, 0.067]),
    ],
    box_matcher=L(Matcher)(thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False),
    box_batch_size_per_image=512,
    box_loss_weight=0.5,
    stage_loss_weights=[1.0, 0.5, 0.25],
    selection=L(RegionSelection)(test_score_thresh=0.001, nms=L(HardNMS)(test_nms_thresh=0.5)),
)
