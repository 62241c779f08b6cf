# SPDX-License-Identifier: Apache-2.0
"""PDNet without decoupling, in the small-data experiment."""

from detectron2.config import LazyCall as L

from d2_decouple.modeling import GridPoints

from .pdnet_R_18_FPN_bccd_cls import dataloader, lr_multiplier, model, optimizer, train

model.head.predictor.class_points = L(GridPoints)(num_points=1)
