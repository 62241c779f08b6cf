# SPDX-License-Identifier: Apache-2.0
"""Boxes as maskrcnn-benchmark counts them, for weights that were trained with it.

There x2 and y2 are the last pixels inside a box, which is x2 - x1 + 1 pixels wide; here they are
where it ends. ``HardNMS`` and ``PDNetAssigner`` have ``side_offset`` for the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.modeling import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .detector import OneStageDetector

__all__ = ["LegacyBoxDetector", "legacy_clip"]

_SIZE = ("height", "width")  # of the original image, by their names in an input dict


def legacy_clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(D, 4) xyxy boxes put inside an image of ``size`` (H, W) whose last pixel is (W-1, H-1).

    An inverted side becomes one of zero length at the greater coordinate. Such boxes stay: in this
    convention they are one pixel wide.
    """
    height, width = size
    low, high = boxes[:, :2], torch.maximum(boxes[:, :2], boxes[:, 2:])
    last = boxes.new_tensor([width - 1, height - 1])
    return torch.cat([torch.minimum(corner.clamp(min=0), last) for corner in (low, high)], dim=1)


class LegacyBoxDetector(OneStageDetector):
    """A detector with weights of maskrcnn-benchmark: what it answers ends where an object ends.

    Up to the suppression boxes are theirs, in pixels of the resized image, so ``selection`` must
    count as they do (:func:`legacy_clip`, ``HardNMS(side_offset=1)``). After that x2 and y2 get one
    pixel of the *original* image, as in their evaluation. Unlike there, boxes are then cut to the
    image: where it was enlarged, theirs may leave it by a part of a pixel.

    In training the ground truth loses that pixel of the original image, as it is theirs there, and
    ``assigner`` must count as they do. (A mirrored box of theirs lies further by what a pixel of
    the original differs from one of the resized image.)
    """

    side_offset = 1.0

    def forward(self, batched_inputs: Sequence[Mapping[str, Any]]) -> Any:
        """As the host's; ground truth and answers are boxes in this package's convention."""
        if self.training:
            return super().forward([self._as_theirs(item) for item in batched_inputs])
        images, features, predictions = self.predict(batched_inputs)
        found = self.forward_inference(images, features, predictions)
        return [
            {"instances": self._in_original(instances, item)}
            for instances, item in zip(found, batched_inputs, strict=True)
        ]

    def _as_theirs(self, item: Mapping[str, Any]) -> dict[str, Any]:
        truth = item["instances"]
        low, high = truth.gt_boxes.tensor.split(2, dim=1)
        high = torch.maximum(high - self._offset(truth.image_size, item, high), low)
        fields = {**truth.get_fields(), "gt_boxes": Boxes(torch.cat((low, high), 1))}
        return {**item, "instances": Instances(truth.image_size, **fields)}

    def _in_original(self, found: Instances, item: Mapping[str, Any]) -> Instances:
        # Before the scaling, which drops boxes without area: theirs have one.
        low, high = found.pred_boxes.tensor.split(2, dim=1)
        high = high + self._offset(found.image_size, item, high)
        found.pred_boxes = Boxes(torch.cat((low, high), 1))
        height, width = (item.get(x, y) for x, y in zip(_SIZE, found.image_size, strict=True))
        return detector_postprocess(found, height, width)

    def _offset(self, seen: tuple[int, int], item: Mapping[str, Any], like: Tensor) -> Tensor:
        """(2,) width and height of an original image's pixel in the one of ``seen`` (H, W)."""
        height, width = (
            size / item.get(name, size) for name, size in zip(_SIZE, seen, strict=True)
        )
        return self.side_offset * like.new_tensor([width, height])
