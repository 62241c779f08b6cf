# SPDX-License-Identifier: Apache-2.0
"""Decoupled R-CNN against Detectron2's Faster and Cascade R-CNN: inference and a training step.

Weights are random, so what a trained network would say is planted on both sides: proposals gather
around objects, regressors move boxes little, and one proposal in seven seems to hold an object.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..config import get_config
from ..layers.boxes import BoxTransform, overlaps
from ..modeling import FPN
from .detectors import (
    CLASSES,
    PLANTED,
    SizedRow,
    ground_truth,
    inference,
    training,
    training_inputs,
)
from .row import Row, Step

__all__ = ["ROWS"]

_SIZE = (800, 1333)
_THRESHOLD = 0.05
_PASSING = 0.15  # share of the test proposals that have a class above the threshold
_SETTING = (
    f"R-50-FPN, both on our FPN (norms folded), {CLASSES} classes, one {_SIZE[0]}x{_SIZE[1]} "
    f"image, fp32, threshold {_THRESHOLD}; planted: 150 of 1,000 test proposals have a class above "
    "it (120 by the mean of Cascade R-CNN's three), training proposals gather around 20 objects: "
    "164 positives at each of our regression stages, 71 in the sample of 512 that Detectron2 and "
    "our classifier draw; learning rate 0"
)


def _ours(stages: int) -> nn.Module:
    recipe = get_config("decoupled_rcnn_R_50_FPN_1x" + ("_single" if stages == 1 else "")).model
    recipe.roi_heads.selection.test_score_thresh = _THRESHOLD
    return _planted(recipe)


def _theirs(stages: int) -> nn.Module:
    recipe = get_config(f"{'faster' if stages == 1 else 'cascade'}_rcnn_R_50_FPN_1x_d2").model
    recipe.backbone.update(_target_=FPN, passed_on=[])
    return _planted(recipe)


def _planted(recipe: Any) -> nn.Module:
    torch.manual_seed(0)  # so the backbones and the RPNs of all are the same
    model = instantiate(recipe)
    _plant_boxes(model)
    _plant_scores(model)
    return model


def _layers(model: nn.Module, name: str) -> list[Any]:
    return [layer for path, layer in model.named_modules() if path.endswith(f".{name}")]


def _plant_boxes(model: Any) -> None:
    head, anchors = model.proposal_generator.rpn_head, model.proposal_generator.anchor_generator
    with torch.no_grad():
        head.objectness_logits.weight *= 0.5  # noise beside what is planted
        head.anchor_deltas.weight *= 0.05
        for layer in _layers(model, "bbox_pred"):
            layer.weight *= 0.1
    planted: list[tuple[Tensor, Tensor]] = []

    def plant(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        if not planted:
            planted.extend(map(_attraction, anchors(inputs[0]), outputs[0]))
        added = zip(*planted, strict=True)
        return tuple(
            [x + y for x, y in zip(*pair, strict=True)] for pair in zip(outputs, added, strict=True)
        )

    head.register_forward_hook(plant)


def _attraction(anchors: Boxes, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Objectness (A, H, W) by the overlap with an object, and most of the way there (4 A, H, W)."""
    boxes, _ = ground_truth(_SIZE)
    overlap, index = overlaps(boxes, anchors.tensor).max(0)
    change = 0.8 * BoxTransform().get_deltas(anchors.tensor, boxes[index])
    change[overlap < 0.3] = 0
    grid = (*logits.shape[-2:], -1)
    return (8 * overlap - 4).view(grid).permute(2, 0, 1), change.view(grid).permute(2, 0, 1)


@torch.no_grad()
def _plant_scores(model: nn.Module) -> None:
    classifiers, outputs = _layers(model, "cls_score"), list[Tensor]()
    for layer in classifiers:
        layer.bias[:PLANTED] += 20.0  # a few classes outdo the others everywhere
    handles = [x.register_forward_hook(lambda *call: outputs.append(call[2])) for x in classifiers]
    inference(lambda: model, _SIZE)()
    for handle, layer, logits in zip(handles, classifiers, outputs, strict=True):
        handle.remove()
        best = logits[:, :-1].max(-1, keepdim=True).values
        others = (logits[:, :-1] - best).exp().sum(-1)
        # The background with which a region's best class has the threshold as its score.
        background = best[:, 0] + (1 / _THRESHOLD - others).log()
        layer.bias[-1] += (background - logits[:, -1]).quantile(1 - _PASSING)


def _train_step(build: Callable[[], nn.Module]) -> Step:
    step = training(build, _SIZE, lr=0.0)  # what is planted must stay

    def run() -> None:
        torch.manual_seed(0)  # for the draws of the samples
        with EventStorage():
            step()

    return run


def _inference(build: Callable[[], nn.Module]) -> Step:
    return inference(build, _SIZE)


def _saved_mib(run: Callable[[], Any], parameters: Iterable[Tensor]) -> float:
    """What is saved for the backward of ``run``'s result, the parameters aside."""
    sizes: dict[int, int] = {}  # of each storage once

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    for parameter in parameters:
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    del result  # until here it held what was saved, so no storage took another's place
    return sum(sizes.values()) / 2**20


def _saved_by_roi_heads(model: Any) -> float:
    inputs = training_inputs(_SIZE)
    truth = [x["instances"] for x in inputs]
    torch.manual_seed(0)
    with EventStorage():
        images = model.train().preprocess_image(inputs)
        features = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, features, truth)
        return _saved_mib(
            lambda: model.roi_heads(images, features, proposals, truth), model.parameters()
        )


def _parameters_mib(model: nn.Module) -> float:
    return sum(x.nbytes for x in model.parameters()) / 2**20


def _trained_mib(model: nn.Module) -> float:
    """Parameters, and the gradient and the momentum of those that are trained."""
    return _parameters_mib(model) + 2 * sum(
        x.nbytes / 2**20 for x in model.parameters() if x.requires_grad
    )


_SAVED = "saved by the ROI heads"


def _sizes(stages: int, of: Callable[..., Step]) -> dict[str, tuple[float, float]]:
    measures = {"parameters": _parameters_mib}
    if of is _train_step:
        measures = {"parameters, gradients, momentum": _trained_mib, _SAVED: _saved_by_roi_heads}
    ours, theirs = _ours(stages), _theirs(stages)
    return {name: (measure(ours), measure(theirs)) for name, measure in measures.items()}


def _row(
    stages: int, of: Callable[..., Step], target: float, size_targets: Mapping[str, float]
) -> Row:
    return SizedRow(
        ours=lambda: of(partial(_ours, stages)),
        reference=lambda: of(partial(_theirs, stages)),
        reference_name=f"Detectron2's {'Faster' if stages == 1 else 'Cascade'} R-CNN",
        target=target,
        setting=_SETTING,
        sizes=partial(_sizes, stages, of),
        size_targets=size_targets,
    )


ROWS: dict[str, Row] = {
    "decoupled_rcnn_1_inference": _row(1, _inference, 1.03, {}),
    "decoupled_rcnn_1_train_step": _row(1, _train_step, 1.03, {}),
    "decoupled_rcnn_3_inference": _row(3, _inference, 0.9, {}),
    "decoupled_rcnn_3_train_step": _row(3, _train_step, 0.9, {_SAVED: 0.5}),
}
