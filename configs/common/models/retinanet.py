# SPDX-License-Identifier: Apache-2.0
"""RetinaNet with ResNet-50-FPN as Detectron2 has it: nine anchors a cell."""

from detectron2.config import LazyCall as L

from d2_decouple.modeling import (
    DeltaL1Term,
    FocalTerm,
    RetinaNetAssigner,
    RetinaNetPredictor,
    class_score,
    loss_terms,
)

from .fcos import model

# P6 comes from C5 (section 4 of the paper).
model.backbone.top_block.update(in_feature="res5", in_channels=2048)
model.head.offset = 0.0  # anchors are centred on their cell's corner
model.head.norm = ""
model.head.predictor = L(RetinaNetPredictor)(num_classes="${...num_classes}", in_channels=256)
model.assigner = L(RetinaNetAssigner)(num_classes="${..num_classes}", iou_thresholds=[0.4, 0.5])
model.losses = L(loss_terms)(loss_cls=L(FocalTerm)(), loss_box_reg=L(DeltaL1Term)())
model.selection.update(score=class_score, clip=None)  # the result is clipped, what overlaps is not
model.selection.nms.test_nms_thresh = 0.5
