# SPDX-License-Identifier: Apache-2.0
"""TSCODE's box half (DPE) under PDNet's predictor in the small-data experiment."""

from detectron2.config import LazyCall as L

from d2_decouple.modeling import TSCODE, TSCODEOptions

from ...PDNet.configs.pdnet_R_18_FPN_bccd import dataloader, lr_multiplier, model, optimizer, train

model.head.context = L(TSCODE)(
    channels="${...backbone.out_channels}", options=L(TSCODEOptions)(use_sce=False)
)
model.head_in_features = ["res2", *model.head_in_features]
