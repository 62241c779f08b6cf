# SPDX-License-Identifier: Apache-2.0
"""Converted weights predict what the authors' order of computation gives with the originals.

That order is written down here from their names and conventions: y before x, nine points by the
taps of a 3x3 kernel whose window is taken off again, boxes in cells, a class that no object has.
Nothing of the package is used for it.
"""

from collections.abc import Mapping
from typing import Any

import official_salt as official
import pytest
import torch
import torch.nn.functional as F
from official_salt import HEAD, TINY, TINY_GFLV2, TINY_R2, TINYX
from torch import Tensor
from torchvision.ops import deform_conv2d

from d2_decouple.checkpoint.convert import CONVERTERS
from d2_decouple.modeling import product_score

State = Mapping[str, Tensor]
STRIDES = (8, 16, 32, 64, 128)
NETWORKS = {
    "salt": TINY,
    "salt, all deformable": TINYX,
    "salt, Res2Net": TINY_R2,
    "gflv2": TINY_GFLV2,
}


def batch_norm(state: State, name: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (
        state[f"{name}.{value}"].view(-1, 1, 1)
        for value in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) * weight / (var + 1e-5).sqrt() + bias


def group_norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"])


def conv(state: State, name: str, x: Tensor, **options: Any) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), padding=weight.shape[-1] // 2, **options)


def block(state: State, name: str, x: Tensor, stride: int) -> Tensor:
    """A bottleneck; the stride is in the second convolution."""
    shortcut = x
    if f"{name}.downsample.0.weight" in state:
        shortcut = conv(state, f"{name}.downsample.0", x, stride=stride)
        shortcut = batch_norm(state, f"{name}.downsample.1", shortcut)
    x = batch_norm(state, f"{name}.bn1", conv(state, f"{name}.conv1", x)).relu()
    if f"{name}.conv2.conv_offset.weight" in state:
        offset = conv(state, f"{name}.conv2.conv_offset", x, stride=stride)
        x = deform_conv2d(x, offset, state[f"{name}.conv2.weight"], stride=stride, padding=1)
    else:
        x = conv(state, f"{name}.conv2", x, stride=stride)
    x = batch_norm(state, f"{name}.bn2", x).relu()
    return (batch_norm(state, f"{name}.bn3", conv(state, f"{name}.conv3", x)) + shortcut).relu()


def res2net_block(state: State, name: str, x: Tensor, stride: int) -> Tensor:
    """A bottleneck whose 3x3 convolution is three in a row, and a group that passes."""
    shortcut, first = x, f"{name}.downsample.1.weight" in state
    if first:
        shortcut = conv(state, f"{name}.downsample.1", F.avg_pool2d(x, stride) if stride > 1 else x)
        shortcut = batch_norm(state, f"{name}.downsample.2", shortcut)
    groups = batch_norm(state, f"{name}.bn1", conv(state, f"{name}.conv1", x)).relu().chunk(4, 1)
    outputs: list[Tensor] = []
    for index, x in enumerate(groups[:3]):
        x = x + outputs[-1] if outputs and not first else x
        if f"{name}.convs.{index}.conv_offset.weight" in state:
            offset = conv(state, f"{name}.convs.{index}.conv_offset", x, stride=stride)
            weight = state[f"{name}.convs.{index}.weight"]
            x = deform_conv2d(x, offset, weight, stride=stride, padding=1)
        else:
            x = conv(state, f"{name}.convs.{index}", x, stride=stride)
        outputs.append(batch_norm(state, f"{name}.bns.{index}", x).relu())
    last = F.avg_pool2d(groups[3], 3, 2, 1) if stride > 1 else groups[3]
    x = conv(state, f"{name}.conv3", torch.cat((*outputs, last), 1))
    return (batch_norm(state, f"{name}.bn3", x) + shortcut).relu()


def stem(state: State, image: Tensor) -> Tensor:
    if "backbone.conv1.weight" in state:
        return batch_norm(state, "backbone.bn1", conv(state, "backbone.conv1", image, stride=2))
    for index, stride in ((0, 2), (3, 1), (6, 1)):
        image = conv(state, f"backbone.stem.{index}", image, stride=stride)
        image = batch_norm(state, f"backbone.stem.{index + 1}", image).relu()
    return image


def pyramid(state: State, image: Tensor) -> list[Tensor]:
    """P3 to P7 of a normalised (1, 3, H, W) image."""

    def layer(name: str, x: Tensor, **options: Any) -> Tensor:
        x = conv(state, f"neck.{name}.conv", x, **options)
        return group_norm(state, f"neck.{name}.gn", x) if f"neck.{name}.gn.bias" in state else x

    x = F.max_pool2d(stem(state, image).relu(), 3, 2, 1)
    run = res2net_block if "backbone.layer1.0.convs.0.weight" in state else block
    stages = []
    for stage, count in enumerate(TINY.blocks, 1):
        for index in range(count):
            stride = 2 if stage > 1 and index == 0 else 1
            x = run(state, f"backbone.layer{stage}.{index}", x, stride)
        stages.append(x)
    laterals = [layer(f"lateral_convs.{i}", x) for i, x in enumerate(stages[1:])]
    for i in (1, 0):
        above = laterals[i + 1].repeat_interleave(2, -1).repeat_interleave(2, -2)
        laterals[i] = laterals[i] + above
    maps = [layer(f"fpn_convs.{i}", x) for i, x in enumerate(laterals)]
    for i in (3, 4):
        maps.append(layer(f"fpn_convs.{i}", maps[-1], stride=2))
    return maps


def tower(state: State, name: str, x: Tensor, convs: int) -> Tensor:
    for index in range(convs):
        at = f"{HEAD}{name}.{index}"
        if f"{at}.conv.conv_offset.weight" in state:
            found = conv(state, f"{at}.conv.conv_offset", x)
            offset, mask = found[:, :18], found[:, 18:].sigmoid()
            x = deform_conv2d(x, offset, state[f"{at}.conv.weight"], padding=1, mask=mask)
        else:
            x = conv(state, f"{at}.conv", x)
        x = group_norm(state, f"{at}.gn", x).relu()
    return x


def box_points(sides: Tensor, s: Tensor) -> Tensor:
    """(N, 18, H, W) of coarse sides (l, t, r, b) and fractions, by the sheet's table."""
    left, top, right, bottom = (x[:, None] for x in sides.unbind(1))
    w, h = left + right, top + bottom

    def y(index: int) -> Tensor:
        return h * s[:, index : index + 1] - top

    def x(index: int) -> Tensor:
        return w * s[:, index : index + 1] - left

    points = [
        *(y(4), x(5), -top, x(1), y(6), x(7)),
        *(y(0), -left, y(8), x(9), y(2), right),
        *(y(10), x(11), bottom, x(3), y(12), x(13)),
    ]
    return torch.cat(points, 1)


def aligned(state: State, name: str, x: Tensor, points: Tensor) -> Tensor:
    window = [value for tap in range(9) for value in (tap // 3 - 1, tap % 3 - 1)]
    offset = points - torch.tensor(window, dtype=x.dtype).view(1, 18, 1, 1)
    x = deform_conv2d(x, offset, state[f"{HEAD}{name}.conv.weight"], padding=1)
    return group_norm(state, f"{HEAD}{name}.bn", x).relu()


def salt(state: State, level: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the classes and of the distributions of a level."""
    cls = tower(state, "cls_convs", x, 3) + x
    reg = tower(state, "reg_convs", x, 3)
    init = f"{HEAD}reg_init_out"
    f = group_norm(state, f"{init}.bn", conv(state, f"{init}.conv", reg)).relu()
    scale = state[f"{HEAD}scales_init.{level}.scale"]
    d = scale * conv(state, f"{init}.regression", f).relu()
    points = box_points(d, conv(state, f"{init}.scale_fs", f).sigmoid())
    z = conv(state, f"{HEAD}salt_reg", aligned(state, "salt_reg_conv", reg, points))
    refinement = f"{HEAD}salt_cls_refinement"
    moved = group_norm(state, f"{refinement}.bn", conv(state, f"{refinement}.conv", cls)).relu()
    points = conv(state, f"{refinement}.proposal", moved).exp() * points
    logits = conv(state, f"{HEAD}salt_cls", aligned(state, "salt_cls_conv", cls, points))
    return logits, z


def gflv2(state: State, level: int, x: Tensor) -> tuple[Tensor, Tensor]:
    cls, reg = (tower(state, name, x, 4) for name in ("cls_convs", "reg_convs"))
    return conv(state, f"{HEAD}gfl_cls", cls), conv(state, f"{HEAD}gfl_reg", reg)


HEADS = {"salt": salt, "gflv2": gflv2}


def detected(state: State, method: str, level: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (R, K + 1) and boxes (R, 4) in cells of a level."""
    logits, z = HEADS[method](state, level, x)
    z = state[f"{HEAD}scales.{level}.scale"] * z
    height, width = z.shape[-2:]
    shares = z.reshape(4, 17, height, width).softmax(1)
    best = shares.sort(1, descending=True).values[:, :4]
    statistics = torch.cat((best, best.mean(1, keepdim=True)), 1).reshape(1, 20, height, width)
    hidden = conv(state, f"{HEAD}reg_conf.0", statistics).relu()
    quality = conv(state, f"{HEAD}reg_conf.2", hidden).sigmoid()
    left, top, right, bottom = (shares * state[official.BINS].view(1, 17, 1, 1)).sum(1)
    i, j = torch.meshgrid(
        torch.arange(height, dtype=z.dtype), torch.arange(width, dtype=z.dtype), indexing="ij"
    )
    boxes = torch.stack((j - left, i - top, j + right, i + bottom))
    return (logits.sigmoid() * quality)[0].flatten(1).t(), boxes.flatten(1).t()


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_predictions_are_those_of_the_original_order(name: str) -> None:
    """In float64, where another order of summation cannot hide an error."""
    network = NETWORKS[name]
    theirs = official.drawn(network)
    model = official.detector(network)
    model.load_state_dict(CONVERTERS[network.method](theirs).tensors)
    model = model.double().eval()
    image = torch.randint(256, (3, 128, 192), dtype=torch.uint8)
    predictions = model.predict([{"image": image}])[2]

    theirs = {name: value.double() for name, value in theirs.items()}
    # Rounded to float32, as a detector keeps them.
    mean, std = (
        torch.tensor(value).double().view(-1, 1, 1)
        for value in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    )
    maps = pyramid(theirs, ((image - mean) / std)[None])
    found = [detected(theirs, network.method, level, x) for level, x in enumerate(maps)]
    scores = torch.cat([score for score, _ in found])
    boxes = torch.cat([box * stride for (_, box), stride in zip(found, STRIDES, strict=True)])
    assert boxes.shape == (16 * 24 + 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2, 4)
    assert scores[:, :3].std() > 0.05
    assert boxes.std(0).min() > 10
    assert (scores[:, 3:] > scores[:, :3]).all()  # the class that is left out
    torch.testing.assert_close(product_score(predictions)[0], scores[:, :3], rtol=0, atol=1e-9)
    torch.testing.assert_close(predictions.boxes[0], boxes, rtol=0, atol=1e-6)
