# SPDX-License-Identifier: Apache-2.0
"""The detail-preserving features for both branches, as a neck: 39.2 AP in the paper (Table 6)."""

from .tscode_fcos_R_50_FPN_1x_dpe import dataloader, lr_multiplier, model, optimizer, train

model.head.context.options.dpe_as_neck = True
