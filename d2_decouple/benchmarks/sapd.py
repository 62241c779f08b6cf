# SPDX-License-Identifier: Apache-2.0
"""SAPD against Detectron2's RetinaNet: inference, with BFP and without, and a training step."""

from collections.abc import Callable
from functools import partial

import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from torch import nn

from ..config import get_config
from .detectors import CLASSES, PLANTED, inference, plant, training
from .row import Row, Step

__all__ = ["ROWS"]

_SIZE = (800, 1216)
_ITERATION = 80_000  # of 90,000: levels are selected softly by now
_SAPD, _BALANCED = "sapd_R_50_FPN_1x_nobfp", "sapd_R_50_FPN_1x"
# Of the last convolutions' weights. Nothing normalises a random network's values, which are in the
# hundreds: they would be all that predictions consist of.
_NOISE = 0.01
_SETTING = (
    f"R-50-FPN, stride in 1x1, P6 from C5, {CLASSES} classes, one {_SIZE[0]}x{_SIZE[1]} image, "
    f"fp32, threshold 0.05, {PLANTED} planted classes, boxes of about 4 strides, 20 ground-truth "
    "boxes, levels selected softly"
)


def _sapd(recipe: str) -> nn.Module:
    torch.manual_seed(0)
    model = instantiate(get_config(recipe).model)
    predictor = model.head.predictor
    _quieten(model.head.cls_score, predictor.bbox_pred)
    plant(model.head.cls_score.bias)
    nn.init.constant_(predictor.bbox_pred.bias, 2 / predictor.unit)
    detector: nn.Module = model
    return detector


def _retinanet() -> nn.Module:
    torch.manual_seed(0)
    model = instantiate(get_config("retinanet_R_50_FPN_1x_d2").model)
    _quieten(model.head.cls_score, model.head.bbox_pred)
    for anchor in model.head.cls_score.bias.view(-1, CLASSES):
        plant(anchor)
    detector: nn.Module = model
    return detector


@torch.no_grad()
def _quieten(*layers: nn.Conv2d) -> None:
    for layer in layers:
        layer.weight *= _NOISE


def _training(build: Callable[[], nn.Module], size: tuple[int, int]) -> Step:
    step = training(build, size)

    def run() -> None:
        with EventStorage(_ITERATION):
            step()

    return run


def _row(of: Callable[..., Step], recipe: str, target: float) -> Row:
    return Row(
        ours=lambda: of(partial(_sapd, recipe), _SIZE),
        reference=lambda: of(_retinanet, _SIZE),
        reference_name="Detectron2's RetinaNet",
        target=target,
        setting=_SETTING if recipe == _SAPD else f"{_SETTING}; with BFP",
    )


ROWS: dict[str, Row] = {
    "sapd_inference": _row(inference, _SAPD, 0.78),
    "sapd_bfp_inference": _row(inference, _BALANCED, 0.85),
    "sapd_train_step": _row(_training, _SAPD, 0.85),
}
