# SPDX-License-Identifier: Apache-2.0
"""SAPD, ResNet-50-FPN, COCO 1x: 38.8 AP on val2017 in the paper (Table 2).

Soft-weighted points, soft-selected levels and BFP. Its feature-selection network alone, trained and
not used (37.1 AP in the paper, without BFP), is ``sapd_R_50_FPN_1x_nobfp`` with
``model.assigner.options.use_soft_levels=False model.assigner.options.select_train_only=True``.
"""

from d2_decouple.modeling import BFP

from .sapd_R_50_FPN_1x_nobfp import dataloader, lr_multiplier, model, optimizer, train

model.backbone._target_ = BFP
