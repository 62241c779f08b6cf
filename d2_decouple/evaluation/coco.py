# SPDX-License-Identifier: Apache-2.0
"""COCO's measures of boxes, by pycocotools or by faster-coco-eval, which gives the same numbers.

Both are only asked for precision and recall; what is said about them is computed here, once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from ..config import nearest
from .truth import EvaluationError, GroundTruth, ImageDetections, ImageId

__all__ = ["IOU_THRESHOLDS", "Curves", "coco_curves", "coco_eval", "find_backend"]

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""AP is the mean over these."""

_SHOWN = {"AP50": 0, "AP75": 5, "AP90": 8}  # places in IOU_THRESHOLDS
_AREAS = ("s", "m", "l")  # behind "all", at 32 and 96 pixels squared
_RECALLS = (1, 10)  # detections per image and class of the first two columns of recall
_MODULES = {"faster-coco-eval": "faster_coco_eval", "pycocotools": "pycocotools"}


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Precision and recall, NaN where a class has no object.

    Attributes:
        precision: (T, R, K, A), at T IoU thresholds, R = 101 recalls from 0 to 1, K classes and
            A ranges of area (all, small, medium, large), with all detections.
        scores: (T, R, K) the score from which on a recall is reached; 0 where it never is.
        recall: (T, K, M), with at most M different numbers of detections.
        limits: the M numbers of detections per image and class, ascending.
    """

    precision: np.ndarray
    scores: np.ndarray
    recall: np.ndarray
    limits: tuple[int, ...]

    def summary(self, class_index: int | None = None) -> dict[str, float]:
        """COCO's numbers and AP90 in percent, of one class or as the mean over all.

        Returns:
            AP, AP50, AP75, AP90, APs, APm, APl, AR1, AR10 and AR100 (or the limit in use).
        """
        chosen = slice(None) if class_index is None else slice(class_index, class_index + 1)
        precision = self.precision[:, :, chosen]
        numbers = {"AP": _percent(precision[..., 0])}
        numbers |= {name: _percent(precision[at, ..., 0]) for name, at in _SHOWN.items()}
        numbers |= {
            f"AP{name}": _percent(precision[..., place])
            for place, name in enumerate(_AREAS, start=1)
        }
        for place, limit in enumerate(self.limits):
            numbers[f"AR{limit}"] = _percent(self.recall[:, chosen, place])
        return numbers


def coco_curves(
    truth: GroundTruth,
    detections: Mapping[ImageId, ImageDetections],
    *,
    max_detections_per_image: int = 100,
    backend: str | None = None,
) -> Curves:
    """Match detections with objects as COCO does, and accumulate.

    In the order of their scores, detections take the object of their class that they overlap
    most among those still free, if the IoU reaches the threshold. An image without detections
    counts with all its objects missed.

    Args:
        truth: the objects of the data set.
        detections: by image id; ids are among those of ``truth``.
        max_detections_per_image: COCO counts so many per image *and class*.
        backend: see :func:`find_backend`.
    """
    evaluation = coco_eval(
        truth, detections, max_detections_per_image=max_detections_per_image, backend=backend
    )
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
    found = {
        name: np.where(evaluation.eval[name] < 0, np.nan, evaluation.eval[name])
        for name in ("precision", "recall", "scores")
    }
    return Curves(
        precision=found["precision"][..., -1],
        scores=found["scores"][..., 0, -1],
        recall=found["recall"][:, :, 0],
        limits=tuple(int(limit) for limit in evaluation.params.maxDets),
    )


def coco_eval(
    truth: GroundTruth,
    detections: Mapping[ImageId, ImageDetections],
    *,
    max_detections_per_image: int = 100,
    backend: str | None = None,
) -> Any:
    """The backend's ``COCOeval`` after its ``evaluate``: matched, not yet accumulated.

    Images and classes are numbered from 1 in the order of ``truth``, objects as well: COCO's code
    takes an object with the id 0 for none.
    """
    if max_detections_per_image < 1:
        raise EvaluationError(
            f"max_detections_per_image is {max_detections_per_image}, wanted a number from 1"
        )
    coco_class, eval_class = _classes(find_backend(backend))
    with contextlib.redirect_stdout(io.StringIO()):
        objects, found = coco_class(), coco_class()
        objects.dataset = _dataset(truth, _objects(truth))
        found.dataset = _dataset(truth, _found(truth, detections))
        for side in (objects, found):
            side.createIndex()
        evaluation = eval_class(objects, found, "bbox")
        limits = {min(limit, max_detections_per_image) for limit in _RECALLS}
        evaluation.params.maxDets = sorted(limits | {max_detections_per_image})
        evaluation.evaluate()
    return evaluation


def find_backend(backend: str | None) -> str:
    """The name of the library that will count.

    Args:
        backend: "pycocotools", "faster-coco-eval", or None for the faster one where it is there.

    Raises:
        EvaluationError: an unknown name, or a library that is not installed.
    """
    if backend is None:
        return "faster-coco-eval" if _import("faster-coco-eval") else "pycocotools"
    if backend not in _MODULES:
        raise EvaluationError(f"unknown backend {backend!r}; {nearest(backend, _MODULES)}")
    if _import(backend) is None:
        raise EvaluationError(
            f"backend {backend!r} is not installed: pip install {backend}, or leave backend=None"
        )
    return backend


def _import(backend: str) -> ModuleType | None:
    try:
        return importlib.import_module(_MODULES[backend])
    except ImportError:
        return None


def _classes(backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if backend == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    module = importlib.import_module(_MODULES[backend])
    # It tells its progress to a log of its own, at a level that users see.
    return module.COCO, functools.partial(module.COCOeval_faster, print_function=_be_silent)


def _be_silent(*_: Any) -> None:
    pass


def _dataset(truth: GroundTruth, annotations: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "info": {},
        "images": [{"id": number} for number in range(1, len(truth.images) + 1)],
        "categories": [
            {"id": number, "name": name} for number, name in enumerate(truth.class_names, start=1)
        ],
        "annotations": [
            {"id": number, **annotation} for number, annotation in enumerate(annotations, start=1)
        ],
    }


def _objects(truth: GroundTruth) -> list[dict[str, Any]]:
    return [
        {
            "image_id": number,
            "category_id": int(label) + 1,
            "bbox": box,
            "area": float(area),
            "iscrowd": int(crowd),
        }
        for number, image in enumerate(truth.images.values(), start=1)
        for box, label, crowd, area in zip(
            _xywh(image.boxes), image.classes, image.crowds, image.areas, strict=True
        )
    ]


def _found(
    truth: GroundTruth, detections: Mapping[ImageId, ImageDetections]
) -> list[dict[str, Any]]:
    return [
        {
            "image_id": number,
            "category_id": int(label) + 1,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
            "score": float(score),
        }
        for number, image_id in enumerate(truth.images, start=1)
        if image_id in detections
        for box, score, label in zip(
            _xywh(detections[image_id].boxes),
            detections[image_id].scores,
            detections[image_id].classes,
            strict=True,
        )
    ]


def _xywh(boxes: np.ndarray) -> list[list[float]]:
    return np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1).tolist()


def _percent(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return 100 * float(known.mean()) if known.size else float("nan")
