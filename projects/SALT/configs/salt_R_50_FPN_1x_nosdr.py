# SPDX-License-Identifier: Apache-2.0
"""SALT-Net without self-distillation, COCO 1x: 42.5 AP on val2017 in the paper (Tables 1 and 4)."""

from .salt_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

del model.losses.loss_self_distillation
