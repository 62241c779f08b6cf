# SPDX-License-Identifier: Apache-2.0
"""What an exported file says of itself, so that it can be run without its recipe."""

from collections.abc import Sequence
from typing import Any

from detectron2.data import transforms as T
from PIL import Image

from .. import __version__
from ..config import ConfigError
from ..modeling import BestLocations, BestPairs, HardNMS
from ..modeling.detector import OneStageDetector
from ..modeling.selection import Selection, clip_to_image
from ..runtime.model import FORMAT

__all__ = ["ExportError", "check_exportable", "describe"]

_CANDIDATES = {BestPairs: "pairs", BestLocations: "locations"}


class ExportError(ConfigError):
    """A model or a way of exporting it that does not go together; the message says what does."""


def check_exportable(model: Any) -> OneStageDetector:
    """The model itself, if all that is around its networks can be written into a file.

    Raises:
        ExportError: a two-stage detector, a one-stage detector of another package, one that counts
            boxes in another way, or a selection that is not the plain one.
    """
    if not isinstance(model, OneStageDetector):
        raise ExportError(f"{type(model).__name__} cannot be exported: {_obstacle(model)}")
    if model.side_offset:
        raise ExportError(
            f"{type(model).__name__} counts the last pixel of a box as inside it, which exported "
            "files cannot say; train and export the recipe without _official"
        )
    selection = model.selection
    if not isinstance(selection, Selection):
        raise ExportError(f"model.selection is {selection!r}; wanted is a Selection")
    if type(selection.candidates) not in _CANDIDATES:
        raise ExportError(
            f"model.selection.candidates is {selection.candidates!r}; wanted is BestPairs or "
            "BestLocations"
        )
    if type(selection.nms) is not HardNMS:
        raise ExportError(
            f"model.selection.nms is {selection.nms!r}; ONNX has an operator for HardNMS alone: "
            "set model.selection.nms to that for the export"
        )
    if selection.clip not in (None, clip_to_image):
        raise ExportError(
            f"model.selection.clip is {selection.clip!r}; wanted is clip_to_image or None"
        )
    return model


def _obstacle(model: Any) -> str:
    """What is in the way of a model that is no detector of one stage of ours."""
    if hasattr(model, "roi_heads"):
        return (
            "the regions that its second stage reads are other ones, and another number of them, "
            "for each image. Export a one-stage detector (OneStageDetector), such as "
            "fcos_R_50_FPN_1x"
        )
    return (
        f"it comes from {type(model).__module__}, and wanted is a OneStageDetector. Weights of "
        "Detectron2's own RetinaNet and FCOS load into the recipes retinanet_... and fcos_... "
        "without _d2: name one of these in --config-file"
    )


def describe(
    model: OneStageDetector,
    *,
    recipe: str,
    classes: Sequence[str],
    augmentations: Sequence[T.Augmentation],
    nms_inside: bool,
    fixed_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """The description of a model that :func:`check_exportable` has let pass.

    ``fixed_size`` is the (H, W) of the only images that the file takes, one at a time, or None.
    ``resize`` is None where images are prepared by anything but one ``ResizeShortestEdge`` with
    one size: then whoever runs the file must prepare them.
    """
    selection: Any = model.selection
    return {
        "format": FORMAT,
        "version": __version__,
        "recipe": recipe,
        "classes": list(classes),
        "channels": model.input_format,
        "pixel_mean": model.pixel_mean.flatten().tolist(),
        "pixel_std": model.pixel_std.flatten().tolist(),
        "size_divisor": model.backbone.size_divisibility,
        "strides": list(model.head.strides),
        "resize": _resize_rule(augmentations),
        "fixed_size": None if fixed_size is None else list(fixed_size),
        "selection": {
            "inside": nms_inside,
            "candidates": _CANDIDATES[type(selection.candidates)],
            "test_score_thresh": selection.candidates.test_score_thresh,
            "test_topk_candidates": selection.candidates.test_topk_candidates,
            "test_nms_thresh": selection.nms.test_nms_thresh,
            "nms_side_offset": selection.nms.side_offset,
            "max_detections_per_image": selection.max_detections_per_image,
        },
    }


def _resize_rule(augmentations: Sequence[T.Augmentation]) -> dict[str, int] | None:
    if len(augmentations) != 1 or type(augmentations[0]) is not T.ResizeShortestEdge:
        return None
    rule: Any = augmentations[0]
    lengths = {int(length) for length in rule.short_edge_length}
    if len(lengths) != 1 or min(lengths) < 1 or rule.interp != Image.Resampling.BILINEAR:
        return None  # a length of 0 means, to Detectron2, that nothing is resized
    return {"short_edge": lengths.pop(), "max_size": int(rule.max_size)}
