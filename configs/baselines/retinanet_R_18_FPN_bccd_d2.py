# SPDX-License-Identifier: Apache-2.0
"""Detectron2's own RetinaNet in the small-data experiment, with its own values for COCO and with
group norm in its head, as FCOS has it."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import FPN
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead

from d2_decouple.layers.norms import group_norm

from ..common.data.bccd import dataloader
from ..common.schedules.bccd import lr_multiplier, optimizer, train
from .fcos_R_18_FPN_bccd import model as _ours

model = L(RetinaNet)(
    backbone=_ours.backbone,
    head=L(RetinaNetHead)(
        input_shape=[L(ShapeSpec)(channels="${....backbone.out_channels}") for _ in range(5)],
        num_classes="${..num_classes}",
        num_anchors=9,
        conv_dims=[64, 64, 64, 64],
        prior_prob=0.01,
        # Without a norm, weights of 0.01 on 64 channels let a signal shrink by a factor of six in
        # each convolution: after 800 iterations it had learned its biases and nothing else.
        norm=group_norm,
    ),
    anchor_generator=L(DefaultAnchorGenerator)(
        # Three octave thirds of four strides, in three shapes.
        sizes=[
            [4 * stride * 2 ** (third / 3) for third in range(3)] for stride in _ours.head.strides
        ],
        aspect_ratios=[0.5, 1.0, 2.0],
        strides=_ours.head.strides,
        offset=0.0,
    ),
    box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
    anchor_matcher=L(Matcher)(
        thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True
    ),
    num_classes=_ours.num_classes,
    head_in_features=_ours.head_in_features,
    pixel_mean=_ours.pixel_mean,
    pixel_std=_ours.pixel_std,
    input_format=_ours.input_format,
)
model.backbone._target_ = FPN
# P6 comes from C5 here.
model.backbone.top_block.update(in_feature="res5", in_channels=512)
