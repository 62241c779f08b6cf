# SPDX-License-Identifier: Apache-2.0
"""Half of TSCODE, semantic context encoding, on FCOS in the small-data experiment."""

from .tscode_fcos_R_18_FPN_bccd import dataloader, lr_multiplier, model, optimizer, train

model.head.context.options.use_dpe = False
model.head_in_features = ["p3", "p4", "p5", "p6", "p7"]
