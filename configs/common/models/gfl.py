# SPDX-License-Identifier: Apache-2.0
"""GFL with ResNet-50-FPN: ATSS with distributions as sides and qualities as class scores."""

from detectron2.config import LazyCall as L

from d2_decouple.modeling import (
    DistributionFocalTerm,
    GFLAssigner,
    GFLPredictor,
    QualityFocalTerm,
    class_score,
)

from .atss import model

model.head.predictor._target_ = GFLPredictor
model.head.predictor.reg_max = 16
model.assigner._target_ = GFLAssigner
model.assigner.score = "${..selection.score}"
model.losses.loss_cls = L(QualityFocalTerm)(beta=2.0)
model.losses.loss_box_distribution = L(DistributionFocalTerm)(weight=0.25)
del model.losses.loss_quality
model.selection.score = class_score  # the quality is in it
