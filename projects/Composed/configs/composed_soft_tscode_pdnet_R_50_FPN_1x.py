# SPDX-License-Identifier: Apache-2.0
"""TSCODE and PDNet under SAPD's soft anchor weights, COCO 1x, which no paper has."""

from ....configs.common.models.soft_weights import soften
from ...TSCODE.configs.tscode_pdnet_R_50_FPN_1x import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

soften(model)
