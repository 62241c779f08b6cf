# SPDX-License-Identifier: Apache-2.0
"""Our FCOS against torchvision's: inference, a training step, and the three-line predictor."""

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.data.transforms import ResizeShortestEdge
from torch import nn
from torchvision.models.detection import FCOS as TorchvisionFCOS
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from ..config import get_config
from ..engine.predictor import Predictor
from .detectors import CLASSES, PLANTED, ground_truth, image, inference, plant, train_step, training
from .row import Row, Step

__all__ = ["ROWS"]

_SIZE = (800, 1216)
_FCOS_SETTING = (
    f"R-50-FPN, stride in 3x3, {CLASSES} classes, one {_SIZE[0]}x{_SIZE[1]} image, fp32, "
    f"threshold 0.2, {PLANTED} planted classes, boxes of 4 strides, 20 ground-truth boxes"
)


def _our_fcos() -> nn.Module:
    torch.manual_seed(0)
    recipe = get_config("fcos_R_50_FPN_1x_d2")
    recipe.model.backbone.bottom_up.stages.stride_in_1x1 = False  # as torchvision's
    model = instantiate(recipe.model)
    plant(model.head.cls_score.bias, model.head.predictor.bbox_pred.bias)
    return model


def _torchvision_fcos() -> nn.Module:
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50",
        weights=None,
        trainable_layers=3,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    model = TorchvisionFCOS(backbone, num_classes=CLASSES)
    plant(model.head.classification_head.cls_logits.bias, model.head.regression_head.bbox_reg.bias)
    return model


def _torchvision_channels_last() -> nn.Module:
    return _torchvision_fcos().to(memory_format=torch.channels_last)


def _our_predictor(precision: str) -> Step:
    predictor = Predictor(
        _our_fcos(),
        augmentations=[ResizeShortestEdge(min(_SIZE), max(_SIZE))],
        classes=[str(index) for index in range(CLASSES)],
        device="cpu",
        precision=precision,
    )
    array = image(_SIZE).permute(1, 2, 0).contiguous().numpy()
    return lambda: predictor(array)


def _torchvision_inference(build: Callable[[], nn.Module]) -> Step:
    model, picture = build().eval(), image(_SIZE) / 255

    def step() -> Any:
        with torch.no_grad():
            return model([picture])

    return step


def _torchvision_training(build: Callable[[], nn.Module]) -> Step:
    model, picture = build().train(), image(_SIZE) / 255
    boxes, classes = ground_truth(_SIZE)
    return train_step(model, lambda: model([picture], [{"boxes": boxes, "labels": classes}]))


def _fcos_row(ours: Any, reference: Any, other: Callable[[], nn.Module], target: float) -> Row:
    layout = " in channels-last" if other is _torchvision_channels_last else " as shipped"
    return Row(
        ours=lambda: ours(_our_fcos, _SIZE),
        reference=lambda: reference(other),
        reference_name="torchvision FCOS" + layout,
        target=target,
        setting=_FCOS_SETTING,
    )


def _predictor_row(precision: str, target: float) -> Row:
    return Row(
        ours=lambda: _our_predictor(precision),
        reference=lambda: _torchvision_inference(_torchvision_fcos),
        reference_name="torchvision FCOS as shipped",
        target=target,
        setting=f"{_FCOS_SETTING}; ours is the Predictor given an array, in {precision}",
    )


ROWS: dict[str, Row] = {
    "fcos_inference": _fcos_row(inference, _torchvision_inference, _torchvision_fcos, 0.75),
    "fcos_train_step": _fcos_row(training, _torchvision_training, _torchvision_fcos, 0.75),
    "fcos_inference_channels_last": _fcos_row(
        inference, _torchvision_inference, _torchvision_channels_last, 1.0
    ),
    "fcos_train_step_channels_last": _fcos_row(
        training, _torchvision_training, _torchvision_channels_last, 1.0
    ),
    "fcos_predictor": _predictor_row("float32", 0.70),
    "fcos_predictor_bfloat16": _predictor_row("bfloat16", 0.45),
}
