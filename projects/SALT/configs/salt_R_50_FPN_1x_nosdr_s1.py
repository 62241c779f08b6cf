# SPDX-License-Identifier: Apache-2.0
"""Coarse boxes (S1) without self-distillation, COCO 1x: 41.3 AP in the paper (Tables 1 and 4)."""

from d2_decouple.modeling import coarse_boxes

from .salt_R_50_FPN_1x_nosdr import dataloader, lr_multiplier, model, optimizer, train

model.selection.boxes = coarse_boxes
