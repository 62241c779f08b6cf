# SPDX-License-Identifier: Apache-2.0
"""RepPoints' free points in the place of SALT's, in the small-data experiment."""

from detectron2.config import LazyCall as L

from d2_decouple.modeling import FreePoints

from .salt_R_18_FPN_bccd_nosdr import dataloader, lr_multiplier, model, optimizer, train

model.head.aligner = L(FreePoints)(channels="${...backbone.out_channels}")
