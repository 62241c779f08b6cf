# SPDX-License-Identifier: Apache-2.0
"""Small models and inputs for the tests, made from the real recipes."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.structures import Boxes, Instances
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from d2_decouple.config import get_config
from d2_decouple.modeling import FPN

WIDTH = 64  # the least that GroupNorm's 32 groups can normalise on a map of one cell
REGIONS = 64  # of an image that a branch of a two-stage detector learns from
# Stem, res2 (as wide as the pyramid, as in ResNet-50), res3, ...; each differs from the one
# before it, or Detectron2's basic block has no shortcut that could follow its stride.
BOTTOM_UP_CHANNELS = (16, WIDTH, 32, 48, 40)
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def environment() -> dict[str, str]:
    """For a process of its own: this checkout can be imported there, and it has one thread."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def growth_in_child(script: str) -> dict[str, float]:
    """MiB of memory by number of boxes, which a script prints as JSON in a process of its own.

    Its arguments are the folders from which the tests import.
    """
    pytest.importorskip("resource")
    folders = [path for path in sys.path if "tests" in path]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *folders],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    growth: dict[str, float] = json.loads(done.stdout)
    return growth


def tiny_resnet(*, norm: str = "FrozenBN", freeze_at: int = 2) -> ResNet:
    """One block per stage; strides, names and frozen parts as in a real ResNet."""
    stem = BasicStem(in_channels=3, out_channels=BOTTOM_UP_CHANNELS[0], norm=norm)
    channels = zip(BOTTOM_UP_CHANNELS, BOTTOM_UP_CHANNELS[1:], (1, 2, 2, 2), strict=False)
    stages = [
        [BasicBlock(before, after, stride=stride, norm=norm)] for before, after, stride in channels
    ]
    names = ["res2", "res3", "res4", "res5"]
    return ResNet(stem, stages, out_features=names, freeze_at=freeze_at)


def tiny(cfg: Any, *, num_classes: int = 3, convs: int = 1) -> Any:
    """Make a recipe small in place: what it says about slots stays as it is.

    The bottom-up network is replaced, widths become ``WIDTH``, towers get at most ``convs``
    convolutions, branches at most ``REGIONS`` regions, and there are ``num_classes`` classes.
    """
    model = cfg.model
    if "bottom_up" not in model.backbone:  # ViTDet's pyramid, of one map, becomes a plain one
        model.backbone = L(FPN)(
            bottom_up={},
            in_features=["res3", "res4", "res5"],
            out_channels=WIDTH,
            top_block=model.backbone.top_block,
            passed_on=[],
        )
    bottom_up = model.backbone.bottom_up
    model.backbone.bottom_up = L(tiny_resnet)(
        norm=bottom_up.stem.norm if "stem" in bottom_up else "FrozenBN",
        freeze_at=bottom_up.get("freeze_at", 2),
    )
    _narrow(model)
    if "roi_heads" in model:
        for name in ("batch_size_per_image", "box_batch_size_per_image"):
            if name in model.roi_heads:
                model.roi_heads[name] = min(REGIONS, model.roi_heads[name])
        model.roi_heads.num_classes = num_classes
        return cfg
    top_block = model.backbone.top_block
    if top_block.in_feature == "res5":
        top_block.in_channels = BOTTOM_UP_CHANNELS[-1]
    for name in ("cls_conv_dims", "box_conv_dims"):
        model.head[name] = list(model.head[name])[:convs]
    model.num_classes = num_classes
    return cfg


def _narrow(node: Any) -> None:
    if not isinstance(node, DictConfig):
        return
    for key in node:
        if OmegaConf.is_interpolation(node, key):
            continue
        if isinstance(node[key], DictConfig):
            _narrow(node[key])
        elif "conv_dims" in key or "fc_dims" in key:
            node[key] = [WIDTH] * len(node[key])
        elif isinstance(node[key], ListConfig):
            for item in node[key]:
                _narrow(item)
        elif "channels" in key:
            node[key] = WIDTH


def tiny_model(name: str = "fcos_R_50_FPN_1x", **options: Any) -> nn.Module:
    """The shrunken detector of a recipe, in training mode."""
    return instantiate(tiny(get_config(name), **options).model)


def make_instances(
    size: tuple[int, int], boxes: Sequence[Sequence[float]], classes: Sequence[int]
) -> Instances:
    """Ground truth of one image of ``size`` (H, W); boxes are xyxy pixels."""
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return instances


def random_input(size: tuple[int, int], objects: int, num_classes: int = 3) -> dict[str, Any]:
    """An image of noise of ``size`` (H, W) with random boxes inside it, as a data loader's."""
    height, width = size
    scale = torch.tensor([width, height, width, height])
    corners = torch.rand(objects, 2, 2) * 0.9
    low, high = corners.amin(1), corners.amax(1) + 0.1
    instances = make_instances(size, [], [])
    if objects:
        boxes = (torch.cat((low, high), dim=1) * scale).tolist()
        classes = torch.randint(num_classes, (objects,)).tolist()
        instances = make_instances(size, boxes, classes)
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    return {"image": image, "instances": instances, "height": height, "width": width}


def loss_sum(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    """All terms added, as the trainer does."""
    return torch.stack(list(losses.values())).sum()


def without_gradient(model: nn.Module) -> list[str]:
    """Names of the parameters that should have a finite gradient and do not."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and (parameter.grad is None or not torch.isfinite(parameter.grad).all())
    ]


def excite(model: nn.Module, gain: float = 1.0) -> nn.Module:
    """Draw the convolutions of a head, or of a detector's, so that outputs differ between cells.

    A fresh head has logits near its prior everywhere and so hides errors, and detects nothing.
    Biases are positive: distances are cut at zero, and boxes shall have an area.
    """
    for part in getattr(model, "head", model).modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, a=1)
            part.weight.data *= gain
            if part.bias is not None:
                nn.init.uniform_(part.bias, 0.3, 1.2)
    return model
