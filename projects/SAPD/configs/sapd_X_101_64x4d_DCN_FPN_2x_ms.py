# SPDX-License-Identifier: Apache-2.0
"""SAPD, ResNeXt-101-64x4d-DCN-FPN, COCO 2x: 47.4 AP on test-dev in the paper (Table 6).

Res3 to res5 deform, without learned factors: the paper cites the first version of DCN.
"""

from d2_decouple.layers.deform import deform_from_res3

from .sapd_X_101_64x4d_FPN_2x_ms import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.block = deform_from_res3
