# SPDX-License-Identifier: Apache-2.0
"""Detectron2's own Faster R-CNN in the small-data experiment."""

from ..common.data.bccd import dataloader
from ..common.models.faster_rcnn import model
from ..common.schedules.bccd import lr_multiplier, optimizer, train
from .fcos_R_18_FPN_bccd import model as _fcos

model.backbone.bottom_up = _fcos.backbone.bottom_up
model.backbone.out_channels = 64
# A quarter of the regions of an image of COCO's, which has ten times as many pixels.
model.proposal_generator.update(batch_size_per_image=128, post_nms_topk=(1000, 300))
model.roi_heads.update(num_classes=3, batch_size_per_image=128)
model.roi_heads.box_head.fc_dims = [256, 256]
model.roi_heads.box_predictor.input_shape.channels = 256
model.update({key: _fcos[key] for key in ("pixel_mean", "pixel_std", "input_format")})
