# SPDX-License-Identifier: Apache-2.0
"""SALT-Net against GFL, the host whose second version it is made from: inference and a step."""

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import instantiate
from torch import nn

from ..config import get_config
from .detectors import CLASSES, PLANTED, inference, plant, training
from .row import Row

__all__ = ["ROWS"]

_SIZE = (800, 1333)
_COARSE_SIDE = 4.0  # cells from a cell to each side of its coarse box: half of an anchor
_SETTING = (
    f"R-50-FPN, {CLASSES} classes, one {_SIZE[0]}x{_SIZE[1]} image, fp32, threshold 0.05, "
    f"{PLANTED} planted classes, coarse boxes of 8 strides, so that points lie apart, 20 "
    "ground-truth boxes"
)


def _model(recipe: str) -> Any:
    torch.manual_seed(0)
    model = instantiate(get_config(recipe).model)
    plant(model.head.cls_score.bias)
    return model


def _gfl() -> nn.Module:
    model: nn.Module = _model("gfl_R_50_FPN_1x")
    return model


def _salt() -> nn.Module:
    model = _model("salt_R_50_FPN_1x")
    # Random weights would read all points of a cell side by side, which is cheaper.
    nn.init.constant_(model.head.aligner.coarse_pred.bias, _COARSE_SIDE)
    salt: nn.Module = model
    return salt


def _row(of: Callable[..., Any], target: float) -> Row:
    return Row(
        ours=lambda: of(_salt, _SIZE),
        reference=lambda: of(_gfl, _SIZE),
        reference_name="our GFL",
        target=target,
        setting=_SETTING,
    )


ROWS: dict[str, Row] = {
    "salt_inference": _row(inference, 1.30),
    "salt_train_step": _row(training, 1.35),
}
