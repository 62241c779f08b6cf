# SPDX-License-Identifier: Apache-2.0
"""ATSS with ResNet-50-FPN: FCOS with another predictor and assigner, on torchvision's ResNet."""

from detectron2.config import LazyCall as L

from d2_decouple.layers.tower import bias_free_tower
from d2_decouple.modeling import ATSSAssigner, ATSSPredictor, BestLocations, LinearP6P7

from .fcos import model

# torchvision's networks have the stride in the 3x3 convolution.
model.backbone.bottom_up.stages.stride_in_1x1 = False
model.backbone.top_block._target_ = LinearP6P7
model.head.predictor = L(ATSSPredictor)(
    num_classes="${...num_classes}", in_channels=256, num_levels=5
)
model.head.offset = 0.0  # anchors are centred on the corners of cells
model.head.tower = bias_free_tower
model.assigner = L(ATSSAssigner)(num_classes="${..num_classes}", topk=9)
model.losses.loss_box_reg.weight = 2.0
model.selection.candidates = L(BestLocations)(test_score_thresh=0.05, test_topk_candidates=1000)
model.update(
    pixel_mean=[123.675, 116.280, 103.530],
    pixel_std=[58.395, 57.120, 57.375],
    input_format="RGB",
)
