# SPDX-License-Identifier: Apache-2.0
"""Detectron2's variant of FCOS: other score, threshold, clipping, box weights and image sizes.

Its moving average of the number of positives is not followed: the normaliser here is exact.
"""

from d2_decouple.modeling import geometric_mean_score, unit_weight

from ..common.schedules.coco import multiplier
from ..common.schedules.default import optimizer
from .fcos_R_50_FPN_1x import dataloader, model, train

# Warm-up and a plain optimizer as there: 1,000 iterations from a thousandth; norms do not decay.
lr_multiplier = multiplier(1, 1000, 0.001)
optimizer.params.weight_decay_norm = 0.0
model.head.offset = 0.5  # the same here; stated, since the methods differ in it
model.assigner.box_weight = unit_weight
model.selection.score = geometric_mean_score
model.selection.candidates.test_score_thresh = 0.2
model.selection.clip = None
dataloader.train.mapper.augmentations[0].short_edge_length = (640, 672, 704, 736, 768, 800)
dataloader.train.mapper.augmentations[0].sample_style = "choice"
