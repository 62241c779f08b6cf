# SPDX-License-Identifier: Apache-2.0
"""Res2Net as formulae over a state dict with its authors' names; nothing of the package."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKS = (2, 1, 3, 1)  # of the four stages
PLANES = 12  # a fourth of the first stage's outputs, which double from stage to stage
STEMS = {  # convolution and norm, three times
    "timm": (("conv1.0", "conv1.1"), ("conv1.3", "conv1.4"), ("conv1.6", "bn1")),
    "mmdetection": (("stem.0", "stem.1"), ("stem.3", "stem.4"), ("stem.6", "stem.7")),
}

State = dict[str, Tensor]


def width_of(stage: int) -> int:
    """Channels of a group: 26 of 64."""
    return PLANES * 2 ** (stage - 1) * 26 // 64


def layers(stem: str) -> Iterator[tuple[str, str, tuple[int, int, int]]]:
    """Convolution, its norm, and (outputs, inputs, size of the kernel)."""
    shapes = ((32, 3, 3), (32, 32, 3), (64, 32, 3))
    for (conv, norm), shape in zip(STEMS[stem], shapes, strict=True):
        yield conv, norm, shape
    inputs = 64
    for stage, blocks in enumerate(BLOCKS, 1):
        outputs, width = 2 * PLANES * 2**stage, width_of(stage)
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            yield f"{name}.conv1", f"{name}.bn1", (4 * width, inputs, 1)
            for part in range(3):
                yield f"{name}.convs.{part}", f"{name}.bns.{part}", (width, width, 3)
            yield f"{name}.conv3", f"{name}.bn3", (outputs, 4 * width, 1)
            if block == 0:
                yield f"{name}.downsample.1", f"{name}.downsample.2", (outputs, inputs, 1)
            inputs = outputs


def random_state(stem: str = "timm") -> State:
    """Weights that keep the values' size, and statistics that a wrong name would show."""
    state: State = {"fc.weight": torch.zeros(2, 5), "fc.bias": torch.zeros(2)}
    for conv, norm, (outputs, inputs, size) in layers(stem):
        fan = inputs * size * size
        state[f"{conv}.weight"] = torch.randn(outputs, inputs, size, size) * (2 / fan) ** 0.5
        state[f"{norm}.weight"] = 0.3 + 0.6 * torch.rand(outputs)
        state[f"{norm}.bias"] = 0.3 * torch.randn(outputs)
        state[f"{norm}.running_mean"] = 0.3 * torch.randn(outputs)
        state[f"{norm}.running_var"] = 0.5 + 1.5 * torch.rand(outputs)
        state[f"{norm}.num_batches_tracked"] = torch.tensor(3)
    return state


def features(state: State, x: Tensor, *, stem: str = "timm", averages: bool = True) -> list[Tensor]:
    """Maps of the four stages, of a normalised image (N, 3, H, W).

    ``averages`` says whether the first block of the first stage averages its last group, as
    Res2Net's authors and timm have it and mmdetection has not.
    """

    def layer(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        weight = state[f"{conv}.weight"]
        x = F.conv2d(x, weight, None, stride, padding=weight.shape[-1] // 2)
        mean, variance = (state[f"{norm}.running_{kind}"] for kind in ("mean", "var"))
        scale = state[f"{norm}.weight"] / (variance + 1e-5).sqrt()
        shift = state[f"{norm}.bias"] - mean * scale
        return x * scale[:, None, None] + shift[:, None, None]

    for index, (conv, norm) in enumerate(STEMS[stem]):
        x = layer(x, conv, norm, 2 if index == 0 else 1).relu()
    x = F.max_pool2d(x, 3, 2, padding=1)
    found = []
    for stage, blocks in enumerate(BLOCKS, 1):
        for block in range(blocks):
            first, stride = block == 0, 2 if block == 0 and stage > 1 else 1
            name, width = f"layer{stage}.{block}", width_of(stage)
            inner = layer(x, f"{name}.conv1", f"{name}.bn1").relu()
            one, two, three, last = (inner[:, i * width : (i + 1) * width] for i in range(4))
            one = layer(one, f"{name}.convs.0", f"{name}.bns.0", stride).relu()
            two = two if first else two + one
            two = layer(two, f"{name}.convs.1", f"{name}.bns.1", stride).relu()
            three = three if first else three + two
            three = layer(three, f"{name}.convs.2", f"{name}.bns.2", stride).relu()
            if stride == 2 or (first and averages):
                last = nine_cells(last, stride)
            inner = layer(torch.cat((one, two, three, last), 1), f"{name}.conv3", f"{name}.bn3")
            if first:
                x = layer(four_cells(x, stride), f"{name}.downsample.1", f"{name}.downsample.2")
            x = (inner + x).relu()
        found.append(x)
    return found


def nine_cells(x: Tensor, stride: int) -> Tensor:
    """Sums over 3x3 cells, by nine; beyond the map is 0."""
    ones = torch.ones(x.shape[1], 1, 3, 3, dtype=x.dtype) / 9
    return F.conv2d(x, ones, None, stride, padding=1, groups=x.shape[1])


def four_cells(x: Tensor, stride: int) -> Tensor:
    """Means of windows of stride x stride cells; at the end of those that there are."""
    if stride == 1:
        return x
    height, width = x.shape[-2:]
    padded = F.pad(x, (0, width % 2, 0, height % 2))
    counts = F.pad(torch.ones(height, width, dtype=x.dtype), (0, width % 2, 0, height % 2))
    pairs = [(row, column) for row in (0, 1) for column in (0, 1)]
    total = torch.stack([padded[..., row::2, column::2] for row, column in pairs]).sum(0)
    return total / torch.stack([counts[row::2, column::2] for row, column in pairs]).sum(0)
