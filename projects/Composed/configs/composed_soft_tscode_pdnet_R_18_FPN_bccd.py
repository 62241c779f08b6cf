# SPDX-License-Identifier: Apache-2.0
"""TSCODE and PDNet under SAPD's soft anchor weights in the small-data experiment."""

from detectron2.config import LazyCall as L

from d2_decouple.modeling import SoftWeights

from ...TSCODE.configs.tscode_pdnet_R_18_FPN_bccd import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.assigner = L(SoftWeights)(host=model.assigner)
model.assigner.host.num_classes = "${...num_classes}"  # of the detector, one node further out
