# SPDX-License-Identifier: Apache-2.0
"""DPE and PDNet under SAPD's soft anchor weights in the small-data experiment."""

from ....configs.common.models.soft_weights import soften
from .composed_dpe_pdnet_R_18_FPN_bccd import dataloader, lr_multiplier, model, optimizer, train

soften(model)
