# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN's slot: two sets of proposals pass through Detectron2's own meta-architecture."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import FPN
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers, StandardROIHeads
from detectron2.structures import pairwise_iou
from detectron2.utils.events import EventStorage
from util import WIDTH, loss_sum, random_input, tiny_resnet, without_gradient

LEVELS = ["p3", "p4", "p5"]
STRIDES = [8, 16, 32]


class TwoSets(list):
    """The class branch's proposals; ``reg`` are the box branch's."""


class TwoDensityRPN(RPN):
    def predict_proposals(self, anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes):
        arguments = (anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes)
        found = super().predict_proposals(*arguments)
        if not self.training:
            return found
        found = TwoSets(found)
        with torch.no_grad():
            decoded = self._decode_proposals(anchors, pred_anchor_deltas)
            found.reg = find_top_rpn_proposals(
                decoded, pred_objectness_logits, image_sizes, 0.85, 200, 400, 0.0, True
            )
        return found


class TwoBranchHeads(StandardROIHeads):
    """Classes on the usual sample; boxes on positives of the other set."""

    def forward(self, images, features, proposals, targets=None):
        if not self.training:
            return super().forward(images, features, proposals, targets)
        self.seen = [proposals, proposals.reg]
        boxes = []
        for found, truth in zip(proposals.reg, targets, strict=True):
            overlap = pairwise_iou(found.proposal_boxes, truth.gt_boxes)
            boxes.append(found[overlap.amax(1) >= 0.3] if len(truth) else found[:0])
        pooled = self.box_pooler(
            [features[name] for name in self.box_in_features], [x.proposal_boxes for x in boxes]
        )
        deltas = self.box_predictor(self.box_head(pooled))[1]
        _, losses = super().forward(images, features, proposals, targets)
        return proposals, {**losses, "loss_box_reg_stage1": deltas.abs().sum() / 100}


def make_model():
    """Anchors overlap their neighbours by 0.78: one threshold drops them, the other does not."""
    backbone = FPN(tiny_resnet(), ["res3", "res4", "res5"], WIDTH)
    transform = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
    anchors = DefaultAnchorGenerator(
        sizes=[[64], [128], [256]], aspect_ratios=[0.5, 1.0, 2.0], strides=STRIDES, offset=0.0
    )
    rpn = TwoDensityRPN(
        in_features=LEVELS,
        head=StandardRPNHead(in_channels=WIDTH, num_anchors=3),
        anchor_generator=anchors,
        anchor_matcher=Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=transform,
        batch_size_per_image=32,
        positive_fraction=0.5,
        pre_nms_topk=(200, 200),
        post_nms_topk=(400, 400),
        nms_thresh=0.7,
    )
    shape = ShapeSpec(channels=WIDTH, height=3, width=3)
    head = FastRCNNConvFCHead(shape, conv_dims=[], fc_dims=[32])
    roi_heads = TwoBranchHeads(
        num_classes=3,
        batch_size_per_image=32,
        positive_fraction=0.25,
        proposal_matcher=Matcher([0.5], [0, 1]),
        box_in_features=LEVELS,
        box_pooler=ROIPooler(3, [1 / stride for stride in STRIDES], 2, "ROIAlignV2"),
        box_head=head,
        box_predictor=FastRCNNOutputLayers(
            head.output_shape, box2box_transform=transform, num_classes=3
        ),
    )
    return GeneralizedRCNN(
        backbone=backbone,
        proposal_generator=rpn,
        roi_heads=roi_heads,
        pixel_mean=[103.530, 116.280, 123.675],
        pixel_std=[1.0, 1.0, 1.0],
        input_format="BGR",
        vis_period=1,
    )


@pytest.mark.parametrize("objects", [(4, 2), (3, 0), (0, 0)])
def test_two_sets_reach_the_roi_heads_through_detectron2(objects):
    model = make_model()
    inputs = [random_input((96, 128), n) for n in objects]
    with EventStorage() as storage:
        storage.iter = 1
        losses = model(inputs)
        assert storage._vis_data  # Detectron2's own picture of the proposals was drawn
    for_classes, for_boxes = model.roi_heads.seen
    assert len(for_classes) == len(for_boxes) == 2
    assert sum(map(len, for_boxes)) > sum(map(len, for_classes))
    assert torch.isfinite(loss_sum(losses))
    loss_sum(losses).backward()
    assert without_gradient(model) == []


def test_evaluation_has_one_set():
    model = make_model().eval()
    with torch.no_grad():
        assert "instances" in model([random_input((96, 128), 0)])[0]
        images = model.preprocess_image([random_input((96, 128), 0)])
        proposals, _ = model.proposal_generator(images, model.backbone(images.tensor))
    assert not hasattr(proposals, "reg")
