# SPDX-License-Identifier: Apache-2.0
"""PDNet against our FCOS on the same backbone: inference and a training step."""

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
_SETTING = (
    f"R-50-FPN, stride in 1x1, P6 from C5, {CLASSES} classes, one {_SIZE[0]}x{_SIZE[1]} image, "
    f"fp32, threshold 0.05, {PLANTED} planted classes, boxes of 4 strides, 20 ground-truth boxes"
)


def _pdnet() -> nn.Module:
    torch.manual_seed(0)
    model = instantiate(get_config("pdnet_R_50_FPN_1x").model)
    plant(model.head.predictor.cls_score.bias)
    return model


def _fcos() -> nn.Module:
    torch.manual_seed(0)
    recipe = get_config("fcos_R_50_FPN_1x").model
    recipe.backbone.top_block.update(in_feature="res5", in_channels=2048)  # as PDNet has it
    model = instantiate(recipe)
    plant(model.head.cls_score.bias, model.head.predictor.bbox_pred.bias)
    return model


def _row(of: Callable[..., Any], target: float) -> Row:
    return Row(
        ours=lambda: of(_pdnet, _SIZE),
        reference=lambda: of(_fcos, _SIZE),
        reference_name="our FCOS",
        target=target,
        setting=_SETTING,
    )


ROWS: dict[str, Row] = {
    "pdnet_inference": _row(inference, 1.05),
    "pdnet_train_step": _row(training, 1.10),
}
