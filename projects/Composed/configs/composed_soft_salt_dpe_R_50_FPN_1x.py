# SPDX-License-Identifier: Apache-2.0
"""SALT-Net and DPE under SAPD's soft anchor weights, COCO 1x, which no paper has."""

from ....configs.common.models.soft_weights import soften
from ...SALT.configs.salt_dpe_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

# GFL's boxes are weighted by scores, whose sum is divided by whatever it is.
soften(model, box_minimum=1e-12)
