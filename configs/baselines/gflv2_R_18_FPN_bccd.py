# SPDX-License-Identifier: Apache-2.0
"""GFLv2 in the small-data experiment: GFL with another predictor."""

from d2_decouple.modeling import GFLv2Predictor, product_score

from .gfl_R_18_FPN_bccd import dataloader, lr_multiplier, model, optimizer, train

model.head.predictor._target_ = GFLv2Predictor
model.selection.score = product_score
