# SPDX-License-Identifier: Apache-2.0
"""BFP alone on SAPD's baseline, ResNet-50-FPN, COCO 1x: 36.8 AP on val2017 (Table 2)."""

from d2_decouple.modeling import BFP

from .sapd_R_50_FPN_1x_baseline import dataloader, lr_multiplier, model, optimizer, train

model.backbone._target_ = BFP
