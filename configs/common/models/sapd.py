# SPDX-License-Identifier: Apache-2.0
"""SAPD with ResNet-50-FPN, without BFP: FCOS's towers without norms, and an assigner of its own.

What the paper compares is typed: ``model.assigner.options.exponent=0.5``, ``...top_k=2``, and so
on (:class:`SAPDOptions`); ``model.losses.loss_select.weight`` is its lambda, and
``model.head.predictor.unit`` its z. "Five convolutions" of a subnet are read as four and the
predictor, as in FSAF; ``model.head.cls_conv_dims=[256,256,256,256,256]``, and the same for
``box_conv_dims``, makes it five. Another loss of boxes is set in a file, as
``model.assigner.box_loss = generalized_iou_loss``: the term follows. Another alpha or gamma of the
focal loss is typed twice: ``model.losses.loss_cls.gamma=1.5 model.assigner.gamma=1.5``.
"""

from detectron2.config import LazyCall as L

from d2_decouple.layers.losses import iou_loss
from d2_decouple.modeling import (
    FocalTerm,
    IoUTerm,
    LevelSelectionTerm,
    SAPDAssigner,
    SAPDOptions,
    SAPDPredictor,
    class_score,
    loss_terms,
)

from .fcos import model

# P6 comes from C5, as in RetinaNet, which the paper's baseline is made from.
model.backbone.top_block.update(in_feature="res5", in_channels=2048)
model.head.norm = ""
model.head.predictor = L(SAPDPredictor)(num_classes="${...num_classes}", in_channels=256)
model.assigner = L(SAPDAssigner)(
    num_classes="${..num_classes}",
    channels="${..backbone.out_channels}",
    num_levels=5,
    max_iter="${train.max_iter}",  # levels are selected softly in the second half
    hidden_channels=256,
    options=L(SAPDOptions)(),
    box_loss=iou_loss,
)
model.losses = L(loss_terms)(
    loss_cls=L(FocalTerm)(),
    loss_box_reg=L(IoUTerm)(loss="${...assigner.box_loss}"),
    loss_select=L(LevelSelectionTerm)(),
)
model.selection.score = class_score  # there is no quality to multiply with
model.selection.nms.test_nms_thresh = 0.5
