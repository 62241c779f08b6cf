# SPDX-License-Identifier: Apache-2.0
"""SAPD in the small-data experiment."""

from d2_decouple.modeling import BFP

from .sapd_R_18_FPN_bccd_nobfp import dataloader, lr_multiplier, model, optimizer, train

model.backbone._target_ = BFP
