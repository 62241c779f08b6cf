# SPDX-License-Identifier: Apache-2.0
"""SALT-Net and DPE under SAPD's soft anchor weights, COCO 1x, which no paper has."""

from detectron2.config import LazyCall as L

from d2_decouple.modeling import SoftWeights

from ...SALT.configs.salt_dpe_R_50_FPN_1x import dataloader, lr_multiplier, model, optimizer, train

# GFL's boxes are weighted by scores, whose sum is divided by whatever it is.
model.assigner = L(SoftWeights)(host=model.assigner, box_minimum=1e-12)
# Of the detector, one node further out.
model.assigner.host.num_classes = "${...num_classes}"
model.assigner.host.score = "${...selection.score}"
