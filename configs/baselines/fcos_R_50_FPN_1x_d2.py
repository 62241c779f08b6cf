# SPDX-License-Identifier: Apache-2.0
"""Detectron2's variant of FCOS: other score, threshold, clipping, box weights and image sizes.

Its moving average of the number of positives is not followed: the normaliser here is exact.
"""

from d2_decouple.modeling import geometric_mean_score, unit_weight

from .fcos_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.head.offset = 0.5
model.assigner.box_weight = unit_weight
model.selection.score = geometric_mean_score
model.selection.candidates.test_score_thresh = 0.2
model.selection.clip = None
dataloader.train.mapper.augmentations[0].short_edge_length = (640, 672, 704, 736, 768, 800)
dataloader.train.mapper.augmentations[0].sample_style = "choice"
