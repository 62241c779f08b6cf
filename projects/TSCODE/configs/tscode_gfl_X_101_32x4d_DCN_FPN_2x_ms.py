# SPDX-License-Identifier: Apache-2.0
"""TSCODE on GFL, ResNeXt-101-32x4d-DCN-FPN, COCO 2x: 50.0 AP on test-dev in the paper (Table 5).

Res4 and res5 deform, as in GFL's recipe, and so does the last convolution of both towers, as in
VarifocalNet's.
"""

from d2_decouple.layers.deform import deform_from_res4
from d2_decouple.layers.deform_tower import deform_last_tower

from .tscode_gfl_X_101_32x4d_FPN_2x_ms import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.block = deform_from_res4
model.head.tower = deform_last_tower
