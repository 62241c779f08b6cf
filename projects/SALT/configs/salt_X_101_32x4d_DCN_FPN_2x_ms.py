# SPDX-License-Identifier: Apache-2.0
"""SALT-Net, ResNeXt-101-32x4d-DCN-FPN, COCO 2x: 49.8 AP on test-dev in the paper (Table 5).

Res4 and res5 deform. The paper calls the network 32x8d and trained it without self-distillation;
the authors' code has 32x4d.
"""

from d2_decouple.layers.deform import deform_from_res4, resnext_block

from .salt_R_101_FPN_2x_ms import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.update(
    block_class=resnext_block, num_groups=32, width_per_group=4, block=deform_from_res4
)
# torchvision and Detectron2 have no weights of this network; timm's
# (timm://resnext101_32x4d.gluon_in1k) fit as well, but were trained elsewhere.
train.init_checkpoint = (
    "https://download.openmmlab.com/pretrain/third_party/resnext101_32x4d-a5af3160.pth"
)
