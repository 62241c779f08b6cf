# SPDX-License-Identifier: Apache-2.0
"""SALT-Net and DPE under SAPD's soft anchor weights in the small-data experiment."""

from ....configs.common.models.soft_weights import soften
from ...SALT.configs.salt_R_18_FPN_bccd_dpe import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

# GFL's boxes are weighted by scores, whose sum is divided by whatever it is.
soften(model, box_minimum=1e-12)
