# SPDX-License-Identifier: Apache-2.0
"""For weights that the authors published, of 2x and of 2xx (tools/convert_checkpoint.py pdnet).

They were trained with maskrcnn-benchmark, which subtracts another mean, cuts image sizes where
Detectron2 rounds, and counts a box's last pixel as inside it. Detections come out in the convention
of this package, and ground truth goes in so. Type train.init_checkpoint=FILE. To begin a training
with random or ImageNet's weights take pdnet_R_50_FPN_2x, which has nothing of this.
"""

from d2_decouple.data.legacy import LegacyResizeShortestEdge
from d2_decouple.modeling.legacy import LegacyBoxDetector, legacy_clip

from .pdnet_R_50_FPN_2x import dataloader, lr_multiplier, model, optimizer, train

model._target_ = LegacyBoxDetector
model.pixel_mean = [102.9801, 115.9465, 122.7717]
model.selection.clip = legacy_clip
model.selection.nms.side_offset = 1.0
model.assigner.side_offset = 1.0
for _mapper in (dataloader.train.mapper, dataloader.test.mapper):
    _mapper.augmentations[0]._target_ = LegacyResizeShortestEdge
train.init_checkpoint = ""
