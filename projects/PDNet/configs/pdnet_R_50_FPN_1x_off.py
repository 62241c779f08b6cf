# SPDX-License-Identifier: Apache-2.0
"""PDNet without decoupling, COCO 1x: 39.5 AP on val2017 in the paper (Table I)."""

from detectron2.config import LazyCall as L

from d2_decouple.modeling import GridPoints

from .pdnet_R_50_FPN_1x_cls import dataloader, lr_multiplier, model, optimizer, train

model.head.predictor.class_points = L(GridPoints)(num_points=1)
