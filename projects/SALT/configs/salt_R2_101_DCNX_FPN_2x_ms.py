# SPDX-License-Identifier: Apache-2.0
"""SALT-Net, Res2Net-101-v1d-26w4s-DCN-FPN, COCO 2x: 51.5 AP on test-dev in the paper (Table 5).

Res3 deforms, too, and the last convolution of both towers; the pyramid has norms.
"""

from d2_decouple.layers.deform_tower import deform_last_tower
from d2_decouple.layers.res2net import res2net_deform_from_res3

from .salt_R2_101_DCN_FPN_2x_ms import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.block_class = res2net_deform_from_res3
model.backbone.norm = "GN"
model.backbone.top_block.norm = "GN"
model.head.tower = deform_last_tower
