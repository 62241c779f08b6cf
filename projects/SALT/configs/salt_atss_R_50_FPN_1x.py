# SPDX-License-Identifier: Apache-2.0
"""SALT on ATSS, ResNet-50-FPN, COCO 1x. Not in the paper, without SDR."""

from detectron2.config import LazyCall as L

from d2_decouple.modeling import SALT, GIoUTerm, SALTOptions, coarse_boxes

from ....configs.baselines.atss_R_50_FPN_1x import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.head.aligner = L(SALT)(
    channels="${...backbone.out_channels}", num_levels=5, options=L(SALTOptions)()
)
model.head.update(cls_conv_dims=[256, 256, 256], box_conv_dims=[256, 256, 256])
model.losses.loss_box_coarse = L(GIoUTerm)(boxes=coarse_boxes)
