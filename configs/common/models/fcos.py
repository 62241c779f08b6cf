# SPDX-License-Identifier: Apache-2.0
"""FCOS with ResNet-50-FPN as the papers' baselines have it: the plain host of every slot."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7

from d2_decouple.modeling import (
    FPN,
    BestPairs,
    DenseHead,
    FCOSAssigner,
    FCOSPredictor,
    FocalTerm,
    GIoUTerm,
    HardNMS,
    OneStageDetector,
    QualityTerm,
    Selection,
    SharedContext,
    clip_to_image,
    loss_terms,
    product_score,
)

model = L(OneStageDetector)(
    backbone=L(FPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
            stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=True, norm="FrozenBN"),
            out_features=["res2", "res3", "res4", "res5"],
            freeze_at=2,
        ),
        in_features=["res3", "res4", "res5"],
        out_channels=256,
        # P6 comes from P5, not C5 (FCOS, TPAMI version, Sec. 2.2).
        top_block=L(LastLevelP6P7)(
            in_channels="${..out_channels}", out_channels="${..out_channels}", in_feature="p5"
        ),
    ),
    head=L(DenseHead)(
        context=L(SharedContext)(channels="${...backbone.out_channels}"),
        predictor=L(FCOSPredictor)(num_classes="${...num_classes}", in_channels=256),
        strides=[8, 16, 32, 64, 128],
        offset=0.5,  # a cell stands for its middle
        cls_conv_dims=[256, 256, 256, 256],
        box_conv_dims=[256, 256, 256, 256],
        norm="GN",
    ),
    assigner=L(FCOSAssigner)(num_classes="${..num_classes}", radius=1.5),
    losses=L(loss_terms)(
        loss_cls=L(FocalTerm)(),
        loss_box_reg=L(GIoUTerm)(),
        loss_quality=L(QualityTerm)(),
    ),
    selection=L(Selection)(
        score=product_score,
        candidates=L(BestPairs)(test_score_thresh=0.05, test_topk_candidates=1000),
        nms=L(HardNMS)(test_nms_thresh=0.6),
        clip=clip_to_image,
    ),
    num_classes=80,
    head_in_features=["p3", "p4", "p5", "p6", "p7"],
    pixel_mean=[103.530, 116.280, 123.675],
    pixel_std=[1.0, 1.0, 1.0],
    input_format="BGR",
)
