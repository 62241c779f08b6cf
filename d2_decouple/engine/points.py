# SPDX-License-Identifier: Apache-2.0
"""Where the detections of an image were read: points, coarse boxes, levels, in its own pixels."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from detectron2.structures import Instances
from torch import Tensor, nn

from ..config import ConfigError
from ..structures import DensePredictions
from .looks import (
    as_one_stage,
    cells_of,
    kept_outputs,
    level_names_of,
    ordinary,
    places_of,
    recipes_with,
    rounded,
    scale_to,
)

__all__ = ["DetectionPoints", "kept_predictions", "points_of"]

_METHODS = ("pdnet", "salt")  # the recipes of these begin with the name


class DetectionPoints(NamedTuple):
    """Where each of the D detections of one image was read.

    Attributes:
        instances: the detections, best first, on the CPU, in pixels of the image: ``pred_boxes``,
            ``scores``, ``pred_classes``, ``location_index``, and

            - ``locations`` (D, 2), the reference point (x, y) of the cell that found it;
            - ``levels`` (D,), the place of that cell's level in ``level_names``;
            - each entry of ``DensePredictions.extras`` that has a value for each prediction, under
              its own name. Those named ``*points`` are (D, P, 2), those named ``*boxes`` are
              (D, 4) xyxy, both in pixels of the image and free to leave it; others are as the
              model wrote them. PDNet has ``coarse_boxes``, ``boundary_points`` (P = 4: left, top,
              right, bottom), ``class_points`` and ``box_level_weights`` (D, 4, L), the weight
              of each level in the value of each side.
        level_names: the names of the L predicted levels, finest first, such as "p3".
        strides: their strides, in pixels of the image as the model saw it.
    """

    instances: Instances
    level_names: tuple[str, ...]
    strides: tuple[int, ...]

    def as_records(self) -> list[dict[str, Any]]:
        """For each detection its ``location``, its ``level`` by name and its extras, for JSON."""
        own = ("pred_boxes", "scores", "pred_classes", "location_index", "locations", "levels")
        fields = self.instances.get_fields()
        extras = {
            # Coordinates as boxes are written; weights need more digits.
            name: rounded(value.tolist(), 2 if name.endswith(("points", "boxes")) else 4)
            for name, value in fields.items()
            if name not in own
        }
        return [
            {**place, **{name: values[index] for name, values in extras.items()}}
            for index, place in enumerate(places_of(self.instances, self.level_names))
        ]


@contextmanager
def kept_predictions(model: nn.Module) -> Iterator[list[DensePredictions]]:
    """A list that the predictions of each forward inside the block are appended to.

    So detections come from the model's own forward, with whatever a model does to its boxes last,
    and no second forward is needed to explain them.

    Raises:
        ConfigError: the model answers otherwise than by a dense prediction for each detection.
    """
    with kept_outputs(as_one_stage(model, "points", _METHODS).head) as (kept,):
        yield kept


def points_of(
    model: Any, predictions: DensePredictions, found: Instances, seen: tuple[int, int]
) -> DetectionPoints:
    """Collect what the predictions of one image say about its detections.

    Args:
        model: the :class:`OneStageDetector` that made them.
        predictions: of a batch of one image.
        found: its detections in pixels of the image, with ``location_index``.
        seen: (H, W) of the image as the model saw it, before padding.

    Raises:
        ConfigError: there are no points among the predictions' extras.
    """
    extras = {
        name: value
        for name, value in predictions.extras.items()
        if isinstance(value, Tensor) and value.shape[:2] == predictions.boxes.shape[:2]
    }
    if not any(_are_points(name, value.shape[2:]) for name, value in extras.items()):
        parts = (model.head.aligner, model.head.predictor)
        names = " and ".join(type(part).__name__ for part in parts if part is not None)
        raise ConfigError(
            f"this {type(model).__name__} with {names} has no points to show: it predicts "
            f"everything at the cell itself; {recipes_with('points', _METHODS)}"
        )
    scale = scale_to(found.image_size, seen)
    chosen = found.location_index.to(predictions.locations.device)
    fields = {name: _scaled(name, value[0, chosen], scale) for name, value in extras.items()}
    fields |= cells_of(predictions, found, scale)
    return DetectionPoints(
        Instances(found.image_size, **{**fields, **found.get_fields()}),
        level_names=level_names_of(model),
        strides=model.head.strides,
    )


def _are_points(name: str, shape: tuple[int, ...]) -> bool:
    # By the name as well: a weight for each of two levels has the same shape.
    return name.endswith("points") and len(shape) == 2 and shape[1] == 2


def _scaled(name: str, values: Tensor, scale: Tensor) -> Tensor:
    """Values (D, ...) of an extra; points and boxes are brought to pixels of the image."""
    values = ordinary(values)
    if _are_points(name, values.shape[1:]):
        return values * scale
    if name.endswith("boxes") and values.shape[1:] == (4,):
        return values * scale.repeat(2)
    return values
