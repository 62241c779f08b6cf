# SPDX-License-Identifier: Apache-2.0
"""A training step of our ATSS and GFL against mmdetection's (3.3), where that is installed.

The same network on both sides: ResNet-50-FPN, first stage and batch norms' statistics frozen.
mmdetection goes on training the batch norms' factors, ours are frozen as Detectron2's.
"""

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from torch import Tensor, nn

from ..config import get_config
from .detectors import CLASSES, ground_truth, image, train_step, training
from .row import Row, Step

__all__ = ["ROWS"]

_SIZE = (800, 1216)
_SETTING = (
    f"R-50-FPN, stride in 3x3, {CLASSES} classes, one {_SIZE[0]}x{_SIZE[1]} image, fp32, 20 "
    "ground-truth boxes"
)
_NAMES = {"atss": "ATSS", "gfl": "GFL"}


def _ours(host: str) -> nn.Module:
    torch.manual_seed(0)
    return instantiate(get_config(f"{host}_R_50_FPN_1x").model)


def _theirs(host: str) -> Step:
    # By name: nobody needs mmdetection to read this file, or to check its types.
    names = ("mmdet", "mmengine.config", "mmengine.registry")
    mmdet, config, scope = [import_module(name) for name in names]
    scope.init_default_scope("mmdet")
    import_module("mmdet.models")
    folder = Path(str(mmdet.__file__)).parent / ".mim" / "configs" / host
    recipe = config.Config.fromfile(folder / f"{host}_r50_fpn_1x_coco.py").model
    recipe.backbone.init_cfg = None  # random weights, as ours
    torch.manual_seed(0)
    model = import_module("mmdet.registry").MODELS.build(recipe).train()
    sample = _sample()
    scaled = (image(_SIZE).float() - 116) / 58

    def losses() -> dict[str, Tensor]:
        found = model.loss(scaled[None], [sample])
        return {
            name: torch.stack(x).sum() if isinstance(x, list) else x for name, x in found.items()
        }

    return train_step(model, losses)


def _sample() -> Any:
    """The ground truth as mmdetection takes it."""
    boxes, classes = ground_truth(_SIZE)
    truth = import_module("mmengine.structures").InstanceData(bboxes=boxes, labels=classes)
    sample = import_module("mmdet.structures").DetDataSample(
        metainfo={"img_shape": _SIZE, "pad_shape": _SIZE, "batch_input_shape": _SIZE}
    )
    sample.gt_instances = truth
    return sample


ROWS: dict[str, Row] = {
    f"{host}_train_step": Row(
        ours=partial(training, partial(_ours, host), _SIZE),
        reference=partial(_theirs, host),
        reference_name=f"mmdetection's {_NAMES[host]}",
        target=1.0,
        setting=_SETTING,
        needs="mmdet",
    )
    for host in _NAMES
}
