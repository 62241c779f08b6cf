# SPDX-License-Identifier: Apache-2.0
"""What looks inside a detector have in common: outputs that are kept, and numbers to hand out."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from ..config import ConfigError, config_names
from ..modeling import OneStageDetector, TestTimeAugmentation
from ..structures import DensePredictions

__all__ = [
    "as_one_stage",
    "cells_of",
    "check_limit",
    "kept_outputs",
    "level_names_of",
    "ordinary",
    "places_of",
    "recipes_with",
    "rounded",
    "scale_to",
]

_NOT_OURS = "_d2"  # the recipes of Detectron2's own detectors end so


@contextmanager
def kept_outputs(*modules: nn.Module) -> Iterator[list[list[Any]]]:
    """For each module a list that its outputs inside the block are appended to.

    So what explains a detection comes from the forward that found it, and no second one is
    needed. Forwards of other threads, which may run the same model at this moment, are not kept.
    """
    thread = get_ident()
    kept: list[list[Any]] = [[] for _ in modules]

    def keeper(outputs: list[Any]) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if get_ident() == thread:
                outputs.append(output)

        return keep

    with ExitStack() as hooks:
        for module, outputs in zip(modules, kept, strict=True):
            hooks.callback(module.register_forward_hook(keeper(outputs)).remove)
        yield kept


def check_limit(limit: int | None) -> None:
    """Raise ConfigError unless ``limit`` is a number of detections, or None."""
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be a whole number from 1, or None, got {limit}")


def as_one_stage(model: nn.Module, what: str, prefixes: Sequence[str]) -> OneStageDetector:
    """The model itself, if it answers by a dense prediction for each detection.

    Args:
        model: what a predictor runs.
        what: the user wants to see, "points" or "context".
        prefixes: of the names of recipes that have it.

    Raises:
        ConfigError: it does not.
    """
    if isinstance(model, TestTimeAugmentation):
        raise ConfigError(
            "test-time augmentation merges detections of several forwards, and does not keep "
            "which prediction (location_index) of which forward one was: leave tta out to see "
            f"{what}"
        )
    if not isinstance(model, OneStageDetector):
        raise ConfigError(
            f"{type(model).__name__} is not a OneStageDetector, whose predictions say where each "
            f"detection was read; {recipes_with(what, prefixes)}"
        )
    return model


def recipes_with(what: str, prefixes: Sequence[str]) -> str:
    """The end of a message that names recipes, by how their names begin."""
    names = [
        name
        for name in config_names()
        if name.startswith(tuple(prefixes)) and not name.endswith(_NOT_OURS)
    ]
    if not names:
        return f"no recipe here has {what}"
    return f"recipes with {what} are {', '.join(names[:5])}" + (", ..." if names[5:] else "")


def scale_to(size: tuple[int, int], seen: tuple[int, int]) -> Tensor:
    """(2,) pixels in x and y of an image of ``size`` (H, W) per pixel of one of ``seen`` (H, W)."""
    return torch.tensor([size[1] / seen[1], size[0] / seen[0]])


def cells_of(predictions: DensePredictions, found: Instances, scale: Tensor) -> dict[str, Tensor]:
    """The cells that found the D detections of one image.

    Args:
        predictions: of a batch of one image.
        found: its detections, with ``location_index``.
        scale: of :func:`scale_to`.

    Returns:
        ``locations`` (D, 2), their reference points (x, y) in pixels of the image, and ``levels``
        (D,), the place of their level among those that are predicted, finest first.
    """
    index = found.location_index
    ends = torch.tensor(predictions.level_sizes).cumsum(0)
    locations = predictions.locations[index.to(predictions.locations.device)]
    return {
        "locations": ordinary(locations) * scale,
        "levels": torch.searchsorted(ends, index, right=True),
    }


def level_names_of(model: Any) -> tuple[str, ...]:
    """The names of a one-stage detector's predicted levels, finest first, such as "p3"."""
    return tuple(model.head_in_features[-len(model.head.strides) :])


def places_of(found: Instances, level_names: Sequence[str]) -> list[dict[str, Any]]:
    """For each detection its ``location`` and its ``level`` by name, for JSON."""
    places = zip(found.locations.tolist(), found.levels.tolist(), strict=True)
    return [
        {"location": rounded(location, 2), "level": level_names[level]}
        for location, level in places
    ]


def ordinary(value: Any) -> Any:
    """A copy of a field of ``Instances`` on the CPU, made outside of inference mode, in float32.

    Tensors of inference mode refuse to be changed in place outside of it, and users of Detectron2
    scale and clip boxes in place.
    """
    if hasattr(value, "tensor"):  # boxes
        return type(value)(ordinary(value.tensor))
    if not isinstance(value, Tensor):
        return value
    # Scores of Detectron2's own detectors come in half precision, which NumPy may not know.
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    return value.detach().to("cpu", dtype, copy=True)


def rounded(values: Any, digits: int) -> Any:
    """The numbers of nested lists, rounded."""
    if isinstance(values, list):
        return [rounded(value, digits) for value in values]
    return round(values, digits)
