# SPDX-License-Identifier: Apache-2.0
"""SALT-Net in the small-data experiment; its detections are the coarse boxes (S1 in the paper)."""

from d2_decouple.modeling import coarse_boxes

from .salt_R_18_FPN_bccd import dataloader, lr_multiplier, model, optimizer, train

model.selection.boxes = coarse_boxes
