# SPDX-License-Identifier: Apache-2.0
"""For evaluating the authors' ResNet-101 weights, of 2x and of 2xx (see the one of ResNet-50)."""

from .pdnet_R_50_FPN_2x_official import dataloader, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages.depth = 101
