# SPDX-License-Identifier: Apache-2.0
"""SALT-Net, COCO 1x; its detections are the coarse boxes (S1): 42.1 AP in the paper (Table 4)."""

from d2_decouple.modeling import coarse_boxes

from .salt_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.selection.boxes = coarse_boxes
