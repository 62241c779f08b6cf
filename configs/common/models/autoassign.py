# SPDX-License-Identifier: Apache-2.0
"""AutoAssign with ResNet-50-FPN: FCOS's network, and all that it learns from is its own."""

from detectron2.config import LazyCall as L

from d2_decouple.modeling import (
    AutoAssignAssigner,
    AutoAssignPredictor,
    CenterPriorTerm,
    NegativeTerm,
    PositiveTerm,
    loss_terms,
)

from .fcos import model

# P6 comes from C5, as in RetinaNet; the paper does not say, the authors' code does.
model.backbone.top_block.update(in_feature="res5", in_channels=2048)
model.head.offset = 0.0  # a cell stands for its corner
model.head.prior_prob = 0.02
model.head.predictor = L(AutoAssignPredictor)(num_classes="${...num_classes}", in_channels=256)
model.assigner = L(AutoAssignAssigner)(num_classes="${..num_classes}")
model.losses = L(loss_terms)(
    loss_pos=L(PositiveTerm)(),
    loss_neg=L(NegativeTerm)(),
    loss_center=L(CenterPriorTerm)(),
)
