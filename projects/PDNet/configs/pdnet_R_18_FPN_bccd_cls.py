# SPDX-License-Identifier: Apache-2.0
"""PDNet with only the classes decoupled, in the small-data experiment."""

from detectron2.config import LazyCall as L

from d2_decouple.modeling import GridPoints

from .pdnet_R_18_FPN_bccd import dataloader, lr_multiplier, model, optimizer, train

model.head.predictor.update(box_points=L(GridPoints)(num_points=4), box_levels=[0])
