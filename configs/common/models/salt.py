# SPDX-License-Identifier: Apache-2.0
"""SALT-Net with ResNet-50-FPN: GFLv2 whose tasks read at points of their own; with SDR."""

from detectron2.config import LazyCall as L

from d2_decouple.modeling import (
    SALT,
    GIoUTerm,
    SALTOptions,
    SelfDistillationTerm,
    coarse_boxes,
)

from .gflv2 import model

model.head.aligner = L(SALT)(
    channels="${...backbone.out_channels}", num_levels=5, options=L(SALTOptions)()
)
model.head.update(cls_conv_dims=[256, 256, 256], box_conv_dims=[256, 256, 256])
model.losses.loss_box_coarse = L(GIoUTerm)(boxes=coarse_boxes)
model.losses.loss_self_distillation = L(SelfDistillationTerm)(score="${...selection.score}")
