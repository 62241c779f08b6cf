# SPDX-License-Identifier: Apache-2.0
"""PDNet with ResNet-50-FPN: FCOS with other parts in four slots, on RetinaNet's pyramid."""

from detectron2.config import LazyCall as L

from d2_decouple.layers.tower import bias_free_tower
from d2_decouple.modeling import (
    BoundaryPoints,
    FocalTerm,
    GIoUTerm,
    PDNetAssigner,
    PDNetPredictor,
    SemanticPoints,
    class_score,
    coarse_boxes,
    coarse_targets,
    loss_terms,
)

from .fcos import model

# P6 comes from C5, as in RetinaNet; the paper does not say, the authors' code does.
model.backbone.top_block.update(in_feature="res5", in_channels=2048)
model.head.offset = 0.0  # a cell stands for its corner: pixel 0 is the first one's
model.head.tower = bias_free_tower
model.head.predictor = L(PDNetPredictor)(
    num_classes="${...num_classes}",
    in_channels=256,
    class_points=L(SemanticPoints)(num_points=9),
    box_points=L(BoundaryPoints)(),
    box_levels=[-1, 0],  # each side is read on the next finer level, too
)
# An object's cells are those whose coarse box overlaps it, on all levels.
model.assigner = L(PDNetAssigner)(num_classes="${..num_classes}")
# The weights are the paper's, the smoothing of the overlap by one pixel its code's.
model.losses = L(loss_terms)(
    loss_cls=L(FocalTerm)(),
    loss_box_reg=L(GIoUTerm)(weight=2.0, smoothing=1.0),
    loss_box_coarse=L(GIoUTerm)(
        weight=0.5, smoothing=1.0, boxes=coarse_boxes, targets=coarse_targets
    ),
)
model.selection.score = class_score  # there is no quality to multiply with
