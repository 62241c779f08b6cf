# SPDX-License-Identifier: Apache-2.0
"""Deformable blocks: what plain loops compute, plain blocks as long as nothing was learned."""

import math

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock

from d2_decouple.layers.deform import (
    DeformBottleneckBlock,
    DeformConv,
    deform_from_res3,
    resnext_block,
)
from d2_decouple.modeling import FoldedConv2d, fold_frozen_norms
from d2_decouple.modeling.folding import cast_weights, fold_batch_norms

SHAPE = dict(in_channels=8, bottleneck_channels=8, out_channels=16)
VARIANTS = {
    "plain": {},
    "stride in 1x1": dict(stride=2, stride_in_1x1=True),
    "stride in 3x3": dict(stride=2),
    "groups": dict(num_groups=4),
    "dilated": dict(dilation=2),
}


def value_at(plane, y, x):
    """Bilinear, zero outside, by the four cells around the point."""
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < len(plane) and 0 <= column < len(plane[0]):
                share = (1 - abs(y - row)) * (1 - abs(x - column))
                total += share * plane[row][column]
    return total


def by_loops(image, offset, weight, *, stride, dilation, groups, mask):
    """Deformable convolution of one image, one output number after the other."""
    channels, outputs = len(image), len(weight)
    offset_groups = len(offset) // 18
    planes, height, width = image.tolist(), offset.shape[1], offset.shape[2]
    output = torch.zeros(outputs, height, width, dtype=torch.float64)
    for k in range(outputs):
        first = k // (outputs // groups) * (channels // groups)
        for y in range(height):
            for x in range(width):
                for c in range(channels // groups):
                    own = (first + c) // (channels // offset_groups)
                    for tap in range(9):
                        dy, dx = offset[18 * own + 2 * tap : 18 * own + 2 * tap + 2, y, x].tolist()
                        found = value_at(
                            planes[first + c],
                            y * stride + (tap // 3 - 1) * dilation + dy,
                            x * stride + (tap % 3 - 1) * dilation + dx,
                        )
                        factor = 1.0 if mask is None else mask[9 * own + tap, y, x].item()
                        output[k, y, x] += factor * found * weight[k, c, tap // 3, tap % 3].item()
    return output


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("dilation", "groups"), [(1, 1), (2, 2)])
@pytest.mark.parametrize(("offset_groups", "modulated"), [(1, False), (2, True)])
def test_equals_plain_loops(stride, dilation, groups, offset_groups, modulated):
    conv = DeformConv(4, 6, stride=stride, dilation=dilation, groups=groups).double()
    image = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    size = (-(-5 // stride), -(-4 // stride))
    offset = 3 * torch.randn(2, 18 * offset_groups, *size, dtype=torch.float64)
    mask = torch.rand(2, 9 * offset_groups, *size, dtype=torch.float64) if modulated else None
    found = conv(image, offset, mask)
    for i in range(2):
        expected = by_loops(
            image[i],
            offset[i],
            conv.weight,
            stride=stride,
            dilation=dilation,
            groups=groups,
            mask=None if mask is None else mask[i],
        )
        torch.testing.assert_close(found[i], expected)


def pair(variant, norm="FrozenBN", **options):
    """A plain block and a deformable one with its weights."""
    plain = BottleneckBlock(**SHAPE, norm=norm, **VARIANTS[variant])
    for part in plain.modules():
        if isinstance(part, FrozenBatchNorm2d):
            part.weight.uniform_(0.5, 1.5)
            part.bias.normal_()
    deform = DeformBottleneckBlock(**SHAPE, norm=norm, **VARIANTS[variant], **options)
    missing = deform.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["conv2_offset.weight", "conv2_offset.bias"]
    assert missing.unexpected_keys == []
    return plain, deform


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("modulated", [False, True])
def test_a_new_block_equals_the_plain_one(variant, modulated):
    """With factors, of which all begin at a half, the one whose convolution is half as large."""
    plain, deform = pair(variant, deform_modulated=modulated)
    if modulated:
        plain.conv2.weight.data *= 0.5
    x = torch.randn(2, 8, 7, 10)
    torch.testing.assert_close(deform(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("modulated", [False, True])
def test_names_and_shapes_are_detectron2s(modulated):
    """Those of Detectron2's DeformBottleneckBlock, which cannot be made without its operators."""
    block = DeformBottleneckBlock(
        64, 256, bottleneck_channels=128, num_groups=32, norm="", deform_modulated=modulated
    )
    assert {name: tuple(value.shape) for name, value in block.state_dict().items()} == {
        "shortcut.weight": (256, 64, 1, 1),
        "conv1.weight": (128, 64, 1, 1),
        "conv2_offset.weight": (27 if modulated else 18, 128, 3, 3),
        "conv2_offset.bias": (27 if modulated else 18,),
        "conv2.weight": (128, 4, 3, 3),
        "conv3.weight": (256, 128, 1, 1),
    }


def convolved(block, x):
    """What a block's 3x3 convolution makes of x."""
    found = []
    handle = block.conv2.register_forward_hook(lambda _, inputs, out: found.append(out.clone()))
    block(x)
    handle.remove()
    return found[0]


def test_coordinates_are_y_before_x_and_factors_come_last():
    """Every tap moved two cells to the right, and counted by its factor, sigmoid(ln 3) = 3/4."""
    plain, deform = pair("plain", norm="", deform_modulated=True)
    deform.conv2_offset.bias.data[1:18:2] = 2.0
    deform.conv2_offset.bias.data[18:] = math.log(3)
    x = torch.randn(1, 8, 6, 9)
    moved, still = convolved(deform, x), convolved(plain, x)
    torch.testing.assert_close(moved[..., :-2], 0.75 * still[..., 2:], rtol=1e-4, atol=1e-5)


def test_groups_of_channels_may_have_offsets_of_their_own():
    """The first group's values come from one row below, the second's from where they are."""
    plain, deform = pair("plain", norm="", deform_num_groups=2)
    assert deform.conv2_offset.weight.shape == (36, 8, 3, 3)
    deform.conv2_offset.bias.data[0:18:2] = 1.0
    x = torch.randn(1, 8, 6, 9)
    moved, still = convolved(deform, x), []
    for half in (slice(0, 4), slice(4, 8)):
        part = BottleneckBlock(**SHAPE, norm="")
        part.load_state_dict(plain.state_dict())
        weight = torch.zeros_like(part.conv2.weight)
        weight[:, half] = part.conv2.weight.data[:, half]
        part.conv2.weight.data = weight
        still.append(convolved(part, x))
    expected = still[0][:, :, 1:] + still[1][:, :, :-1]
    torch.testing.assert_close(moved[:, :, :-1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_everything_learns_from_the_start(norm, modulated):
    """Also the offsets, although they begin at whole numbers, where bilinear values have a bend."""
    block = DeformBottleneckBlock(**SHAPE, norm=norm, num_groups=2, deform_modulated=modulated)
    block(torch.randn(2, 8, 9, 7)).square().sum().backward()
    still = [name for name, x in block.named_parameters() if not x.grad.any()]
    assert still == []


@pytest.mark.parametrize("modulated", [False, True])
def test_coordinates_are_float32_under_autocast(modulated):
    """Same weights and bfloat16 maps: offsets far from whole bfloat16 numbers are kept."""
    block = DeformBottleneckBlock(**SHAPE, norm="FrozenBN", deform_modulated=modulated).eval()
    block.conv2_offset.bias.data[:18] = 1.0 + torch.arange(18) / 4096
    x = torch.randn(1, 8, 6, 6)
    asked = []
    block.conv2.register_forward_hook(lambda _, inputs, out: asked.append((inputs[1], out.dtype)))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = block(x)
    with torch.no_grad():
        expected = block(x)
    (half, dtype), (full, _) = asked
    assert dtype == output.dtype == torch.bfloat16
    assert half.dtype == torch.float32
    assert torch.equal(half, full)
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)


def network(block_class, *, norm="FrozenBN", **options):
    """A small network of four stages, as ``make_default_stages`` makes large ones."""
    stages = [
        ResNet.make_stage(
            block_class,
            2,
            in_channels=before,
            out_channels=after,
            bottleneck_channels=after // 4,
            stride_per_block=[stride, 1],
            norm=norm,
            **options,
        )
        for before, after, stride in [(16, 256, 1), (256, 320, 2), (320, 384, 2), (384, 448, 2)]
    ]
    return ResNet(
        BasicStem(3, 16, norm=norm), stages, out_features=["res2", "res5"], freeze_at=2
    ).train()


def test_stages_from_res3_deform():
    resnet = network(deform_from_res3, deform_modulated=True)
    kinds = [{type(block) for block in getattr(resnet, f"res{i}")} for i in (2, 3, 4, 5)]
    assert kinds == [{BottleneckBlock}] + [{DeformBottleneckBlock}] * 3


def test_frozen_norms_fold_around_it():
    """Plain convolutions are folded; the deformable one and its norm work as before."""
    resnet = network(deform_from_res3)
    for part in resnet.modules():
        if isinstance(part, FrozenBatchNorm2d):
            part.running_var.uniform_(0.5, 1.5)
            part.running_mean.normal_(std=0.1)
    x = torch.randn(1, 3, 64, 96)
    names, before = list(resnet.state_dict()), resnet(x)["res5"]
    folded = fold_frozen_norms(resnet)
    assert list(folded.state_dict()) == names
    assert type(folded.res3[0].conv1) is FoldedConv2d
    assert type(folded.res3[0].conv2) is DeformConv
    after = folded(x)["res5"]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    after.sum().backward()
    assert folded.res2[0].conv1.weight.grad is None
    learning = [x for x in folded.parameters() if x.requires_grad]
    assert len(learning) > 30
    assert all(torch.isfinite(x.grad).all() for x in learning)

    ready = folded.eval()
    with torch.no_grad():
        expected = ready(x)["res5"]
        assert fold_batch_norms(ready) > 10
        torch.testing.assert_close(ready(x)["res5"], expected, rtol=1e-4, atol=1e-4)


def test_weights_in_half_precision_leave_the_offsets_alone():
    resnet = network(deform_from_res3).eval()
    cast_weights(resnet, torch.bfloat16, parts=["res3"])
    block = resnet.res3[0]
    assert block.conv1.weight.dtype == torch.bfloat16
    assert block.conv2_offset.weight.dtype == block.conv2.weight.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(resnet(torch.randn(1, 3, 64, 64))["res5"]).all()


@pytest.mark.parametrize("plain", [BottleneckBlock, deform_from_res3])
def test_resnext_101_64x4d(plain):
    """Widths of the published network: 4 channels in each of 64 groups of res2, doubling."""
    with torch.device("meta"):
        stages = ResNet.make_default_stages(
            depth=101,
            block_class=resnext_block,
            block=plain,
            num_groups=64,
            width_per_group=4,
            stride_in_1x1=False,
            norm="FrozenBN",
        )
    assert [len(stage) for stage in stages] == [3, 4, 23, 3]
    for index, stage in enumerate(stages):
        width = 256 * 2**index
        for block in stage:
            assert block.conv2.weight.shape == (width, width // 64, 3, 3)
            assert block.conv1.stride == (1, 1)
            assert block.conv3.out_channels == width
        deformable = index > 0 and plain is not BottleneckBlock
        assert {type(block) for block in stage} == {
            DeformBottleneckBlock if deformable else BottleneckBlock
        }
