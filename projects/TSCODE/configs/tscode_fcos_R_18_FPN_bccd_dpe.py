# SPDX-License-Identifier: Apache-2.0
"""Half of TSCODE, detail-preserving encoding, on FCOS in the small-data experiment."""

from .tscode_fcos_R_18_FPN_bccd import dataloader, lr_multiplier, model, optimizer, train

model.head.context.options.use_sce = False
model.head.cls_conv_dims = [64, 64, 64, 64]
