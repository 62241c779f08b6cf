# SPDX-License-Identifier: Apache-2.0
"""SALT-Net, ResNeXt-101-32x4d-DCN-FPN, COCO 2x: 50.2 AP on test-dev in the paper (Table 5).

Res3 deforms, too, and the last convolution of both towers; the pyramid has norms.
"""

from d2_decouple.layers.deform import deform_from_res3
from d2_decouple.layers.deform_tower import deform_last_tower

from .salt_X_101_32x4d_DCN_FPN_2x_ms import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.block = deform_from_res3
model.backbone.norm = "GN"
model.backbone.top_block.norm = "GN"
model.head.tower = deform_last_tower
