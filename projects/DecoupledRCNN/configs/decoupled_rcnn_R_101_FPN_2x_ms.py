# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN, ResNet-101-FPN, COCO 2x at several sizes, with soft-NMS: 45.3 AP on test-dev in
the paper (Table IX)."""

from detectron2.config import LazyCall as L

from d2_decouple.modeling import LinearDecay, SoftNMS

from .decoupled_rcnn_R_101_FPN_2x import dataloader, lr_multiplier, model, optimizer, train

dataloader.train.mapper.augmentations[0].update(
    short_edge_length=[640, 672, 704, 736, 768, 800], sample_style="choice"
)
model.roi_heads.selection.max_detections_per_image = 100
model.roi_heads.selection.nms = L(SoftNMS)(
    decay=L(LinearDecay)(test_nms_thresh=0.5),
    test_score_thresh=0.001,
    max_detections="${..max_detections_per_image}",
)
