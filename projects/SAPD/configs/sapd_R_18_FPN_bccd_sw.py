# SPDX-License-Identifier: Apache-2.0
"""SAPD's soft-weighted points alone in the small-data experiment."""

from .sapd_R_18_FPN_bccd_nobfp import dataloader, lr_multiplier, model, optimizer, train

model.assigner.options.use_soft_levels = False
del model.losses.loss_select
