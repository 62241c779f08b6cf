# SPDX-License-Identifier: Apache-2.0
"""SAPD's baseline, FSAF without anchors, ResNet-50-FPN, COCO 1x: 35.9 AP on val2017 (Table 2).

FSAF's ring of ignored cells, which the paper does not mention, is
``model.assigner.options.ignore_scale=0.5``. Inside of it, on levels where an object is not learned,
its cells are negatives, or ignored with ``model.assigner.options.unselected=ignore_class``.
"""

from .sapd_R_50_FPN_1x_sw import dataloader, lr_multiplier, model, optimizer, train

model.assigner.options.use_soft_weights = False
