# SPDX-License-Identifier: Apache-2.0
"""Soft-weighted points alone, ResNet-50-FPN, COCO 1x: 37.0 AP on val2017 (Table 2)."""

from .sapd_R_50_FPN_1x_nobfp import dataloader, lr_multiplier, model, optimizer, train

model.assigner.options.use_soft_levels = False
del model.losses.loss_select
