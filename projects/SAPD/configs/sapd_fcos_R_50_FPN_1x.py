# SPDX-License-Identifier: Apache-2.0
"""SAPD's soft anchor weights on FCOS, ResNet-50-FPN, COCO 1x. Not in the paper."""

from detectron2.config import LazyCall as L

from d2_decouple.modeling import SoftWeights, WeightedQualityTerm

from ....configs.baselines.fcos_R_50_FPN_1x import (
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

model.assigner = L(SoftWeights)(host=model.assigner, exponent=1.0)
model.assigner.host.num_classes = "${...num_classes}"  # of the detector, one node further out
model.losses.loss_quality = L(WeightedQualityTerm)()
