# SPDX-License-Identifier: Apache-2.0
"""OTA with ResNet-50-FPN: FCOS's network, whose labels are a transport plan's."""

from detectron2.config import LazyCall as L

from d2_decouple.modeling import OTAAssigner, geometric_mean_score

from .fcos import model

# P6 comes from C5, as in RetinaNet; the paper does not say, the authors' code does.
model.backbone.top_block.update(in_feature="res5", in_channels=2048)
model.head.offset = 0.0  # a cell stands for its corner
model.assigner = L(OTAAssigner)(num_classes="${..num_classes}")
model.losses.loss_box_reg.weight = 2.0  # GIoU, as in the authors' code; the paper says IoU
model.losses.loss_quality.weight = 0.5  # the predicted boxes' IoU
model.selection.score = geometric_mean_score
