# SPDX-License-Identifier: Apache-2.0
"""Both tasks read at the box points, COCO 1x: 41.3 AP on val2017 in the paper (Table 1, row 4)."""

from .salt_R_50_FPN_1x_noskip import dataloader, lr_multiplier, model, optimizer, train

model.head.aligner.options.class_points = "box"
