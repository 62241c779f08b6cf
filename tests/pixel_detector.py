# SPDX-License-Identifier: Apache-2.0
"""A detector that reads a few pixels, linearly: the gradients of what it finds are known."""

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch import nn

from d2_decouple.modeling import OneStageDetector
from d2_decouple.modeling.selection import BestPairs, HardNMS, Selection, class_score
from d2_decouple.structures import DensePredictions

BOX = (20.0, 10.0, 90.0, 60.0)  # in pixels of the seen image
CLASS = {(30, 20): (2.0, 0.0, -2.0), (60, 50): (0.0, 4.0, 0.0)}  # (x, y) seen: weight of a channel
LEFT, TOP = (40, 40), (104, 40)  # (x, y) seen: read for the left and right side, for the top


class Passing(Backbone):
    """The padded image itself is the only map."""

    size_divisibility = 32

    def output_shape(self):
        return {"p3": ShapeSpec(channels=3, stride=8)}

    def forward(self, x):
        return {"p3": x}


class PixelHead(nn.Module):
    """One box; its class is read at some pixels, its sides at others, linearly."""

    strides = (8,)

    def __init__(self, class_reads=CLASS, change=lambda x: x):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.01))
        self.class_reads, self.change = class_reads, change

    def check_pyramid(self, shapes, names):
        pass

    def forward(self, features):
        image = self.gain * self.change(features[0][0])
        logit = 3 + sum(
            image[:, y, x] @ image.new_tensor(weights)
            for (x, y), weights in self.class_reads.items()
        )
        across, down = image[0, LEFT[1], LEFT[0]], image[1, TOP[1], TOP[0]]
        nothing = 0 * across
        # The sum of the sides does not depend on the pixel that moves left and right.
        sides = torch.stack((across, down, -across, nothing)) + image.new_tensor(BOX)
        other = image[0, 0, 0] - 9  # of the class that is not found
        return DensePredictions(
            logits=torch.stack((other, logit))[None, None],
            boxes=sides[None, None],
            quality=None,
            locations=image.new_tensor([[52.0, 36.0]]),
            strides=image.new_tensor([8.0]),
            priors=torch.zeros(1, 4),
            level_sizes=(1,),
            extras={},
        )


def pixel_detector(**options):
    return OneStageDetector(
        backbone=Passing(),
        head=PixelHead(**options),
        assigner=nn.Identity(),
        losses={},
        selection=Selection(
            score=class_score,
            candidates=BestPairs(test_score_thresh=0.05, test_topk_candidates=9),
            nms=HardNMS(test_nms_thresh=0.5),
        ),
        num_classes=2,
        head_in_features=["p3"],
        pixel_mean=[0.0, 0.0, 0.0],
        pixel_std=[1.0, 1.0, 1.0],
    )
