# SPDX-License-Identifier: Apache-2.0
"""SAPD's soft anchor weights on ATSS, ResNet-50-FPN, COCO 1x. Not in the paper."""

from detectron2.config import LazyCall as L

from d2_decouple.modeling import WeightedQualityTerm

from ....configs.baselines.atss_R_50_FPN_1x import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)
from ....configs.common.models.soft_weights import soften

soften(model, exponent=1.0)
model.losses.loss_quality = L(WeightedQualityTerm)()
