# SPDX-License-Identifier: Apache-2.0
"""Converted weights predict what the authors' order of computation gives with the originals.

That order is written down here from their names. Nothing of the package is used for it.
"""

from collections.abc import Mapping
from typing import Any

import official_decoupled_rcnn as official
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import instantiate
from official_decoupled_rcnn import HEAD, TINY, TINY_DOUBLE, TINY_SHARED, TINY_SINGLE, Network
from torch import Tensor

from d2_decouple.checkpoint.convert_decoupled_rcnn import convert_decoupled_rcnn

State = Mapping[str, Tensor]


def norm(state: State, name: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (
        state[f"{name}.{value}"].view(-1, 1, 1)
        for value in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) * weight / (var + 1e-5).sqrt() + bias


def conv_norm(state: State, conv: str, bn: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = state[f"{conv}.weight"]
    return norm(state, bn, F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2))


def conv(state: State, name: str, x: Tensor) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)


def block(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """A bottleneck; the stride is in the second convolution."""
    shortcut, down = x, f"{name}.downsample"
    if f"{down}.0.weight" in state:
        shortcut = conv_norm(state, f"{down}.0", f"{down}.1", x, stride)
    x = conv_norm(state, f"{name}.conv1", f"{name}.bn1", x).relu()
    x = conv_norm(state, f"{name}.conv2", f"{name}.bn2", x, stride).relu()
    return (conv_norm(state, f"{name}.conv3", f"{name}.bn3", x) + shortcut).relu()


def pyramid(state: State, image: Tensor) -> list[Tensor]:
    """P2 to P6 of a normalised (1, 3, H, W) image."""
    x = conv_norm(state, "backbone.conv1", "backbone.bn1", image, 2).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    inner = []
    for stage, count in enumerate(TINY.blocks):
        for index in range(count):
            stride = 2 if stage and not index else 1
            x = block(state, f"backbone.layer{stage + 1}.{index}", x, stride)
        inner.append(conv(state, f"neck.lateral_convs.{stage}.conv", x))
    for level in (2, 1, 0):
        above = inner[level + 1].repeat_interleave(2, -1).repeat_interleave(2, -2)
        inner[level] = inner[level] + above
    maps = [conv(state, f"neck.fpn_convs.{level}.conv", x) for level, x in enumerate(inner)]
    return [*maps, maps[-1][..., ::2, ::2]]


def layer(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].t() + state[f"{name}.bias"]


def layers(state: State, name: str, pooled: Tensor) -> Tensor:
    x = layer(state, f"{name}.0", pooled.flatten(1)).relu()
    return layer(state, f"{name}.1", x).relu()


def convolutions(state: State, name: str, x: Tensor) -> Tensor:
    """The box branch of a double head, up to its last layer."""
    first, second, identity = (
        f"{name}res_block.{part}" for part in ("conv1", "conv2", "conv_identity")
    )
    shortcut = conv_norm(state, f"{identity}.conv", f"{identity}.bn", x)
    x = conv_norm(state, f"{first}.conv", f"{first}.bn", x).relu()
    x = (conv_norm(state, f"{second}.conv", f"{second}.bn", x) + shortcut).relu()
    for index in range(4):
        x = block(state, f"{name}conv_branch.{index}", x)
    return x.mean((2, 3))


def heads(state: State, network: Network, pooled: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the changes of each stage, of the same pooled features."""
    names = [f"{HEAD}{stage}." if network.numbered else HEAD for stage in range(network.stages)]
    trunk = {"fc": "cls_fcs", "shared": "shared_fcs", "double": "fc_branch"}[network.head]
    hidden = layers(state, names[0] + trunk, pooled)
    changes = []
    for name in names:
        x = hidden
        if network.head == "double":
            x = convolutions(state, name, pooled)
        elif f"{name}reg_fcs.0.weight" in state:
            x = layers(state, f"{name}reg_fcs", pooled)
        changes.append(layer(state, f"{name}fc_reg", x))
    return layer(state, f"{names[0]}fc_cls", hidden), changes


def close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def loaded(network: Network) -> tuple[Any, State]:
    """Our model with the converted weights, and the originals, in float64."""
    state = official.drawn(network)
    model = instantiate(official.model_of(network))
    model.load_state_dict(convert_decoupled_rcnn(state).tensors)
    return model.double().eval(), {name: value.double() for name, value in state.items()}


@torch.no_grad()
def test_maps_and_proposals() -> None:
    """In float64, where another order of summation cannot hide an error."""
    model, state = loaded(TINY)
    image = torch.randn(1, 3, 64, 96).double()
    theirs = pyramid(state, image)
    ours = model.backbone(image)
    assert list(ours) == ["p2", "p3", "p4", "p5", "p6"]
    for feature, wanted in zip(ours.values(), theirs, strict=True):
        close(feature, wanted)
    found = model.proposal_generator.rpn_head(list(ours.values()))
    for logits, deltas, feature in zip(*found, theirs, strict=True):
        x = conv(state, "rpn_head.rpn_conv", feature).relu()
        close(logits, conv(state, "rpn_head.rpn_cls", x))
        close(deltas, conv(state, "rpn_head.rpn_reg", x))


@torch.no_grad()
@pytest.mark.parametrize("network", [TINY, TINY_SINGLE, TINY_SHARED, TINY_DOUBLE])
def test_logits_and_changes(network: Network) -> None:
    model, state = loaded(network)
    pooled = torch.randn(5, network.channels, 7, 7).double()
    logits, changes = heads(state, network, pooled)
    ours, hidden = model.roi_heads.class_branch(pooled)
    close(ours, logits)
    for branch, wanted in zip(model.roi_heads.box_branches, changes, strict=True):
        close(branch(pooled, hidden), wanted)
