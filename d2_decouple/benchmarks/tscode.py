# SPDX-License-Identifier: Apache-2.0
"""TSCODE against the host it is plugged into: inference and a training step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from detectron2.config import instantiate
from torch import nn

from ..config import get_config
from .detectors import CLASSES, PLANTED, inference, plant, training
from .row import Row

__all__ = ["ROWS"]

_SIZE = (800, 1333)
_SETTING = (
    f"R-50-FPN, {CLASSES} classes, one {_SIZE[0]}x{_SIZE[1]} image, fp32, threshold 0.05, "
    f"{PLANTED} planted classes, 20 ground-truth boxes"
)
_NAMES = {"fcos": "FCOS", "atss": "ATSS", "gfl": "GFL"}


def _model(recipe: str) -> nn.Module:
    torch.manual_seed(0)
    model = instantiate(get_config(recipe).model)
    # One block of classes for each cell that a prediction is made for.
    for block in model.head.cls_score.bias.view(-1, CLASSES):
        plant(block)
    if recipe.endswith("fcos_R_50_FPN_1x"):  # the boxes of the others have a size already
        nn.init.constant_(model.head.predictor.bbox_pred.bias, 2.0)
    return model


def _row(of: Callable[..., Any], host: str) -> Row:
    return Row(
        ours=lambda: of(partial(_model, f"tscode_{host}_R_50_FPN_1x"), _SIZE),
        reference=lambda: of(partial(_model, f"{host}_R_50_FPN_1x"), _SIZE),
        reference_name=f"our {_NAMES[host]}",
        target=1.0,
        setting=_SETTING,
    )


ROWS: dict[str, Row] = {
    f"tscode_{host}_{step}": _row(of, host)
    for host in _NAMES
    for step, of in (("inference", inference), ("train_step", training))
}
