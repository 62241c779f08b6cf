# SPDX-License-Identifier: Apache-2.0
"""SALT-Net without self-distillation in the small-data experiment."""

from .salt_R_18_FPN_bccd import dataloader, lr_multiplier, model, optimizer, train

del model.losses.loss_self_distillation
