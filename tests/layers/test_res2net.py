# SPDX-License-Identifier: Apache-2.0
"""Res2Net against its formulae; its deformable blocks; what stays as in Detectron2's ResNet."""

import copy
from typing import Any

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone import ResNet
from res2net_reference import BLOCKS, PLANES, features, nine_cells, random_state
from torch import Tensor, nn

from d2_decouple.checkpoint.res2net import res2net_name
from d2_decouple.layers.deform import OffsetDeformConv
from d2_decouple.layers.res2net import (
    DeepStem,
    DeformRes2NetBlock,
    Res2NetBlock,
    res2net_deform_from_res3,
    res2net_deform_from_res4,
)
from d2_decouple.modeling import FoldedConv2d, fold_frozen_norms

STAGES = ["res2", "res3", "res4", "res5"]
SHAPE: dict[str, Any] = dict(in_channels=12, out_channels=24, bottleneck_channels=16)  # width 6


def network(block: Any = Res2NetBlock, *, freeze_at: int = 0, **options: Any) -> ResNet:
    """The reference's: a few narrow blocks."""
    stages, inputs = [], 64
    for index, blocks in enumerate(BLOCKS):
        planes = PLANES * 2**index
        stage = ResNet.make_stage(
            block,
            blocks,
            in_channels=inputs,
            out_channels=4 * planes,
            bottleneck_channels=planes,
            stride_per_block=[2 if index else 1] + [1] * (blocks - 1),
            norm="FrozenBN",
            **options,
        )
        stages.append(stage)
        inputs = 4 * planes
    stem = DeepStem(norm="FrozenBN")
    return ResNet(stem, stages, out_features=STAGES, freeze_at=freeze_at)


def loaded(resnet: ResNet, state: dict[str, Tensor]) -> ResNet:
    """With the state under our names, nothing missing but offsets; in evaluation mode."""
    ours = {res2net_name(name): x for name, x in state.items()}
    known = {name: x for name, x in ours.items() if name in resnet.state_dict()}
    missing, unexpected = resnet.load_state_dict(known, strict=False)
    assert all("conv_offset" in name for name in missing)
    assert unexpected == []
    return resnet.eval()


def close(got: list[Tensor], want: list[Tensor]) -> bool:
    assert [x.shape for x in got] == [x.shape for x in want]
    pairs = zip(got, want, strict=True)
    return all(float((a - b).abs().max() / b.abs().max()) < 1e-4 for a, b in pairs)


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 96), (77, 45)])  # 45: 23, 12, 6, 3, 2
def test_network_equals_its_formulae(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    state, image = random_state(), torch.randn(1, 3, *size)
    for averages in (False, True):
        ours = loaded(network(averages_at_stride_1=averages), state)(image)
        assert close(list(ours.values()), features(state, image, averages=averages))
        assert not close(list(ours.values()), features(state, image, averages=not averages))


@torch.no_grad()
def test_new_deformable_blocks_read_where_plain_ones_do() -> None:
    torch.manual_seed(1)
    state, image = random_state(), torch.randn(1, 3, 61, 64)
    ours = loaded(network(DeformRes2NetBlock), state)(image)
    assert close(list(ours.values()), features(state, image, averages=False))


@torch.no_grad()
def test_network_equals_timms() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(2)
    theirs = timm.create_model("res2net50d", layers=BLOCKS).eval()
    state, image = theirs.state_dict(), torch.randn(1, 3, 77, 64)
    stages = [
        ResNet.make_stage(
            Res2NetBlock,
            blocks,
            in_channels=128 * 2**index if index else 64,
            out_channels=256 * 2**index,
            bottleneck_channels=64 * 2**index,
            stride_per_block=[2 if index else 1] + [1] * (blocks - 1),
            averages_at_stride_1=True,
        )
        for index, blocks in enumerate(BLOCKS)
    ]
    ours = loaded(ResNet(DeepStem(), stages, out_features=STAGES), state)(image)
    assert close(list(ours.values()), theirs.forward_intermediates(image)[1][1:])


@torch.no_grad()
def test_one_block_by_hand() -> None:
    """One channel a group, weights that copy: 1x1s of ones and 3x3s that keep the middle.

    With x = 1 everywhere, ``conv1`` makes four groups of 1. Adding up they are 1, 1 + 1 = 2,
    1 + 2 = 3 and 1, together 7; ``conv3`` sums them and the input is added: 8. In a first block
    nothing is added between groups: 4, and 1 of the shortcut.
    """
    for inputs, want in ((1, 8.0), (2, 6.0)):
        block = Res2NetBlock(inputs, 1, bottleneck_channels=64, base_width=1, norm="")
        for conv in (block.conv1, block.conv3, block.shortcut):
            if conv is not None:
                nn.init.ones_(conv.weight)
        nn.init.constant_(block.conv1.weight, 1 / inputs)
        for inner in block.convs:
            nn.init.dirac_(inner.weight)
        out = block(torch.ones(1, inputs, 3, 4))
        assert torch.equal(out, torch.full((1, 1, 3, 4), want))


@torch.no_grad()
def test_last_group_and_shortcut_are_averaged_where_the_map_shrinks() -> None:
    block = Res2NetBlock(1, 1, bottleneck_channels=64, base_width=1, stride=2, norm="")
    assert block.shortcut is not None
    nn.init.ones_(block.conv1.weight)
    for inner in block.convs:
        nn.init.zeros_(inner.weight)
    block.conv3.weight.copy_(torch.tensor([0.0, 0, 0, 1]).view(1, 4, 1, 1))
    nn.init.zeros_(block.shortcut.weight)
    x = torch.arange(15.0).view(1, 1, 3, 5)
    torch.testing.assert_close(block(x), nine_cells(x, 2))
    nn.init.zeros_(block.conv3.weight)
    nn.init.ones_(block.shortcut.weight)
    # Rows 0 5 10, columns 0..4: the mean of 0 1 5 6 is 3, of 4 9 alone 6.5, of 10 11 10.5.
    want = torch.tensor([[3.0, 5.0, 6.5], [10.5, 12.5, 14.0]])
    torch.testing.assert_close(block(x)[0, 0], want)


def test_each_inner_convolution_has_offsets_of_its_own() -> None:
    """Moving those of the second by a cell moves what the second and the third read."""
    torch.manual_seed(3)
    plain = DeformRes2NetBlock(**{**SHAPE, "in_channels": 24}, norm="")
    moved = copy.deepcopy(plain)
    offset = moved.convs[1].conv_offset
    assert {type(x) for x in moved.convs} == {OffsetDeformConv}
    assert offset.weight.shape == (18, 6, 3, 3)
    nn.init.constant_(offset.bias[1::2], 1.0)  # x of every tap: to the right
    maps: list[list[Tensor]] = []
    for block in (plain, moved):
        found: list[Tensor] = []
        for conv in block.convs:
            conv.register_forward_hook(lambda _, inputs, out, found=found: found.append(out + 0))
        block(torch.randn(1, 24, 5, 7, generator=torch.Generator().manual_seed(1)))
        maps.append(found)
    (one, two, three), (one_moved, two_moved, three_moved) = maps
    assert torch.equal(one_moved, one)
    torch.testing.assert_close(two_moved[..., :-1], two[..., 1:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(three_moved, three)


@pytest.mark.parametrize("block", [Res2NetBlock, DeformRes2NetBlock])
@pytest.mark.parametrize("stride", [1, 2])
def test_everything_learns_from_the_start(block: Any, stride: int) -> None:
    torch.manual_seed(4)
    module = block(**SHAPE, stride=stride, norm="BN")
    out = module(torch.randn(2, 12, 9, 7))
    assert out.shape == (2, 24, -(-9 // stride), -(-7 // stride))
    out.square().sum().backward()
    assert [name for name, x in module.named_parameters() if not x.grad.any()] == []


@pytest.mark.parametrize("block", [Res2NetBlock, DeformRes2NetBlock])
def test_gradients_are_those_of_differences(block: Any) -> None:
    """Away from whole offsets, where bilinear values have a bend."""
    torch.manual_seed(5)
    module = block(4, 4, bottleneck_channels=16, base_width=8, norm="").double()
    for conv in module.convs:
        if isinstance(conv, OffsetDeformConv):
            nn.init.uniform_(conv.conv_offset.bias, 0.2, 0.4)
            nn.init.normal_(conv.conv_offset.weight, std=0.01)
    x = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    inputs = (x, *module.parameters())
    assert torch.autograd.gradcheck(lambda *_: module(x), inputs, fast_mode=True)


def test_frozen_parts_and_folded_norms() -> None:
    torch.manual_seed(6)
    resnet = loaded(network(DeformRes2NetBlock, freeze_at=2), random_state())
    x = torch.randn(1, 3, 64, 64)
    names, before = list(resnet.state_dict()), resnet(x)
    assert not any(x.requires_grad for part in ("stem", "res2") for x in part_of(resnet, part))
    assert all(x.requires_grad for part in ("res3", "res5") for x in part_of(resnet, part))
    folded = fold_frozen_norms(resnet)
    assert list(folded.state_dict()) == names
    block = folded.res5[0]
    kinds = [type(x) for x in (folded.stem.conv3, block.conv1, block.shortcut)]
    assert kinds == [FoldedConv2d] * 3
    assert isinstance(block.convs[0].norm, FrozenBatchNorm2d)
    plain = fold_frozen_norms(network())
    assert type(plain.res3[0].convs[2]) is FoldedConv2d
    assert close(list(folded(x).values()), list(before.values()))


def part_of(resnet: ResNet, name: str) -> list[nn.Parameter]:
    return list(getattr(resnet, name).parameters())


def count(module: nn.Module) -> int:
    return sum(x.numel() for x in module.parameters())


@pytest.mark.parametrize(
    ("block", "offsets"),
    [
        (Res2NetBlock, 0),
        # Three convolutions a block, each 9 * width * 18 weights and 18 biases.
        (res2net_deform_from_res4, 3 * (23 * (162 * 104 + 18) + 3 * (162 * 208 + 18))),
        (
            res2net_deform_from_res3,
            3 * (4 * (162 * 52 + 18) + 23 * (162 * 104 + 18) + 3 * (162 * 208 + 18)),
        ),
    ],
)
def test_size_of_res2net_101(block: Any, offsets: int) -> None:
    """45,225,920 parameters in timm's, of which 2,049,000 classify."""
    with torch.device("meta"):
        stages = ResNet.make_default_stages(101, block_class=block, norm="BN")
        resnet = ResNet(DeepStem(), stages, out_features=STAGES)
    assert count(resnet) == 45_225_920 - 2_049_000 + offsets
    widths = [getattr(resnet, name)[0].conv3.in_channels // 4 for name in STAGES]
    assert widths == [26, 52, 104, 208]
    deformed = [
        {isinstance(x, DeformRes2NetBlock) for x in getattr(resnet, name)} for name in STAGES
    ]
    first = {Res2NetBlock: 4, res2net_deform_from_res4: 2, res2net_deform_from_res3: 1}[block]
    assert deformed == [{index >= first} for index in range(4)]
    shapes = {name: (x.channels, x.stride) for name, x in resnet.output_shape().items()}
    assert shapes == {"res2": (256, 4), "res3": (512, 8), "res4": (1024, 16), "res5": (2048, 32)}


def test_new_convolutions_are_drawn_as_in_a_resnet() -> None:
    """A normal distribution whose variance is 2 over 9 * outputs."""
    torch.manual_seed(7)
    for block in (Res2NetBlock, DeformRes2NetBlock):
        conv = block(8, 8, bottleneck_channels=64, base_width=64, norm="").convs[2]
        assert conv.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)


@torch.no_grad()
def test_bfloat16_is_close() -> None:
    torch.manual_seed(8)
    block = DeformRes2NetBlock(**SHAPE, stride=2, norm="FrozenBN").eval()
    x = torch.randn(1, 12, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = block(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), block(x), rtol=0.05, atol=0.05)


def test_one_group_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scales is 1, .*at least 2.*stages\.scales=4"):
        Res2NetBlock(**SHAPE, scales=1)


def test_number_of_groups() -> None:
    block = Res2NetBlock(**SHAPE, scales=3, norm="")
    assert len(block.convs) == 2
    assert block(torch.zeros(1, 12, 2, 2)).shape == (1, 24, 2, 2)
    assert block.conv1.out_channels == 18
