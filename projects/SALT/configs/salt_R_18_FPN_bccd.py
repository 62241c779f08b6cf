# SPDX-License-Identifier: Apache-2.0
"""SALT-Net, which is SALT on GFLv2, in the small-data experiment."""

from detectron2.config import LazyCall as L

from d2_decouple.modeling import (
    SALT,
    GIoUTerm,
    SALTOptions,
    SelfDistillationTerm,
    coarse_boxes,
)

from ....configs.baselines.gflv2_R_18_FPN_bccd import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.head.aligner = L(SALT)(
    channels="${...backbone.out_channels}", num_levels=5, options=L(SALTOptions)()
)
model.head.update(cls_conv_dims=[64, 64, 64], box_conv_dims=[64, 64, 64])
model.losses.loss_box_coarse = L(GIoUTerm)(boxes=coarse_boxes)
model.losses.loss_self_distillation = L(SelfDistillationTerm)(score="${...selection.score}")
