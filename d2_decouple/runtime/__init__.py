# SPDX-License-Identifier: Apache-2.0
"""Running an exported model: needs numpy, OpenCV and onnxruntime, and nothing else.

Neither PyTorch nor Detectron2 nor Pillow is imported from here, so that a machine that only
detects objects can do without them.
"""

from .images import ImageFileError, read_image
from .model import ExportedDetector, ExportedModelError
from .selection import Detections

__all__ = [
    "Detections",
    "ExportedDetector",
    "ExportedModelError",
    "ImageFileError",
    "read_image",
]
