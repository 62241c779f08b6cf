# SPDX-License-Identifier: Apache-2.0
"""SALT-Net, Res2Net-101-v1d-26w4s-DCN-FPN, COCO 2x: 51.1 AP on test-dev in the paper (Table 5).

Res4 and res5 deform. The paper trained it without self-distillation.
"""

from d2_decouple.layers.res2net import DeepStem, res2net_deform_from_res4

from .salt_R_101_FPN_2x_ms import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stem._target_ = DeepStem
model.backbone.bottom_up.stages.block_class = res2net_deform_from_res4
del model.backbone.bottom_up.stages.stride_in_1x1  # it is always in the 3x3
# The authors' weights. timm has other ones of this network (timm://res2net101d).
train.init_checkpoint = (
    "https://download.openmmlab.com/pretrain/third_party/res2net101_v1d_26w_4s_mmdetv2-f0a600f9.pth"
)
