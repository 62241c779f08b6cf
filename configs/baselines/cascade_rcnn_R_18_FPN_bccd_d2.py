# SPDX-License-Identifier: Apache-2.0
"""Detectron2's own Cascade R-CNN in the small-data experiment."""

from ..common.models.cascade_rcnn import model
from .faster_rcnn_R_18_FPN_bccd_d2 import dataloader, lr_multiplier, optimizer, train
from .faster_rcnn_R_18_FPN_bccd_d2 import model as _faster

model.update(backbone=_faster.backbone, proposal_generator=_faster.proposal_generator)
model.roi_heads.update(num_classes=3, batch_size_per_image=128)
for _head, _predictor in zip(
    model.roi_heads.box_heads, model.roi_heads.box_predictors, strict=True
):
    _head.fc_dims = [256, 256]
    _predictor.input_shape.channels = 256
model.update({key: _faster[key] for key in ("pixel_mean", "pixel_std", "input_format")})
