# SPDX-License-Identifier: Apache-2.0
"""Parameters and multiply-adds of a recipe's model.

A one-stage model is counted without memory or arithmetic, on tensors that have shapes alone. What
a two-stage model reads depends on its proposals, so it runs once, on noise, with the random weights
of one seed.
"""

from __future__ import annotations

from copy import deepcopy
from math import ceil
from typing import Any

import torch
from detectron2.config import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ..analysis.costs import DEFORMABLE
from .catalogue import Costs

__all__ = ["count_costs", "image_size"]

_PRETRAINED = "model.backbone.bottom_up.pretrained"
_DIVISOR = 32  # of an image's sides, to which every pyramid pads


def count_costs(cfg: Any) -> Costs:
    """Costs of a recipe's model for one image of :func:`image_size`."""
    height, width = size = image_size(cfg)
    if OmegaConf.select(cfg, _PRETRAINED):
        cfg = deepcopy(cfg)
        OmegaConf.update(cfg, _PRETRAINED, False)  # to count them, nothing needs to be fetched
    model = _built(cfg).eval()
    assigner = {id(x) for x in getattr(model, "assigner", nn.Module()).parameters()}
    parameters = sum(x.numel() for x in model.parameters() if id(x) not in assigner)
    counter = FlopCounterMode(display=False, custom_mapping=DEFORMABLE)
    if hasattr(model, "roi_heads"):
        torch.manual_seed(0)
        model = instantiate(cfg.model).cpu().eval()
        image = torch.randint(256, (3, height, width), dtype=torch.uint8)
        with torch.no_grad(), counter:
            model([{"image": image, "height": height, "width": width}])
    else:
        padded = [_DIVISOR * ceil(side / _DIVISOR) for side in size]
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            _have_shapes_alone(model)
            with counter:
                maps = model.backbone(torch.empty(1, 3, *padded))
                model.head([maps[name] for name in model.head_in_features])
    return Costs(parameters, counter.get_total_flops() // 2, size)


def _built(cfg: Any) -> Any:
    """The model without memory for its numbers, where its parts allow that."""
    try:
        with torch.device("meta"):
            return instantiate(cfg.model)
    except (NotImplementedError, RuntimeError):  # some ask a tensor for its value
        return instantiate(cfg.model)


def image_size(cfg: Any) -> tuple[int, int]:
    """Height and width that a recipe's test images have: 2:3 and full multiples of 32, BCCD 3:4."""
    short = int(cfg.dataloader.test.mapper.augmentations[0].short_edge_length)
    if "bccd" in str(cfg.dataloader.test.dataset.names):
        return short, short * 4 // 3
    return short, _DIVISOR * ceil(short * 3 / 2 / _DIVISOR)


def _have_shapes_alone(model: nn.Module) -> None:
    """Inside of a fake mode: put shapes of the CPU in the place of those of no device."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty_like(parameter, device="cpu")
                module._parameters[name] = nn.Parameter(fake, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
