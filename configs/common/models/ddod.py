# SPDX-License-Identifier: Apache-2.0
"""DDOD with ResNet-50-FPN: ATSS with other towers, another assigner and the terms to it."""

from detectron2.config import LazyCall as L

from d2_decouple.layers.deform_tower import deform_first_tower
from d2_decouple.modeling import (
    BoxQualityTerm,
    DDODAssigner,
    FocalTerm,
    GIoUTerm,
    box_targets,
    loss_terms,
)

from .atss import model

model.head.offset = 0.0  # as ATSS's: anchors are centred on the corners of cells
model.head.tower = deform_first_tower
model.assigner = L(DDODAssigner)(num_classes="${..num_classes}", num_levels=5)
model.losses = L(loss_terms)(
    loss_cls=L(FocalTerm)(),
    loss_box_reg=L(GIoUTerm)(weight=2.0, targets=box_targets),
    loss_quality=L(BoxQualityTerm)(),  # the predicted boxes' IoU
)
