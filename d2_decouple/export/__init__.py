# SPDX-License-Identifier: Apache-2.0
"""Detectors as files that run without this package's Python: ONNX, torch.export, AOTInductor.

:mod:`d2_decouple.runtime` runs the ONNX files, with neither PyTorch nor Detectron2.
"""

from .description import ExportError
from .graph import ExportableDetector, exportable

__all__ = ["ExportError", "ExportableDetector", "exportable"]
