# SPDX-License-Identifier: Apache-2.0
"""Where in an image the evidence for a detection lies: for its class, and for its box.

Evidence is the sensitivity of an output to each pixel, the absolute gradient. A detector is
decoupled as far as the two maps of a detection differ.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from detectron2.structures import Instances
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..config import ConfigError
from ..layers.point_gather import HALF_DTYPES
from ..modeling.selection import predicted_boxes
from ..structures import DensePredictions
from .looks import as_one_stage, cells_of, level_names_of, places_of, rounded, scale_to

__all__ = ["DetectionContext", "Evidence", "check_context", "context_of", "evidence_in"]

_METHODS = ("fcos_", "pdnet_", "tscode_")  # recipes of one-stage detectors begin so
_SMOOTHING = 0.5  # of the finest stride: the standard deviation of the Gaussian


class Evidence(NamedTuple):
    """The evidence of one branch for E detections.

    Attributes:
        maps: (E, H, W) float32, the share of each of the image's pixels; a map adds up to 1, or
            is zero where the branch does not depend on the image.
        shares: (E,) what lies inside the detection's box; pixels on its edge count in part.
        radii: (E,) how far evidence is from the middle of the box: the root of the mean square of
            the distance, in half diagonals of the box, so that its corners are at 1. Evidence
            spread evenly over a box has 1 / sqrt(3) = 0.58.
    """

    maps: Tensor
    shares: Tensor
    radii: Tensor


class DetectionContext(NamedTuple):
    """Where the evidence for the E strongest of D detections of one image lies.

    Attributes:
        instances: all detections, best first, on the CPU, in pixels of the image: ``pred_boxes``,
            ``scores``, ``pred_classes``, ``location_index``, and

            - ``locations`` (D, 2), the reference point (x, y) of the cell that found it;
            - ``levels`` (D,), the place of that cell's level in ``level_names``.
        class_evidence: for the logit of the detection's class. Quality (centerness) is no part of
            it, though it is one of the score.
        box_evidence: for its box: the absolute gradients of the four sides, added. (Gradients of a
            sum would cancel where a pixel moves two sides against each other.)
        overlaps: (E,) what both maps of a detection have in common, the sum of the smaller share
            of each pixel: 1 where they are the same, 0 where no pixel matters to both.
        level_names: the names of the L predicted levels, finest first, such as "p3".
        strides: their strides, in pixels of the image as the model saw it.
    """

    instances: Instances
    class_evidence: Evidence
    box_evidence: Evidence
    overlaps: Tensor
    level_names: tuple[str, ...]
    strides: tuple[int, ...]

    def as_records(self) -> list[dict[str, Any]]:
        """For each of the E detections its ``location``, ``level`` and numbers, for JSON."""
        strongest = self.instances[: len(self.overlaps)]
        branches = (("class", self.class_evidence), ("box", self.box_evidence))
        return [
            {
                **place,
                **{
                    name: {
                        "share": rounded(float(evidence.shares[index]), 4),
                        "radius": rounded(float(evidence.radii[index]), 4),
                    }
                    for name, evidence in branches
                },
                "overlap": rounded(float(self.overlaps[index]), 4),
            }
            for index, place in enumerate(places_of(strongest, self.level_names))
        ]


def check_context(model: nn.Module) -> None:
    """Raise ConfigError unless the evidence for a model's detections can be told."""
    as_one_stage(model, "context", _METHODS)


@torch.inference_mode(False)  # a caller may be in it, and its tensors have no gradients
@torch.enable_grad()
def context_of(
    model: Any, item: Mapping[str, Any], found: Instances, *, limit: int | None = None
) -> DetectionContext:
    """Where the evidence for an image's detections lies.

    Gradients are those of what the model computes, also where its training cuts them (PDNet's
    points without their coarse box), in float32 also where its weights are in half precision.
    They are taken with respect to the image as the model is given it, through its own
    normalisation and padding; absolute values are added over the channels, smoothed by a Gaussian
    of half the finest stride, and brought to the pixels of the image. The model stays as it is:
    parameters get no gradients.

    Args:
        model: a :class:`OneStageDetector` in evaluation mode.
        item: Detectron2's input dict of the image, with ``image`` (C, H', W').
        found: its detections in pixels of the image (H, W), best first, with ``location_index``.
        limit: of so many detections, the strongest; by default all.

    Raises:
        ConfigError: an output of the model has no gradient, or one that is not finite.
    """
    strongest, seen = found[:limit], tuple(item["image"].shape[-2:])
    model = _differentiable(model)
    pixels = item["image"].to(model.device, torch.float32, copy=True).requires_grad_()
    with _Uncut(), torch.autocast(pixels.device.type, enabled=False):
        _, _, predictions = model.predict([{**item, "image": pixels}])
    deviation = _SMOOTHING * model.head.strides[0]
    rows, columns = (
        _spreading(*sides, deviation).to(pixels)
        for sides in zip(seen, found.image_size, strict=True)
    )
    maps = torch.zeros(2, len(strongest), *found.image_size)
    for index, outputs in enumerate(_outputs(model, predictions, strongest)):
        for branch, (name, values) in enumerate(outputs):
            maps[branch, index] = rows @ _saliency(name, values, pixels) @ columns.T
    maps /= maps.sum((-2, -1), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    scale = scale_to(found.image_size, seen)
    fields = {**found.get_fields(), **cells_of(predictions, found, scale)}
    boxes = strongest.pred_boxes.tensor
    return DetectionContext(
        Instances(found.image_size, **fields),
        class_evidence=evidence_in(maps[0], boxes),
        box_evidence=evidence_in(maps[1], boxes),
        overlaps=torch.minimum(*maps).sum((-2, -1)),
        level_names=level_names_of(model),
        strides=model.head.strides,
    )


def evidence_in(maps: Tensor, boxes: Tensor) -> Evidence:
    """:class:`Evidence` of maps (E, H, W) that add up to 1 or 0, with boxes (E, 4) xyxy pixels."""
    low, high = boxes[:, :2], boxes[:, 2:]
    middles, half_diagonals = (low + high) / 2, (high - low).norm(dim=1) / 2
    covered, squares = [], torch.zeros_like(half_diagonals)
    for axis, length in enumerate((maps.shape[2], maps.shape[1])):  # x, y
        edges = torch.arange(length + 1, dtype=boxes.dtype)
        inside = edges.clamp(low[:, axis, None], high[:, axis, None])
        covered.append(inside.diff(dim=1))
        distances = edges[:-1] + 0.5 - middles[:, axis, None]
        squares += (maps.sum(1 + axis) * distances.square()).sum(1)
    shares = torch.einsum("ehw,ew,eh->e", maps, *covered)
    tiny = torch.finfo(boxes.dtype).tiny
    return Evidence(maps, shares, squares.sqrt() / half_diagonals.clamp(min=tiny))


class _Uncut(TorchFunctionMode):
    """Gradients are those of what is computed: ``detach``, which steers a training, does nothing.

    So PDNet's class depends on the coarse box that its points start from, as it does in truth.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (torch.Tensor.detach, torch.detach):
            return args[0]
        return func(*args, **(kwargs or {}))


def _differentiable(model: Any) -> Any:
    """The model; where its tensors are in half precision or of inference mode, a copy in float32.

    Gradients in half precision would have two or three digits, or underflow.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if not any(x.dtype in HALF_DTYPES or x.is_inference() for x in tensors):
        return model
    return deepcopy(model).float()


def _outputs(
    model: Any, predictions: DensePredictions, found: Instances
) -> Iterator[tuple[tuple[str, Tensor], tuple[str, Tensor]]]:
    """For each detection of one image its class logit (1,) and the sides (4,) of its box."""
    boxes = getattr(model.selection, "boxes", predicted_boxes)(predictions)[0]
    for location, label in zip(
        found.location_index.tolist(), found.pred_classes.tolist(), strict=True
    ):
        logit = predictions.logits[0, location, label]
        yield ("class logit", logit[None]), ("box", boxes[location])


def _saliency(name: str, values: Tensor, pixels: Tensor) -> Tensor:
    """(H, W) absolute gradients of all values (V,), added over them and over channels (C, H, W)."""
    total = torch.zeros_like(pixels[0], requires_grad=False)
    for value in values:
        gradient = None
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value, pixels, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise ConfigError(
                f"the {name} of a detection has no gradient with respect to the image; wanted is "
                "a model that computes it from the image, and not under torch.no_grad()"
            )
        total += gradient.abs().sum(0)
    if not bool(total.isfinite().all()):
        raise ConfigError(
            f"the gradient of a detection's {name} with respect to the image is not finite; "
            "wanted are weights with finite gradients: take those of another training"
        )
    return total


def _spreading(before: int, after: int, deviation: float) -> Tensor:
    """(after, before) matrix that smooths and scales one axis at once, and loses nothing.

    Args:
        before: pixels of the axis.
        after: pixels that it shall have.
        deviation: of the Gaussian, in pixels before; at least half the distance of those after.
    """
    # In float64, where a Gaussian is not zero at the nearest pixel.
    old = torch.arange(before, dtype=torch.float64) + 0.5
    new = (torch.arange(after, dtype=torch.float64) + 0.5) * before / after
    deviation = max(deviation, before / after / 2)
    weights = torch.exp(-((new[:, None] - old) / deviation).square() / 2)
    return weights / weights.sum(0)
