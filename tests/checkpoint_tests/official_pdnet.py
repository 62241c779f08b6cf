# SPDX-License-Identifier: Apache-2.0
"""The state dict of the authors' PDNet, made up: every name and shape, values that cost nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor

HEAD = "rpn.head."
PRED = f"{HEAD}pred_head."
BOUND, SEMANTIC = f"{PRED}box_to_bound_pt", f"{PRED}box_to_semantic_pt"
# Rows: the y or x of a point; columns: what it takes of top, left, bottom, right.
TOP, LEFT, BOTTOM, RIGHT = [1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]
Y, X = [0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5]
CONSTANTS = {
    BOUND: [TOP, X, Y, LEFT, BOTTOM, X, Y, RIGHT],
    SEMANTIC: [
        *(TOP, LEFT, TOP, X, TOP, RIGHT),
        *(Y, LEFT, Y, X, Y, RIGHT),
        *(BOTTOM, LEFT, BOTTOM, X, BOTTOM, RIGHT),
    ],
}


@dataclass(frozen=True, kw_only=True)
class Network:
    """What differs between the authors' models."""

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    stem: int = 64
    middle: int = 64  # channels of the 3x3 convolutions in layer1
    groups: int = 1
    outputs: int = 256  # of layer1
    channels: int = 256  # of the pyramid
    classes: int = 80
    offsets: int = 0  # channels of the offsets in layer2 to layer4, or 0 for plain blocks


R50 = Network()
R101 = Network(blocks=(3, 4, 23, 3))
X101 = Network(blocks=(3, 4, 23, 3), middle=256, groups=64)
TINY = Network(stem=16, middle=8, outputs=32, channels=64, classes=3)


def shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """Every entry by name."""
    return {**dict(_backbone(network)), **dict(_head(network))}


def _norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for value in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{value}", (width,)


def _backbone(network: Network) -> Iterator[tuple[str, tuple[int, ...]]]:
    body, c = "backbone.body", network.channels
    yield f"{body}.stem.conv1.weight", (network.stem, 3, 7, 7)
    yield from _norm(f"{body}.stem.bn1", network.stem)
    inputs = network.stem
    for index, count in enumerate(network.blocks):
        m, out = network.middle * 2**index, network.outputs * 2**index
        for block in range(count):
            name = f"{body}.layer{index + 1}.{block}"
            yield f"{name}.conv1.weight", (m, inputs, 1, 1)
            if network.offsets and index:
                yield f"{name}.conv2.offset.weight", (network.offsets, m, 3, 3)
                yield f"{name}.conv2.offset.bias", (network.offsets,)
                yield f"{name}.conv2.conv.weight", (m, m // network.groups, 3, 3)
            else:
                yield f"{name}.conv2.weight", (m, m // network.groups, 3, 3)
            yield f"{name}.conv3.weight", (out, m, 1, 1)
            for conv, width in ((1, m), (2, m), (3, out)):
                yield from _norm(f"{name}.bn{conv}", width)
            if block == 0:
                yield f"{name}.downsample.0.weight", (out, inputs, 1, 1)
                yield from _norm(f"{name}.downsample.1", out)
            inputs = out
    for index in (2, 3, 4):
        shape = (c, network.outputs * 2 ** (index - 1), 1, 1)
        yield f"backbone.fpn.fpn_inner{index}.weight", shape
        yield f"backbone.fpn.fpn_inner{index}.bias", (c,)
        yield f"backbone.fpn.fpn_layer{index}.weight", (c, c, 3, 3)
        yield f"backbone.fpn.fpn_layer{index}.bias", (c,)
    for level, width in (("p6", inputs), ("p7", c)):
        yield f"backbone.fpn.top_blocks.{level}.weight", (c, width, 3, 3)
        yield f"backbone.fpn.top_blocks.{level}.bias", (c,)


def _head(network: Network) -> Iterator[tuple[str, tuple[int, ...]]]:
    c, k = network.channels, network.classes
    for tower in ("reg_conv_tower", "cls_conv_tower"):
        for index in (0, 3, 6, 9):
            yield f"{HEAD}{tower}.{index}.weight", (c, c, 3, 3)
            yield f"{HEAD}{tower}.{index + 1}.weight", (c,)
            yield f"{HEAD}{tower}.{index + 1}.bias", (c,)
    yield f"{PRED}dyn_pt_pred.weight", (34, c, 3, 3)
    yield f"{PRED}dyn_pt_pred.bias", (34,)
    yield f"{PRED}reg_map_pred.weight", (4, c, 1, 1)
    yield f"{PRED}cls_map_pred.weight", (9 * k, c, 1, 1)
    yield f"{PRED}cls_pred_collect.bias", (k,)
    yield BOUND, (8, 4, 1, 1)
    yield SEMANTIC, (18, 4, 1, 1)


def numbered(network: Network) -> dict[str, Tensor]:
    """Each tensor filled with its place in the file; one number is stored, whatever the shape."""
    state = {
        name: torch.tensor(float(place)).expand(shape)
        for place, (name, shape) in enumerate(shapes(network).items())
    }
    return {**state, **constants()}


def drawn(network: Network, seed: int = 0) -> dict[str, Tensor]:
    """Values with which a network sees something and finds objects of all classes."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(network).items():
        values = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            state[name] = values / values[0].numel() ** 0.5
        elif name.endswith(("running_var", ".weight")):
            state[name] = 1 + 0.1 * values.abs()
        else:
            state[name] = 0.1 * values
    return {**state, **constants()}


def constants() -> dict[str, Tensor]:
    return {name: torch.tensor(rows)[..., None, None] for name, rows in CONSTANTS.items()}


def training_file(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the authors' trainer saves, from several GPUs."""
    return {
        "model": {f"module.{name}": value for name, value in state.items()},
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(1)}}, "param_groups": []},
        "scheduler": {"milestones": (120000, 160000), "last_epoch": 180000},
        "iteration": 180000,
    }


def narrow_resnet(network: Network = TINY) -> ResNet:
    """Detectron2's ResNet for such a file."""
    inputs, stages = network.stem, []
    for index, count in enumerate(network.blocks):
        outputs = network.outputs * 2**index
        stages.append(
            ResNet.make_stage(
                BottleneckBlock,
                num_blocks=count,
                stride_per_block=[1 + (index > 0), *([1] * (count - 1))],
                in_channels=inputs,
                out_channels=outputs,
                bottleneck_channels=network.middle * 2**index,
                num_groups=network.groups,
                norm="FrozenBN",
                stride_in_1x1=True,
            )
        )
        inputs = outputs
    stem = BasicStem(in_channels=3, out_channels=network.stem, norm="FrozenBN")
    return ResNet(stem, stages, out_features=["res2", "res3", "res4", "res5"], freeze_at=2)
