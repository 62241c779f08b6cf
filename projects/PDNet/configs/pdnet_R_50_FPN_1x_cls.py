# SPDX-License-Identifier: Apache-2.0
"""PDNet with only the classes decoupled, COCO 1x: 40.6 AP on val2017 in the paper (Table I)."""

from detectron2.config import LazyCall as L

from d2_decouple.modeling import GridPoints

from .pdnet_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.head.predictor.update(box_points=L(GridPoints)(num_points=4), box_levels=[0])
