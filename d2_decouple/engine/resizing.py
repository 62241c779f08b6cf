# SPDX-License-Identifier: Apache-2.0
"""An image of any shape as a detector shall see it, so that boxes can be brought back."""

import numpy as np
from detectron2.data import transforms as T

from ..config import ConfigError
from ..runtime.images import stretched

__all__ = ["resized", "stretched"]


def resized(image: np.ndarray, augmentations: T.AugmentationList) -> np.ndarray:
    """The image as the model shall see it.

    Raises:
        ConfigError: an augmentation that does more than resizing moves boxes to where the
            detector's answer cannot be brought back from.
    """
    augmented = T.AugInput(image)
    transform = augmentations(augmented)
    new = augmented.image
    corners = np.array([[0.0, 0.0], image.shape[1::-1]])
    if not np.allclose(transform.apply_coords(corners), [[0.0, 0.0], new.shape[1::-1]]):
        raise ConfigError(
            f"dataloader.test.mapper.augmentations does more than resizing ({transform}); boxes "
            "cannot be brought back to the image: leave crops, flips and padding out"
        )
    return new
