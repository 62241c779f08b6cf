# SPDX-License-Identifier: Apache-2.0
"""SAPD's baseline, FSAF without anchors, in the small-data experiment."""

from .sapd_R_18_FPN_bccd_sw import dataloader, lr_multiplier, model, optimizer, train

model.assigner.options.use_soft_weights = False
