# SPDX-License-Identifier: Apache-2.0
"""Run a detector over a data set, and keep what the analysis asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances
from torch import nn

from ..config import ConfigError
from ..data import ground_truth
from ..engine.looks import kept_outputs, scale_to
from ..engine.predictor import Predictor
from ..evaluation import EvaluationError, GroundTruth, ImageDetections
from ..evaluation.runs import unpack_detections
from ..evaluation.truth import ImageId
from ..modeling import OneStageDetector
from ..modeling.selection import Selection, clip_to_image
from ..structures import DensePredictions
from .costs import SlotCost, slot_costs
from .misalignment import ObjectView, RawPredictions, view_objects

__all__ = ["Observed", "first_images", "observe", "read_kept"]


@dataclass(kw_only=True)
class Observed:
    """What is known of one model on the images of a ground truth.

    Attributes:
        name: what the user calls it.
        source: where it comes from, for the reader of a report.
        detections: by image id.
        views: of each object that is no crowd; None where there are no dense predictions.
        costs: by slot; empty where no model was run.
        notes: what could not be had, and why.
    """

    name: str
    source: str
    detections: dict[ImageId, ImageDetections]
    views: list[ObjectView] | None = None
    costs: list[SlotCost] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def first_images(truth: GroundTruth, limit: int | None) -> GroundTruth:
    """The ground truth of the first images alone, in the order of their ids.

    Raises:
        EvaluationError: there is no image, or no annotation at all.
    """
    if not truth.annotated or not truth.images:
        raise EvaluationError(
            f"the data set has {len(truth.images)} images"
            + ("" if truth.annotated else " and no annotations")
            + "; wanted objects to compare with: give --dataset a set with annotations"
        )
    chosen = dict(list(truth.images.items())[:limit])
    return GroundTruth(class_names=truth.class_names, dataset_ids=truth.dataset_ids, images=chosen)


def observe(
    name: str,
    predictor: Predictor,
    dataset: str,
    truth: GroundTruth,
    *,
    source: str,
    repeats: int = 5,
    progress: Callable[[str], None] = lambda text: None,
) -> Observed:
    """Detect in every image, look at its dense predictions, and measure costs on the first.

    Dense predictions are those of :class:`~d2_decouple.modeling.OneStageDetector` with a
    :class:`~d2_decouple.modeling.selection.Selection`; others are looked at by their detections.

    Args:
        name: of the model.
        predictor: the model.
        dataset: registered name of the images.
        truth: the objects of those images that are wanted.
        source: see :class:`Observed`.
        repeats: of the measurement of time; 0 leaves costs out.
        progress: is told each image.

    Raises:
        ConfigError: the model knows other classes than the data set.
        ImageError: an image cannot be read.
    """
    _check_classes(name, predictor.classes, truth)
    records = {record["image_id"]: record for record in DatasetCatalog.get(dataset)}
    seen = Observed(name=name, source=source, detections={})
    dense = _dense_parts(predictor.model)
    if dense is None:
        seen.notes.append(
            f"{type(predictor.model).__name__} is no one-stage detector of this package: it has "
            "no dense predictions to compare, and costs are of its own parts"
        )
    else:
        seen.views = []
    heads = [] if dense is None else [dense[0]]
    for index, (image_id, objects) in enumerate(truth.images.items()):
        record = records[image_id]
        with _watched(predictor.model) as inputs, kept_outputs(*heads) as kept:
            found = predictor(record["file_name"])
        seen.detections[image_id] = _as_arrays(found)
        shape = tuple(inputs[0]["image"].shape[-2:])
        if dense is not None and seen.views is not None:
            raw = _raw(dense[1], kept[0][0], found.image_size, shape)
            seen.views += view_objects(index, objects, raw)
        if index == 0 and repeats:
            known = _seen_truth(record, shape)
            seen.costs = slot_costs(predictor.model, inputs[0], known, repeats=repeats)
        progress(f"{name}: image {index + 1} of {len(truth.images)}")
    return seen


def read_kept(
    name: str, content: Mapping[str, Any], truth: GroundTruth, *, source: str
) -> Observed:
    """Detections that were kept of a training (``results/*/*.json``).

    Raises:
        EvaluationError: it holds none, or they are of other images or classes.
    """
    if not isinstance(content, Mapping) or not isinstance(content.get("images"), Mapping):
        raise EvaluationError(
            f'{source} has no kept detections; wanted a JSON object with "images": for each '
            "image rows of x1, y1, x2, y2, score, category id, as tools/bccd_table.py keeps them"
        )
    by_text = {str(image_id): image_id for image_id in truth.images}
    wanted: dict[Any, Any] = {
        by_text[key]: rows for key, rows in content["images"].items() if key in by_text
    }
    if not wanted:
        raise EvaluationError(
            f"{source} has none of the {len(by_text)} images of the data set, such as "
            f"{next(iter(by_text))!r}; give --dataset the set that it was tested on"
        )
    seen = Observed(name=name, source=source, detections=unpack_detections(wanted, truth))
    seen.notes.append("kept detections alone: no dense predictions, no costs, best of each image")
    return seen


def _dense_parts(model: nn.Module) -> tuple[nn.Module, Selection] | None:
    """What makes dense predictions, and what chooses among them."""
    if isinstance(model, OneStageDetector) and isinstance(model.selection, Selection):
        return model.head, model.selection
    return None


def _check_classes(name: str, classes: Sequence[str], truth: GroundTruth) -> None:
    if classes and tuple(classes) != truth.class_names:
        raise ConfigError(
            f"{name} knows the classes {', '.join(classes)}, the data set has "
            f"{', '.join(truth.class_names)}; give --dataset a set with the classes that the model "
            "was trained on, in their order"
        )


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """A list that the input dicts of each forward inside the block are appended to."""
    inputs: list[dict[str, Any]] = []
    handle = model.register_forward_pre_hook(lambda _, args: inputs.extend(args[0]))
    try:
        yield inputs
    finally:
        handle.remove()


def _as_arrays(found: Instances) -> ImageDetections:
    return ImageDetections(
        found.pred_boxes.tensor.double().numpy(),
        found.scores.double().numpy(),
        found.pred_classes.numpy(),
    )


def _raw(
    selection: Selection,
    predictions: DensePredictions,
    size: tuple[int, int],
    seen: tuple[int, int],
) -> RawPredictions:
    """Dense predictions of one image, brought from ``seen`` (H, W) to its own ``size`` (H, W)."""
    scale = scale_to(size, seen).double()
    with torch.inference_mode():
        scores = selection.score(predictions)[0].double().cpu()
        boxes = selection.boxes(predictions)[0].double().cpu() * scale.repeat(2)
        boxes = clip_to_image(boxes, size)
        locations = predictions.locations.double().cpu() * scale
        strides = predictions.strides.double().cpu()[:, None] * scale
    return RawPredictions(*(x.numpy() for x in (scores, boxes, locations, strides)))


def _seen_truth(record: Mapping[str, Any], seen: tuple[int, int]) -> Instances:
    """The objects of an image in pixels of what the model sees, (H, W) ``seen``."""
    truth = ground_truth(dict(record))
    scale = scale_to(seen, (record["height"], record["width"])).repeat(2)
    boxes = truth.gt_boxes.tensor * scale.to(truth.gt_boxes.tensor)
    return Instances(seen, gt_boxes=Boxes(boxes), gt_classes=truth.gt_classes)
