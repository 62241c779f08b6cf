# SPDX-License-Identifier: Apache-2.0
"""GFLv2 with ResNet-50-FPN: GFL whose score is class times the quality that distributions tell."""

from d2_decouple.modeling import GFLv2Predictor, product_score

from .gfl import model

model.head.predictor._target_ = GFLv2Predictor
model.selection.score = product_score
