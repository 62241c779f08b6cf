# SPDX-License-Identifier: Apache-2.0
"""DPE and PDNet under SAPD's soft anchor weights, COCO 1x, which no paper has."""

from ....configs.common.models.soft_weights import soften
from .composed_dpe_pdnet_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

soften(model)
