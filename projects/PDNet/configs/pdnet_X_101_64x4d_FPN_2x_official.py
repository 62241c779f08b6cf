# SPDX-License-Identifier: Apache-2.0
"""For evaluating the authors' ResNeXt-101-64x4d weights, of 2x and of 2xx (see ResNet-50's)."""

from .pdnet_R_50_FPN_2x_official import dataloader, lr_multiplier, model, optimizer, train
from .pdnet_X_101_64x4d_FPN_2x import model as _host

model.backbone.bottom_up = _host.backbone.bottom_up
