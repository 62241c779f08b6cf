# SPDX-License-Identifier: Apache-2.0
"""PDNet, ResNeXt-101-64x4d-DCN-FPN, COCO 2x, scales far apart, and test-time augmentation.

52.3 AP on test-dev in the paper (Table VII), and 50.1 with ``train.tta.enabled=false``. Which
stages deform, and how, the paper does not say: here it is res3 to res5, with learned factors.
"""

from d2_decouple.layers.deform import deform_from_res3

from .pdnet_X_101_64x4d_FPN_2xx import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.update(block=deform_from_res3, deform_modulated=True)
# The 13 sizes of ATSS, which the paper follows, each also mirrored.
train.tta.update(
    enabled=True,
    short_edge_lengths=[400, 500, 600, 640, 700, 800, 900, 1000, 1100, 1200, 1300, 1400, 1800],
    max_size=3000,
)
train.eval_period = 0  # 26 forwards for each image: once, at the end
