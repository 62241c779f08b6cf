# SPDX-License-Identifier: Apache-2.0
"""The evaluator of all recipes: what Detectron2's test loop calls after each batch."""

from __future__ import annotations

import logging
import math
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm
from tabulate import tabulate

from ..data import require_dataset
from ..visualization.precision_recall import best_f1, plot_precision_recall
from .coco import IOU_THRESHOLDS, Curves, coco_curves, find_backend
from .files import write_json
from .truth import EvaluationError, GroundTruth, ImageDetections, ImageId, read_ground_truth
from .voc import voc_ap

__all__ = ["DETECTIONS_FILE", "PICTURE_FILE", "SUMMARY_FILE", "BoxEvaluator"]

DETECTIONS_FILE = "coco_instances_results.json"
SUMMARY_FILE = "evaluation.json"
PICTURE_FILE = "precision_recall.png"

_DRAWN = (0, 5, 8)  # places of 0.50, 0.75 and 0.90 among the IoU thresholds
_VOC = "VOC-AP50"

_logger = logging.getLogger(__name__)


class BoxEvaluator(DatasetEvaluator):
    """COCO's measures, AP90 and Pascal VOC's AP for boxes, over one or several processes.

    The ground truth is read when the evaluator is made: from the COCO file of the data set, or
    from its dicts in Detectron2's catalog. Nothing is kept from an earlier evaluation.
    """

    def __init__(
        self,
        *,
        dataset_name: str,
        output_dir: str | os.PathLike[str] | None = None,
        max_detections_per_image: int = 100,
        backend: str | None = None,
    ) -> None:
        """
        Args:
            dataset_name: a registered data set.
            output_dir: where the first process writes ``coco_instances_results.json`` (COCO's
                format, the data set's own ids), ``evaluation.json`` (all numbers, also of each
                class) and ``precision_recall.png``; each is replaced whole. None writes nothing.
            max_detections_per_image: how many are counted of an image, COCO's rule: of each class.
            backend: "pycocotools", "faster-coco-eval", or None for the faster one if installed.

        Raises:
            EvaluationError: ground truth or a backend that cannot be used.
            ValueError: an unknown data set.
        """
        require_dataset(dataset_name)
        self._dataset_name = dataset_name
        self._output_dir = None if output_dir is None else Path(output_dir)
        self._limit = max_detections_per_image
        self._backend = find_backend(backend)
        self._truth = read_ground_truth(dataset_name)
        self._detections: dict[ImageId, ImageDetections] = {}

    def reset(self) -> None:
        """Forget all detections."""
        self._detections = {}

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Take the detections of a batch.

        Args:
            inputs: the loader's dicts; ``image_id`` counts.
            outputs: the model's dicts; ``instances`` with ``pred_boxes`` in pixels of the image
                as it is on disk, ``scores`` and ``pred_classes`` count.

        Raises:
            EvaluationError: an image that the data set does not have, a box or score that is not
                finite, or a class that the data set does not have.
        """
        for item, output in zip(inputs, outputs, strict=True):
            image = item["image_id"]
            if image not in self._truth.images:
                raise EvaluationError(
                    f"image {image!r} is not in data set {self._dataset_name!r}; load the images "
                    "of the data set that is evaluated"
                )
            found = _detections(output["instances"], image, len(self._truth.class_names))
            if image in self._detections:
                _logger.warning("Image %r came twice; what was found first counts", image)
                continue
            self._detections[image] = found

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """Gather from all processes, count, log, write.

        Returns:
            ``{"bbox": {...}}`` in percent: AP, AP50, AP75, AP90, APs, APm, APl, AR1, AR10, AR100,
            VOC-AP50 (Pascal VOC since 2010), and AP-NAME for each class; NaN where no object
            falls into a range. Empty on all processes but the first, and without annotations.
        """
        comm.synchronize()
        gathered = comm.gather(self._detections, dst=0)
        if not comm.is_main_process():
            return OrderedDict()
        detections: dict[ImageId, ImageDetections] = {}
        for part in gathered:
            detections = part | detections
        self._say_what_is_missing(detections)
        if self._output_dir is not None:
            self._output_dir.mkdir(parents=True, exist_ok=True)
            write_json(self._output_dir / DETECTIONS_FILE, _as_coco(self._truth, detections))
        if not self._truth.annotated:
            _logger.info("%r has no annotations: nothing to evaluate", self._dataset_name)
            return OrderedDict()
        return self._measure(detections)

    def _say_what_is_missing(self, detections: Mapping[ImageId, ImageDetections]) -> None:
        missing = [image for image in self._truth.images if image not in detections]
        if missing:
            _logger.warning(
                "%d of the %d images of %r were not processed, the first is %r; their objects "
                "count as not found",
                len(missing),
                len(self._truth.images),
                self._dataset_name,
                missing[0],
            )
        elif not any(len(found.scores) for found in detections.values()):
            _logger.warning("The model found nothing in any image; all numbers are 0")

    def _measure(
        self, detections: Mapping[ImageId, ImageDetections]
    ) -> OrderedDict[str, dict[str, float]]:
        curves = coco_curves(
            self._truth,
            detections,
            max_detections_per_image=self._limit,
            backend=self._backend,
        )
        voc = 100 * voc_ap(self._truth, detections)
        names = self._truth.class_names
        classes = _class_numbers(self._truth, detections, curves, voc)
        known = voc[~np.isnan(voc)]
        total = {**curves.summary(), _VOC: float(known.mean()) if known.size else math.nan}
        _logger.info(
            "%s, %d images (%s):\n%s",
            self._dataset_name,
            len(self._truth.images),
            self._backend,
            _table([total], list(total)),
        )
        rows = [{"class": name, **classes[name]} for name in names]
        _logger.info(
            "Classes:\n%s", _table(rows, ["class", "objects", "AP", "AP50", "AP75", "AP90", _VOC])
        )
        if self._output_dir is not None:
            summary = {
                "dataset": self._dataset_name,
                "images": len(self._truth.images),
                "max_detections_per_image": self._limit,
                "backend": self._backend,
                "metrics": total,
                "classes": classes,
            }
            write_json(self._output_dir / SUMMARY_FILE, _without_nan(summary), indent=2)
            plot_precision_recall(
                curves.precision[list(_DRAWN), ..., 0],
                curves.scores[list(_DRAWN)],
                names,
                self._output_dir / PICTURE_FILE,
                iou_thresholds=IOU_THRESHOLDS[list(_DRAWN)].tolist(),
            )
        each = {f"AP-{name}": classes[name]["AP"] for name in names}
        return OrderedDict(bbox={**total, **each})


def _detections(instances: Instances, image: ImageId, num_classes: int) -> ImageDetections:
    instances = instances.to("cpu")
    boxes = instances.pred_boxes.tensor.detach().double().numpy()
    scores = instances.scores.detach().double().numpy()
    classes = instances.pred_classes.long().numpy()
    wrong = np.flatnonzero(~(np.isfinite(boxes).all(axis=1) & np.isfinite(scores)))
    if len(wrong):
        at = wrong[0]
        raise EvaluationError(
            f"image {image!r}: detection {at} of {len(scores)} has the score {scores[at]:g} and "
            f"the box {boxes[at].tolist()}, wanted finite numbers; the weights have diverged: "
            "evaluate an earlier checkpoint, or train with a lower rate (optimizer.lr=0.001)"
        )
    outside = classes[(classes < 0) | (classes >= num_classes)]
    if len(outside):
        raise EvaluationError(
            f"image {image!r}: the model found class {outside[0]}, but the data set has "
            f"{num_classes} classes, counted from 0; type model.num_classes={num_classes}"
        )
    return ImageDetections(boxes, scores, classes)


def _as_coco(
    truth: GroundTruth, detections: Mapping[ImageId, ImageDetections]
) -> list[dict[str, Any]]:
    """All detections as COCO's list of results; boxes become x, y, width, height."""
    return [
        {
            "image_id": image,
            "category_id": truth.dataset_ids[label],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for image in truth.images
        if image in detections
        for (x1, y1, x2, y2), score, label in zip(
            *(values.tolist() for values in detections[image]), strict=True
        )
    ]


def _class_numbers(
    truth: GroundTruth,
    detections: Mapping[ImageId, ImageDetections],
    curves: Curves,
    voc: np.ndarray,
) -> dict[str, dict[str, Any]]:
    objects = truth.count_objects()
    found = np.zeros_like(objects)
    for image in detections.values():
        np.add.at(found, image.classes, 1)
    recall = np.linspace(0, 1, curves.precision.shape[1])
    numbers: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(truth.class_names):
        precision = curves.precision[0, :, index, 0]
        best: dict[str, float] | None = None
        if objects[index]:
            place = best_f1(recall, precision)
            best = {
                "score": float(curves.scores[0, place, index]),
                "precision": 100 * float(precision[place]),
                "recall": 100 * float(recall[place]),
            }
        numbers[name] = {
            "objects": int(objects[index]),
            "detections": int(found[index]),
            **curves.summary(index),
            _VOC: float(voc[index]),
            "best_f1_at_IoU50": best,
        }
    return numbers


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    cells = [
        [f"{row[name]:.1f}" if isinstance(row[name], float) else row[name] for name in columns]
        for row in rows
    ]
    align = ["left" if isinstance(value, str) else "right" for value in rows[0].values()]
    return tabulate(cells, headers=columns, tablefmt="pipe", disable_numparse=True, colalign=align)


def _without_nan(value: Any) -> Any:
    """The same with None for NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
