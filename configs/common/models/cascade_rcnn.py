# SPDX-License-Identifier: Apache-2.0
"""Cascade R-CNN with ResNet-50-FPN, all of it Detectron2's."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers

from .faster_rcnn import model

_stages = [(0.5, [10, 10, 5, 5]), (0.6, [20, 20, 10, 10]), (0.7, [30, 30, 15, 15])]

_head = model.roi_heads.pop("box_head")
_head.input_shape.channels = "${.....backbone.out_channels}"
del model.roi_heads.box_predictor, model.roi_heads.proposal_matcher
model.roi_heads._target_ = CascadeROIHeads
model.roi_heads.update(
    box_heads=[_head for _ in _stages],
    box_predictors=[
        L(FastRCNNOutputLayers)(
            input_shape=L(ShapeSpec)(channels=1024),
            test_score_thresh=0.05,
            box2box_transform=L(Box2BoxTransform)(weights=weights),
            cls_agnostic_bbox_reg=True,
            num_classes="${...num_classes}",
        )
        for _, weights in _stages
    ],
    proposal_matchers=[
        L(Matcher)(thresholds=[overlap], labels=[0, 1], allow_low_quality_matches=False)
        for overlap, _ in _stages
    ],
)
