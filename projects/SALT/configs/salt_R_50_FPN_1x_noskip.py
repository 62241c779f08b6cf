# SPDX-License-Identifier: Apache-2.0
"""SALT without the skip connection, COCO 1x: 42.1 AP on val2017 in the paper (Table 1, row 6)."""

from .salt_R_50_FPN_1x_nosdr import dataloader, lr_multiplier, model, optimizer, train

model.head.aligner.options.use_skip = False
