# SPDX-License-Identifier: Apache-2.0
"""The state dict of the authors' Decoupled R-CNN, made up by the rules of its names and shapes."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import official_pdnet
import torch
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import ResNet
from torch import Tensor

from d2_decouple.config import configs_root, get_config
from d2_decouple.layers.deform import resnext_block
from d2_decouple.modeling import ConvBoxBranch, ConvHead, SharedBoxBranch

HEAD = "roi_head.bbox_head."
STATISTICS = ("weight", "bias", "running_mean", "running_var")
COUNTER = "num_batches_tracked"

Named = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class Network(official_pdnet.Network):
    """What differs between the authors' models."""

    stages: int = 3
    numbered: bool = True  # names of the head have the stage's number
    head: str = "fc"  # or "shared", "double"
    hidden: int = 1024
    wide: int = 1024  # channels of the double head


R50 = Network()
R101 = Network(blocks=(3, 4, 23, 3))
X101_32 = Network(blocks=(3, 4, 23, 3), middle=128, groups=32)
X101_64 = Network(blocks=(3, 4, 23, 3), middle=256, groups=64)
TINY = Network(stem=8, middle=4, outputs=16, channels=8, classes=3, hidden=16, wide=16)
TINY_SINGLE = replace(TINY, stages=1, numbered=False)
TINY_SHARED = replace(TINY_SINGLE, head="shared")
TINY_DOUBLE = replace(TINY, head="double")


def shapes(network: Network) -> dict[str, tuple[int, ...]]:
    """Every entry by name."""
    parts = (_backbone(network), _pyramid(network), _heads(network))
    return {name: shape for part in parts for name, shape in part}


def _norm(name: str, width: int) -> Named:
    for value in STATISTICS:
        yield f"{name}.{value}", (width,)
    yield f"{name}.{COUNTER}", ()


def _layer(name: str, *shape: int) -> Named:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _backbone(network: Network) -> Named:
    yield "backbone.conv1.weight", (network.stem, 3, 7, 7)
    yield from _norm("backbone.bn1", network.stem)
    before = network.stem
    for stage in range(4):
        inner, after = network.middle << stage, network.outputs << stage
        for block in range(network.blocks[stage]):
            name = f"backbone.layer{stage + 1}.{block}"
            yield f"{name}.conv1.weight", (inner, before, 1, 1)
            yield from _norm(f"{name}.bn1", inner)
            yield f"{name}.conv2.weight", (inner, inner // network.groups, 3, 3)
            yield from _norm(f"{name}.bn2", inner)
            yield f"{name}.conv3.weight", (after, inner, 1, 1)
            yield from _norm(f"{name}.bn3", after)
            if not block:
                yield f"{name}.downsample.0.weight", (after, before, 1, 1)
                yield from _norm(f"{name}.downsample.1", after)
            before = after


def _pyramid(network: Network) -> Named:
    c = network.channels
    for level in range(4):
        yield from _layer(f"neck.lateral_convs.{level}.conv", c, network.outputs << level, 1, 1)
        yield from _layer(f"neck.fpn_convs.{level}.conv", c, c, 3, 3)
    yield from _layer("rpn_head.rpn_conv", c, c, 3, 3)
    yield from _layer("rpn_head.rpn_cls", 3, c, 1, 1)
    yield from _layer("rpn_head.rpn_reg", 12, c, 1, 1)


def _heads(network: Network) -> Named:
    hidden, classes = network.hidden, network.classes
    for stage in range(network.stages):
        name = HEAD + (f"{stage}." if network.numbered else "")
        if stage == 0:
            trunk = {"fc": "cls_fcs", "shared": "shared_fcs", "double": "fc_branch"}
            yield from _trunk(name + trunk[network.head], network)
            yield from _layer(f"{name}fc_cls", classes + 1, hidden)
        if network.head == "fc" or (network.head == "shared" and stage):
            yield from _trunk(f"{name}reg_fcs", network)
        if network.head == "double":
            yield from _convolutions(name, network)
        width = network.wide if network.head == "double" else hidden
        yield from _layer(f"{name}fc_reg", 4 if stage else 4 * classes, width)


def _trunk(name: str, network: Network) -> Named:
    yield from _layer(f"{name}.0", network.hidden, 49 * network.channels)
    yield from _layer(f"{name}.1", network.hidden, network.hidden)


def _convolutions(name: str, network: Network) -> Named:
    c, wide, inner = network.channels, network.wide, network.wide // 4
    convs = {
        "res_block.conv1.{}": (c, c, 3, 3),
        "res_block.conv2.{}": (wide, c, 1, 1),
        "res_block.conv_identity.{}": (wide, c, 1, 1),
    }
    for block in range(4):
        convs[f"conv_branch.{block}.{{}}1"] = (inner, wide, 1, 1)
        convs[f"conv_branch.{block}.{{}}2"] = (inner, inner, 3, 3)
        convs[f"conv_branch.{block}.{{}}3"] = (wide, inner, 1, 1)
    for conv, shape in convs.items():
        yield f"{name}{conv.format('conv')}.weight", shape
        yield from _norm(f"{name}{conv.format('bn')}", shape[0])


def numbered(network: Network) -> dict[str, Tensor]:
    """Each tensor filled with its place in the file; one number is stored, whatever the shape."""
    return {
        name: torch.tensor(place if name.endswith(COUNTER) else float(place)).expand(shape)
        for place, (name, shape) in enumerate(shapes(network).items())
    }


def drawn(network: Network, seed: int = 0) -> dict[str, Tensor]:
    """Values with which a network sees something and finds objects of all classes."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for place, (name, shape) in enumerate(shapes(network).items()):
        values = torch.randn(shape, generator=generator)
        if name.endswith(COUNTER):
            state[name] = torch.tensor(place)
        elif len(shape) > 1:
            state[name] = values / values[0].numel() ** 0.5
        elif name.endswith(("running_var", ".weight")):
            state[name] = 1 + 0.1 * values.abs()
        else:
            state[name] = 0.1 * values
    return state


def training_file(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """What the authors' trainer saves; with ``module.``, what some scripts around it did."""
    named = OrderedDict((prefix + name, value) for name, value in state.items())
    named._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return {
        "meta": {
            "mmcv_version": "1.1.2",
            "mmdet_version": "2.4.0+7fee5be",
            "time": "Wed Sep  1 12:00:00 2021",
            "config": "model = dict(type='FasterRCNN')\n",
            "CLASSES": ("person", "bicycle"),
            "epoch": 24,
            "iter": 351768,
        },
        "state_dict": named,
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(1)}}, "param_groups": []},
    }


def save(content: Any, path: Path) -> str:
    """Write a file; returns its name."""
    torch.save(content, path)
    return str(path)


def narrow_resnet(**network: Any) -> ResNet:
    """Detectron2's ResNet for such a file, the strides in its 3x3 convolutions."""
    resnet = official_pdnet.narrow_resnet(Network(**network))
    for stage in resnet.stages[1:]:
        stage[0].conv1.stride, stage[0].conv2.stride = (1, 1), (2, 2)
    return resnet


def model_of(network: Network) -> Any:
    """Our model in the recipe's form, with the parts and widths that the file has."""
    model = get_config(configs_root() / "common" / "models" / "decoupled_rcnn.py").model
    model.backbone.out_channels = network.channels
    if network.stem == R50.stem:
        stages = model.backbone.bottom_up.stages
        stages.depth = {R50.blocks: 50, R101.blocks: 101}[network.blocks]
        if network.groups > 1:
            width = network.middle // network.groups
            stages.update(
                block_class=resnext_block, num_groups=network.groups, width_per_group=width
            )
    else:
        model.backbone.bottom_up = L(narrow_resnet)(**asdict(network))
    heads = model.roi_heads
    heads.num_classes = network.classes
    heads.class_branch.head.fc_dims = [network.hidden] * 2
    first, *later = heads.box_branches
    branches = [first, *(later[-1:] * (network.stages - 1))]
    heads.box_branches = [_branch(x, network, stage) for stage, x in enumerate(branches)]
    heads.stage_loss_weights = [1.0] * network.stages
    return model


def _branch(branch: Any, network: Network, stage: int) -> Any:
    arguments = {"transform": branch.transform, "num_classes": None if stage else network.classes}
    if network.head == "double":
        head = L(ConvHead)(in_channels=network.channels, out_channels=network.wide)
        return L(ConvBoxBranch)(head=head, **arguments)
    if network.head == "shared" and stage == 0:
        return L(SharedBoxBranch)(in_features=network.hidden, **arguments)
    branch.head.fc_dims = [network.hidden] * 2
    return branch
