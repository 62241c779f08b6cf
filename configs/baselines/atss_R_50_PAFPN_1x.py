# SPDX-License-Identifier: Apache-2.0
"""ATSS with PANet's bottom-up path, COCO 1x: 39.6 AP in TSCODE's paper (Table 6)."""

from d2_decouple.modeling import PAFPN

from .atss_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.backbone._target_ = PAFPN
