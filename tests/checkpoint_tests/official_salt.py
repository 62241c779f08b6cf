# SPDX-License-Identifier: Apache-2.0
"""The state dicts of the authors' SALT-Net and GFLv2, made up: every name and shape."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor
from util import tiny

from d2_decouple.config import get_config
from d2_decouple.layers.deform import DeformBottleneckBlock
from d2_decouple.layers.deform_tower import deform_last_tower
from d2_decouple.layers.res2net import DeepStem, DeformRes2NetBlock, Res2NetBlock

HEAD = "bbox_head."
BINS = f"{HEAD}integral.project"
RECIPES = {"salt": "salt_R_50_FPN_1x", "gflv2": "gflv2_R_50_FPN_1x"}
Named = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class Network:
    """What differs between the authors' models."""

    method: str = "salt"
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    stem: int = 64
    middle: int = 64  # channels of the 3x3 convolutions in layer1
    groups: int = 1
    base_width: int = 0  # of a Res2Net, such as the 26 of 26w4s, or 0
    outputs: int = 256  # of layer1
    channels: int = 256  # of the pyramid
    classes: int = 80
    deformed: tuple[int, ...] = ()  # stages, counted from 1
    norms: bool = False  # in the pyramid
    deformed_towers: bool = False
    counters: bool = True  # of batches that norms have seen


SCALES = 4  # groups of channels in a Res2Net's blocks
R50 = Network()
X101 = Network(blocks=(3, 4, 23, 3), middle=128, groups=32, deformed=(3, 4))
X101X = Network(
    blocks=(3, 4, 23, 3),
    middle=128,
    groups=32,
    deformed=(2, 3, 4),
    norms=True,
    deformed_towers=True,
)
R2 = Network(blocks=(3, 4, 23, 3), base_width=26, deformed=(3, 4))
GFLV2 = Network(method="gflv2")
TINY = Network(stem=16, middle=8, outputs=32, channels=64, classes=3)
TINYX = Network(
    stem=16,
    middle=8,
    outputs=32,
    channels=64,
    classes=3,
    deformed=(2, 3, 4),
    norms=True,
    deformed_towers=True,
)
TINY_R2 = Network(
    stem=16, middle=8, base_width=32, outputs=32, channels=64, classes=3, deformed=(3, 4)
)
TINY_GFLV2 = Network(method="gflv2", stem=16, middle=8, outputs=32, channels=64, classes=3)


def shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """Every entry by name."""
    return {**dict(_backbone(network)), **dict(_neck(network)), **dict(_head(network))}


def _batch_norm(network: Network, name: str, width: int) -> Named:
    for value in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{value}", (width,)
    if network.counters:
        yield f"{name}.num_batches_tracked", ()


def _pair(name: str, *shape: int) -> Named:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _backbone(network: Network) -> Named:
    if network.base_width:
        yield from _res2net(network)
        return
    yield "backbone.conv1.weight", (network.stem, 3, 7, 7)
    yield from _batch_norm(network, "backbone.bn1", network.stem)
    inputs = network.stem
    for index, count in enumerate(network.blocks):
        m, out = network.middle * 2**index, network.outputs * 2**index
        for block in range(count):
            name = f"backbone.layer{index + 1}.{block}"
            yield f"{name}.conv1.weight", (m, inputs, 1, 1)
            yield from _batch_norm(network, f"{name}.bn1", m)
            yield f"{name}.conv2.weight", (m, m // network.groups, 3, 3)
            if index + 1 in network.deformed:
                yield from _pair(f"{name}.conv2.conv_offset", 18, m, 3, 3)
            yield from _batch_norm(network, f"{name}.bn2", m)
            yield f"{name}.conv3.weight", (out, m, 1, 1)
            yield from _batch_norm(network, f"{name}.bn3", out)
            if block == 0:
                yield f"{name}.downsample.0.weight", (out, inputs, 1, 1)
                yield from _batch_norm(network, f"{name}.downsample.1", out)
            inputs = out


def _res2net(network: Network) -> Named:
    half, inputs = network.stem // 2, network.stem
    for conv, (before, after) in enumerate(((3, half), (half, half), (half, inputs))):
        yield f"backbone.stem.{3 * conv}.weight", (after, before, 3, 3)
        yield from _batch_norm(network, f"backbone.stem.{3 * conv + 1}", after)
    for index, count in enumerate(network.blocks):
        w = network.middle * 2**index * network.base_width // 64
        out = network.outputs * 2**index
        for block in range(count):
            name = f"backbone.layer{index + 1}.{block}"
            if block == 0:
                yield f"{name}.downsample.1.weight", (out, inputs, 1, 1)
                yield from _batch_norm(network, f"{name}.downsample.2", out)
            yield f"{name}.conv1.weight", (SCALES * w, inputs, 1, 1)
            yield from _batch_norm(network, f"{name}.bn1", SCALES * w)
            for group in range(SCALES - 1):
                yield f"{name}.convs.{group}.weight", (w, w, 3, 3)
                if index + 1 in network.deformed:
                    yield from _pair(f"{name}.convs.{group}.conv_offset", 18, w, 3, 3)
                yield from _batch_norm(network, f"{name}.bns.{group}", w)
            yield f"{name}.conv3.weight", (out, SCALES * w, 1, 1)
            yield from _batch_norm(network, f"{name}.bn3", out)
            inputs = out


def _neck(network: Network) -> Named:
    c = network.channels
    layers = {f"lateral_convs.{i}": (c, network.outputs * 2 ** (i + 1), 1, 1) for i in range(3)}
    layers |= {f"fpn_convs.{i}": (c, c, 3, 3) for i in range(5)}
    for name, shape in layers.items():
        if network.norms:
            yield f"neck.{name}.conv.weight", shape
            yield from _pair(f"neck.{name}.gn", c)
        else:
            yield from _pair(f"neck.{name}.conv", *shape)


def _head(network: Network) -> Named:
    c = network.channels
    last = {"salt": 2, "gflv2": 3}[network.method]
    for tower in ("cls_convs", "reg_convs"):
        for index in range(last + 1):
            name = f"{HEAD}{tower}.{index}"
            yield f"{name}.conv.weight", (c, c, 3, 3)
            if network.deformed_towers and index == last:
                yield from _pair(f"{name}.conv.conv_offset", 27, c, 3, 3)
            yield from _pair(f"{name}.gn", c)
    if network.method == "salt":
        yield from _pair(f"{HEAD}salt_cls_refinement.conv", c, c, 3, 3)
        yield from _pair(f"{HEAD}salt_cls_refinement.bn", c)
        yield from _pair(f"{HEAD}salt_cls_refinement.proposal", 18, c, 3, 3)
        yield f"{HEAD}salt_cls_conv.conv.weight", (c, c, 3, 3)
        yield from _pair(f"{HEAD}salt_cls_conv.bn", c)
        yield from _pair(f"{HEAD}salt_cls", network.classes + 1, c, 3, 3)
        yield from _pair(f"{HEAD}reg_init_out.conv", c, c, 3, 3)
        yield from _pair(f"{HEAD}reg_init_out.bn", c)
        yield from _pair(f"{HEAD}reg_init_out.regression", 4, c, 3, 3)
        yield from _pair(f"{HEAD}reg_init_out.scale_fs", 14, c, 3, 3)
        yield f"{HEAD}salt_reg_conv.conv.weight", (c, c, 3, 3)
        yield from _pair(f"{HEAD}salt_reg_conv.bn", c)
        yield from _pair(f"{HEAD}salt_reg", 68, c, 3, 3)
        for level in range(5):
            yield f"{HEAD}scales_init.{level}.scale", ()
    else:
        yield from _pair(f"{HEAD}gfl_cls", network.classes + 1, c, 3, 3)
        yield from _pair(f"{HEAD}gfl_reg", 68, c, 3, 3)
    for level in range(5):
        yield f"{HEAD}scales.{level}.scale", ()
    yield from _pair(f"{HEAD}reg_conf.0", 64, 20, 1, 1)
    yield from _pair(f"{HEAD}reg_conf.2", 1, 64, 1, 1)
    yield BINS, (17,)


def numbered(network: Network) -> dict[str, Tensor]:
    """Each tensor filled with its place in the file; one number is stored, whatever the shape."""
    state = {
        name: torch.tensor(place if name.endswith("_tracked") else float(place)).expand(shape)
        for place, (name, shape) in enumerate(shapes(network).items())
    }
    return {**state, BINS: torch.arange(17.0)}


def drawn(network: Network, seed: int = 0) -> dict[str, Tensor]:
    """Values with which a network sees something, moves its points and finds objects.

    The authors' last class is the most probable one everywhere if it is taken for an object's.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(network).items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("_tracked"):
            state[name] = torch.randint(10**6, (), generator=generator)
        elif len(shape) > 1:
            state[name] = values / values[0].numel() ** 0.5
        elif name.endswith(("running_var", ".weight", ".scale")):
            state[name] = 1 + 0.1 * values.abs()
        else:
            state[name] = 0.1 * values
    for name, value in state.items():
        if "conv_offset" in name or name.endswith("proposal.weight"):
            state[name] = 0.3 * value
        if name.endswith("regression.bias"):
            state[name] = 1.5 + value
        if name.endswith(("salt_cls.bias", "gfl_cls.bias")):
            state[name][-1] = 5.0
    return {**state, BINS: torch.arange(17.0)}


def training_file(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the authors' trainer saves."""
    return {
        "meta": {"mmdet_version": "2.6.0", "epoch": 24, "iter": 175896, "CLASSES": ("cat", "dog")},
        "state_dict": dict(state),
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(1)}}, "param_groups": []},
    }


def narrow_resnet(network: Network = TINY) -> ResNet:
    """Detectron2's ResNet for such a file."""
    inputs, stages = network.stem, []
    for index, count in enumerate(network.blocks):
        outputs, deformed = network.outputs * 2**index, index + 1 in network.deformed
        options: dict[str, Any] = {"num_groups": network.groups, "stride_in_1x1": False}
        block: Any = DeformBottleneckBlock if deformed else BottleneckBlock
        if network.base_width:
            options = {"base_width": network.base_width}
            block = DeformRes2NetBlock if deformed else Res2NetBlock
        stages.append(
            ResNet.make_stage(
                block,
                num_blocks=count,
                stride_per_block=[1 + (index > 0), *([1] * (count - 1))],
                in_channels=inputs,
                out_channels=outputs,
                bottleneck_channels=network.middle * 2**index,
                norm="FrozenBN",
                **options,
            )
        )
        inputs = outputs
    make_stem = DeepStem if network.base_width else BasicStem
    stem = make_stem(in_channels=3, out_channels=network.stem, norm="FrozenBN")
    return ResNet(stem, stages, out_features=["res2", "res3", "res4", "res5"], freeze_at=2)


def detector(network: Network) -> Any:
    """Our model for such a file."""
    convs = 3 if network.method == "salt" else 4
    cfg = tiny(get_config(RECIPES[network.method]), convs=convs)
    cfg.model.backbone.bottom_up = L(narrow_resnet)(network=network)
    if network.norms:
        cfg.model.backbone.norm = "GN"
        cfg.model.backbone.top_block.norm = "GN"
    if network.deformed_towers:
        cfg.model.head.tower = deform_last_tower
    return instantiate(cfg.model)
