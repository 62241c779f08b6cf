# SPDX-License-Identifier: Apache-2.0
"""Half of TSCODE, semantic context encoding, on FCOS: 39.3 AP in the paper (Table 1)."""

from .tscode_fcos_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

model.head.context.options.use_dpe = False
model.head_in_features = ["p3", "p4", "p5", "p6", "p7"]
