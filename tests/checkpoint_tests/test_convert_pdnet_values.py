# SPDX-License-Identifier: Apache-2.0
"""Converted weights predict what the authors' order of computation gives with the originals.

That order is written down here from their names and conventions: y before x, sides top, left,
bottom, right, boxes in cells. Nothing of the package is used for it.
"""

from collections.abc import Mapping
from typing import Any

import official_pdnet as official
import torch
import torch.nn.functional as F
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from official_pdnet import HEAD, PRED, TINY
from torch import Tensor
from util import tiny

from d2_decouple.checkpoint.convert_pdnet import convert_pdnet
from d2_decouple.config import get_config

State = Mapping[str, Tensor]
STRIDES = (8, 16, 32, 64, 128)


def norm(state: State, name: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (
        state[f"{name}.{value}"].view(-1, 1, 1)
        for value in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) * weight / (var + 1e-5).sqrt() + bias


def block(state: State, name: str, x: Tensor, stride: int) -> Tensor:
    """A bottleneck; the stride is in the first convolution."""
    shortcut = x
    if f"{name}.downsample.0.weight" in state:
        shortcut = F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride)
        shortcut = norm(state, f"{name}.downsample.1", shortcut)
    x = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride)
    x = F.conv2d(norm(state, f"{name}.bn1", x).relu(), state[f"{name}.conv2.weight"], padding=1)
    x = F.conv2d(norm(state, f"{name}.bn2", x).relu(), state[f"{name}.conv3.weight"])
    return (norm(state, f"{name}.bn3", x) + shortcut).relu()


def pyramid(state: State, image: Tensor) -> list[Tensor]:
    """P3 to P7 of a (1, 3, H, W) image from which the mean was subtracted."""
    body, fpn = "backbone.body", "backbone.fpn"

    def conv(name: str, x: Tensor, **options: Any) -> Tensor:
        weight, bias = state[f"{fpn}.{name}.weight"], state[f"{fpn}.{name}.bias"]
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, **options)

    x = F.conv2d(image, state[f"{body}.stem.conv1.weight"], stride=2, padding=3)
    x = F.max_pool2d(norm(state, f"{body}.stem.bn1", x).relu(), 3, 2, 1)
    stages = []
    for stage, count in enumerate(TINY.blocks, 1):
        for index in range(count):
            stride = 2 if stage > 1 and index == 0 else 1
            x = block(state, f"{body}.layer{stage}.{index}", x, stride)
        stages.append(x)
    inner = conv("fpn_inner4", stages[3])
    maps = [conv("fpn_layer4", inner)]
    for stage in (3, 2):
        above = inner.repeat_interleave(2, -1).repeat_interleave(2, -2)
        inner = conv(f"fpn_inner{stage}", stages[stage - 1]) + above
        maps.insert(0, conv(f"fpn_layer{stage}", inner))
    p6 = conv("top_blocks.p6", stages[3], stride=2)
    return [*maps, p6, conv("top_blocks.p7", p6.relu(), stride=2)]


def tower(state: State, name: str, x: Tensor) -> Tensor:
    for index in (0, 3, 6, 9):
        x = F.conv2d(x, state[f"{HEAD}{name}.{index}.weight"], padding=1)
        affine = (state[f"{HEAD}{name}.{index + 1}.{value}"] for value in ("weight", "bias"))
        x = F.group_norm(x, 32, *affine).relu()
    return x


def read(plane: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Bilinear values of (C, H, W) maps at points (h, w) in cells; zero outside: (C, h, w)."""
    height, width = plane.shape[-2:]
    where = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)
    return F.grid_sample(plane[None], where[None], align_corners=False)[0]


def limited(slide: Tensor, side: Tensor) -> Tensor:
    most = 1.5 * side / 2
    return slide - ((slide - most).clamp(min=0) + (slide + most).clamp(max=0))


def head(state: State, features: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Of each level the final boxes (4, H, W) in cells, t, l, b, r, and the logits (K, H, W)."""
    box_maps = [tower(state, "reg_conv_tower", x) for x in features]
    values = [F.conv2d(x, state[f"{PRED}reg_map_pred.weight"])[0] for x in box_maps]
    found = []
    for level, (feature, box_map) in enumerate(zip(features, box_maps, strict=True)):
        weight, bias = (state[f"{PRED}dyn_pt_pred.{value}"] for value in ("weight", "bias"))
        dyn = F.conv2d(box_map, weight, bias, padding=1)[0]
        iy, ix = torch.meshgrid(
            *(torch.arange(n, dtype=dyn.dtype) for n in dyn.shape[-2:]), indexing="ij"
        )
        t, l, b, r = torch.stack((iy - 2, ix - 2, iy + 2, ix + 2)) + dyn[:4]  # noqa: E741
        yc, xc = (t + b) / 2, (l + r) / 2
        points = [
            (t, xc + limited(dyn[4], r - l)),
            (yc + limited(dyn[5], b - t), l),
            (b, xc + limited(dyn[6], r - l)),
            (yc + limited(dyn[7], b - t), r),
        ]
        sides = []
        for side, ((y, x), base) in enumerate(zip(points, (t, l, b, r), strict=True)):
            value = read(values[level][side : side + 1], y, x)[0]
            if level:
                fine = read(values[level - 1][side : side + 1], 2 * y, 2 * x)[0] / 2
                share = dyn[26 + 2 * side : 28 + 2 * side].softmax(0)
                value = share[0] * fine + share[1] * value
            sides.append(base + value)
        scores = F.conv2d(
            tower(state, "cls_conv_tower", feature), state[f"{PRED}cls_map_pred.weight"]
        )[0].chunk(9)
        lattice = [(y, x) for y in (t, yc, b) for x in (l, xc, r)]
        votes = [
            read(scores[i], y + dyn[8 + 2 * i], x + dyn[9 + 2 * i])
            for i, (y, x) in enumerate(lattice)
        ]
        bias = state[f"{PRED}cls_pred_collect.bias"].view(-1, 1, 1)
        found.append((torch.stack(sides), torch.stack(votes).sum(0) + bias))
    return found


def our_model() -> Any:
    cfg = tiny(get_config("pdnet_R_50_FPN_2x_official"), convs=4)
    cfg.model.backbone.bottom_up = L(official.narrow_resnet)()
    cfg.model.backbone.top_block.in_channels = 8 * TINY.outputs
    return instantiate(cfg.model)


@torch.no_grad()
def test_predictions_are_those_of_the_original_order() -> None:
    """In float64, where another order of summation cannot hide an error."""
    theirs = official.drawn(TINY)
    model = our_model()
    model.load_state_dict(convert_pdnet(theirs).tensors)
    model = model.double().eval()
    image = torch.randint(256, (3, 128, 192), dtype=torch.uint8)
    predictions = model.predict([{"image": image}])[2]

    theirs = {name: value.double() for name, value in theirs.items()}
    # Rounded to float32, as a detector keeps it.
    mean = torch.tensor([102.9801, 115.9465, 122.7717]).double().view(-1, 1, 1)
    found = head(theirs, pyramid(theirs, (image - mean)[None]))
    logits = torch.cat([logits.flatten(1).t() for _, logits in found])
    boxes = torch.cat(
        [
            box[[1, 0, 3, 2]].flatten(1).t() * stride
            for (box, _), stride in zip(found, STRIDES, strict=True)
        ]
    )
    assert logits.std() > 0.3
    assert boxes.shape == (16 * 24 + 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2, 4)
    torch.testing.assert_close(predictions.logits[0], logits, rtol=0, atol=1e-8)
    torch.testing.assert_close(predictions.boxes[0], boxes, rtol=0, atol=1e-6)
