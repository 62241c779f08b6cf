# SPDX-License-Identifier: Apache-2.0
"""Image sizes as maskrcnn-benchmark makes them, for weights that were trained with it."""

import numpy as np
from detectron2.data import transforms as T

__all__ = ["LegacyResizeShortestEdge"]


class LegacyResizeShortestEdge(T.ResizeShortestEdge):
    """``T.ResizeShortestEdge`` whose sizes are maskrcnn-benchmark's, which cuts where it rounds.

    Arguments and random numbers are Detectron2's. The sides differ by a pixel for many images (640
    x 480 becomes 1066 x 800, not 1067 x 800). With ``max_size`` the short side is rounded first,
    and the long one follows from it: it can be some pixels shorter than ``max_size``, or longer.
    """

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """The transform of an (H, W, ...) image."""
        height, width = image.shape[:2]
        if self.is_range:
            low, high = self.short_edge_length
            length = np.random.randint(low, high + 1)
        else:
            length = np.random.choice(self.short_edge_length)
        if length == 0:
            return T.NoOpTransform()
        new = self.get_output_shape(height, width, int(length), self.max_size)
        return T.ResizeTransform(height, width, *new, self.interp)

    @staticmethod
    def get_output_shape(
        oldh: int, oldw: int, short_edge_length: int, max_size: int
    ) -> tuple[int, int]:
        """(H, W) after resizing an image of ``oldh`` x ``oldw`` pixels."""
        short, long = sorted((oldh, oldw))
        length = short_edge_length
        if length * long > max_size * short:
            length = max(1, round(max_size * short / long))
        other = length * long // short
        return (other, length) if oldh > oldw else (length, other)
