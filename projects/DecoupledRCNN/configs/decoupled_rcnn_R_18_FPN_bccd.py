# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN, three regression stages, in the small-data experiment: the network, data and
schedule of the Faster R-CNN there."""

from ....configs.baselines.faster_rcnn_R_18_FPN_bccd_d2 import (
    dataloader,
    lr_multiplier,
    optimizer,
    train,
)
from ....configs.baselines.faster_rcnn_R_18_FPN_bccd_d2 import model as _faster
from ....configs.common.models.decoupled_rcnn import model

model.backbone.update(bottom_up=_faster.backbone.bottom_up, out_channels=64)
model.proposal_generator.update(
    {key: _faster.proposal_generator[key] for key in ("batch_size_per_image", "post_nms_topk")}
)
model.roi_heads.update(num_classes=3, batch_size_per_image=128, box_batch_size_per_image=128)
for _branch in (model.roi_heads.class_branch, *model.roi_heads.box_branches):
    _branch.head.fc_dims = [256, 256]
model.roi_heads.selection.test_score_thresh = 0.05  # as the baselines'
model.update({key: _faster[key] for key in ("pixel_mean", "pixel_std", "input_format")})
