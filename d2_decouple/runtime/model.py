# SPDX-License-Identifier: Apache-2.0
"""An exported model, run by onnxruntime."""

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from .images import output_size, read_image, resized, stretched
from .selection import Detections, select

__all__ = ["DESCRIPTION", "FORMAT", "ExportedDetector", "ExportedModelError"]

DESCRIPTION = "d2_decouple"  # the key of the description in the file's metadata
FORMAT = 1  # of the description
_INSIDE = {"boxes", "scores", "classes", "counts"}
_OUTSIDE = {"boxes", "scores", "strides"}


class ExportedModelError(ValueError):
    """A file that cannot be run; the message says why, and what to type."""


class ExportedDetector:
    """A detector in an ONNX file that takes images as they come.

    ::

        detector = ExportedDetector("model.onnx")
        boxes, scores, classes = detector(read_image("photo.jpg"))

    Attributes:
        description: what the file says of itself: ``classes``, ``channels``, ``resize``,
            ``selection``, ``recipe``, ``version`` and more.
        classes: names of the classes, by index.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        """
        Args:
            path: the file that ``python -m d2_decouple.export`` wrote.
            threads: of the CPU; by default onnxruntime decides.

        Raises:
            ExportedModelError: no such file, one of another kind, or no onnxruntime.
        """
        if not Path(path).is_file():
            raise ExportedModelError(
                f"there is no model {str(path)!r}; python -m d2_decouple.export writes one"
            )
        self._session = _session(str(path), threads)
        self.description = _description(self._session, str(path))
        self.classes: tuple[str, ...] = tuple(self.description["classes"])
        self._inside = self.description["selection"]["inside"]
        outputs = {output.name for output in self._session.get_outputs()}
        if outputs != (_INSIDE if self._inside else _OUTSIDE):
            raise ExportedModelError(
                f"{path} has outputs {sorted(outputs)}; wanted are "
                f"{sorted(_INSIDE if self._inside else _OUTSIDE)}: export it again"
            )

    def __call__(self, image: np.ndarray | str | Path) -> Detections:
        """Detect objects in an image.

        Args:
            image: (H, W, 3) uint8, red first, or the path of a file.

        Returns:
            Detections in pixels of the image, best first.

        Raises:
            ImageFileError: the file cannot be read.
            ExportedModelError: the array is no such image, or the file does not say how images
                are resized for the model.
        """
        if not isinstance(image, np.ndarray):
            image = read_image(image)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ExportedModelError(
                f"wanted an image (H, W, 3) of uint8, got {image.shape} of {image.dtype}"
            )
        planes = self.prepared(image)
        found = self.run(planes[None])[0]
        return self._in_original(found, planes.shape[1:], image.shape[:2])

    def prepared(self, image: np.ndarray) -> np.ndarray:
        """The model's input (3, H', W') float32 of an (H, W, 3) uint8 image, red first."""
        rule = self.description["resize"]
        if rule is None:
            raise ExportedModelError(
                "this file does not say how images are resized for the model, since its recipe "
                "does more than ResizeShortestEdge; resize them yourself and call run()"
            )
        seen = stretched(image)
        seen = resized(seen, output_size(*seen.shape[:2], **rule))
        planes = seen.transpose(2, 0, 1)
        if self.description["channels"] == "BGR":
            planes = planes[::-1]
        return np.ascontiguousarray(planes, dtype=np.float32)

    def run(self, images: np.ndarray) -> list[Detections]:
        """Detections of images of one size.

        Args:
            images: (N, 3, H, W) float32, 0 to 255, in the model's order of channels.

        Returns:
            N detections, in pixels of these images.

        Raises:
            ExportedModelError: other shapes or types, or another size than the only one that the
                file takes.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.float32:
            raise ExportedModelError(
                f"wanted images (N, 3, H, W) of float32, got {images.shape} of {images.dtype}"
            )
        fixed = self.description["fixed_size"]
        if fixed is not None and images.shape != (1, 3, *fixed):
            raise ExportedModelError(
                f"this file takes one image of {fixed[0]}x{fixed[1]} (HxW) at a time, got "
                f"{images.shape}; give images that are resized to that, or export it without "
                "--size, if its network can be traced for any"
            )
        names = [output.name for output in self._session.get_outputs()]
        outputs = dict(zip(names, self._session.run(None, {"image": images}), strict=True))
        if self._inside:
            rows = zip(*(outputs[x] for x in ("boxes", "scores", "classes", "counts")), strict=True)
            return [Detections(boxes[:n], score[:n], label[:n]) for boxes, score, label, n in rows]
        rules = self.description["selection"]
        return [
            select(boxes, scores, outputs["strides"], rules)
            for boxes, scores in zip(outputs["boxes"], outputs["scores"], strict=True)
        ]

    @staticmethod
    def _in_original(found: Detections, seen: tuple[int, ...], size: tuple[int, ...]) -> Detections:
        """From pixels of the model's input to the image's, cut to it; what is left of boxes."""
        scale = np.array([size[1] / seen[1], size[0] / seen[0]] * 2, np.float32)
        limits = np.array([size[1], size[0]] * 2, np.float32)
        boxes = np.clip(found.boxes * scale, 0, limits)
        visible = np.asarray((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
        return found._replace(boxes=boxes).where(visible)


def _session(path: str, threads: int | None) -> Any:
    try:
        onnxruntime: Any = import_module("onnxruntime")
        faults: Any = import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    except ImportError as error:
        raise ExportedModelError(
            f"an exported model is run by onnxruntime, which cannot be imported ({error}); type: "
            "pip install onnxruntime"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings are of shapes that it works out by itself
    if threads:
        options.intra_op_num_threads = threads
    kinds = (faults.Fail, faults.InvalidArgument, faults.InvalidGraph, faults.InvalidProtobuf)
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except (*kinds, faults.NotImplemented, faults.RuntimeException) as error:
        advice = (
            f"; deformable convolutions need onnxruntime 1.25 or newer, this is "
            f"{onnxruntime.__version__}: type pip install --upgrade onnxruntime"
            if "DeformConv" in str(error)
            else ""
        )
        raise ExportedModelError(f"{path} cannot be run by onnxruntime: {error}{advice}") from error


def _description(session: Any, path: str) -> Mapping[str, Any]:
    text = session.get_modelmeta().custom_metadata_map.get(DESCRIPTION)
    if text is None:
        raise ExportedModelError(
            f"{path} was not written by python -m d2_decouple.export: its metadata has no "
            f"{DESCRIPTION!r}"
        )
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ExportedModelError(
            f"{path} has a damaged description ({error}); export it again"
        ) from error
    if not isinstance(description, dict):
        raise ExportedModelError(f"{path} has no description but {text[:80]!r}; export it again")
    if description.get("format") != FORMAT:
        raise ExportedModelError(
            f"{path} has a description of format {description.get('format')}, this version reads "
            f"{FORMAT}; export it again, or install d2-decouple {description.get('version')}"
        )
    return description
