# SPDX-License-Identifier: Apache-2.0
"""The pyramid equals Detectron2's; folded norms equal the norms they stand for."""

import copy
import math
from typing import Any

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone import BasicStem, ResNet, fpn
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn

from d2_decouple.modeling import FPN, FoldedConv2d, fold_frozen_norms

STAGES = ["res2", "res3", "res4", "res5"]


def randomise_norms(module: nn.Module) -> None:
    """Statistics, scales and shifts as after a training, none of them 0 or 1."""
    for part in module.modules():
        if isinstance(part, (FrozenBatchNorm2d, nn.BatchNorm2d)):
            for value, low, high in (
                *((part.weight, 0.5, 1.5), (part.bias, -0.3, 0.3)),
                *((part.running_mean, -0.2, 0.2), (part.running_var, 0.5, 2.0)),
            ):
                value.data.uniform_(low, high)


def make_resnet(norm: str = "FrozenBN", freeze_at: int = 0, out: list[str] = STAGES) -> ResNet:
    torch.manual_seed(0)
    resnet = ResNet(
        BasicStem(in_channels=3, out_channels=64, norm=norm),
        ResNet.make_default_stages(depth=18, norm=norm),
        out_features=list(out),
        freeze_at=freeze_at,
    )
    randomise_norms(resnet)
    return resnet


def both_pyramids(
    norm: str = "FrozenBN", fpn_norm: str = "", top: str = "p5", **changes: Any
) -> tuple[fpn.FPN, FPN]:
    """Detectron2's and ours with the same weights, in eval mode."""

    def arguments() -> dict[str, Any]:
        shared = {"in_features": STAGES[1:], "out_channels": 32, "norm": fpn_norm}
        channels = {"p5": 32, "res5": 512}[top]
        return {**shared, "top_block": LastLevelP6P7(channels, 32, in_feature=top)}

    torch.manual_seed(1)
    theirs = fpn.FPN(make_resnet(norm), **arguments())
    ours = FPN(make_resnet(norm), **arguments(), **changes)
    randomise_norms(theirs)
    keys = ours.load_state_dict(theirs.state_dict())
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    return theirs.eval(), ours.eval()


def image() -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to ``tolerance`` of the map's own size."""
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_state_dict_keys_are_detectron2s(norm: str) -> None:
    theirs, ours = both_pyramids(norm)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    named = [[name for name, _ in x.named_parameters()] for x in (ours, theirs)]
    assert named[0] == named[1]


@pytest.mark.parametrize("fpn_norm", ["", "GN"])
@pytest.mark.parametrize("top", ["p5", "res5"])
def test_equals_detectron2_bit_for_bit(top: str, fpn_norm: str) -> None:
    """With live norms nothing is folded: the same operators in the same order."""
    theirs, ours = both_pyramids("BN", fpn_norm, top)
    want, got = theirs(image()), ours(image())
    assert sorted(got) == sorted([*want, "res2"])
    assert all(torch.equal(got[name], value) for name, value in want.items())
    assert torch.equal(got["res2"], theirs.bottom_up(image())["res2"])


def test_equals_detectron2_with_folded_norms() -> None:
    theirs, ours = both_pyramids("FrozenBN")
    assert any(isinstance(part, FoldedConv2d) for part in ours.modules())
    assert not any(isinstance(part, FoldedConv2d) for part in theirs.modules())
    want, got = theirs(image()), ours(image())
    for name, value in want.items():
        close(got[name], value)
    close(got["res2"], theirs.bottom_up(image())["res2"])


def test_gradients_equal_detectron2s() -> None:
    theirs, ours = both_pyramids("FrozenBN")
    for pyramid in (theirs, ours):
        maps = pyramid(image())
        sum((x * x.detach()).mean() for x in maps.values() if x.shape[1] == 32).backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert a.grad is not None, name
        assert b.grad is not None, name
        close(a.grad, b.grad, 1e-4)


def test_shapes_are_told() -> None:
    _, ours = both_pyramids(passed_on=("res2", "res4"))
    maps = ours(image())
    shapes = ours.output_shape()
    assert set(maps) == set(shapes) == {"p3", "p4", "p5", "p6", "p7", "res2", "res4"}
    for name, value in maps.items():
        assert shapes[name].channels == value.shape[1]
        stride = shapes[name].stride
        assert value.shape[2:] == (math.ceil(64 / stride), math.ceil(96 / stride))
    assert ours.size_divisibility == 32


def test_passing_on_nothing_and_max_pool() -> None:
    torch.manual_seed(0)
    arguments = {"in_features": STAGES[1:], "out_channels": 32, "top_block": LastLevelMaxPool()}
    plain = FPN(make_resnet("BN", out=STAGES[1:]), passed_on=(), **arguments).eval()
    assert set(plain(image())) == set(plain.output_shape()) == {"p3", "p4", "p5", "p6"}


def test_missing_map_is_named() -> None:
    with pytest.raises(ValueError, match=r"\['res3', 'res4', 'res5'\].*\['res2'\].*passed_on"):
        FPN(make_resnet(out=STAGES[1:]), in_features=STAGES[1:], out_channels=32)


def test_no_hook_stays_behind() -> None:
    _, ours = both_pyramids("BN")
    ours(image())
    with pytest.raises(RuntimeError):
        ours(torch.zeros(1, 4, 64, 64))  # four channels
    assert not ours.bottom_up._forward_hooks
    copied = copy.deepcopy(ours)
    assert torch.equal(copied(image())["p3"], ours(image())["p3"])


# --- folding ------------------------------------------------------------------------------------


def make_conv(**changes: Any) -> Conv2d:
    arguments: dict[str, Any] = {"kernel_size": 3, "padding": 1, "bias": False}
    arguments = {**arguments, "norm": FrozenBatchNorm2d(12), **changes}
    torch.manual_seed(3)
    conv = Conv2d(8, 12, **arguments)
    randomise_norms(conv)
    return conv


CONVS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "activation": {"activation": nn.functional.relu},
    "stride, dilation, groups": {"stride": 2, "dilation": 2, "padding": 2, "groups": 4},
    "one by one": {"kernel_size": 1, "padding": 0},
    "uneven": {"kernel_size": (3, 1), "padding": (1, 0), "stride": (1, 2)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("changes", CONVS.values(), ids=CONVS)
def test_folded_equals_convolution_and_norm(changes: dict[str, Any], dtype: torch.dtype) -> None:
    conv = make_conv(**changes).to(dtype)
    (folded,) = fold_frozen_norms(nn.Sequential(copy.deepcopy(conv)))
    assert isinstance(folded, FoldedConv2d)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    results = []
    for module in (folded, conv):
        x = torch.randn(2, 8, 9, 11, generator=torch.Generator().manual_seed(4)).to(dtype)
        x.requires_grad_()
        out = module(x)
        (out * torch.linspace(-1, 2, out.shape[-1], dtype=dtype)).sum().backward()
        results.append([out.detach(), x.grad, *(p.grad for p in module.parameters())])
    for got, want in zip(*results, strict=True):
        assert got is not None
        assert want is not None
        assert got.dtype == dtype
        close(got, want, tolerance)


def test_folding_keeps_parameters_and_settings() -> None:
    conv = make_conv(stride=2)
    conv.weight.requires_grad_(False)
    conv.eval()
    keys = list(conv.state_dict())
    parent = nn.Sequential(conv)
    assert fold_frozen_norms(parent) is parent
    folded = parent[0]
    assert folded.weight is conv.weight
    assert folded.norm is conv.norm
    assert not folded.training
    assert not folded.weight.requires_grad
    assert list(folded.state_dict()) == keys
    assert folded.weight.device.type == "cpu"


def test_folding_leaves_the_rest_alone() -> None:
    class OtherConv(Conv2d):
        pass

    parts = [
        Conv2d(8, 8, 3, norm=nn.BatchNorm2d(8)),
        Conv2d(8, 8, 3, norm=nn.GroupNorm(2, 8)),
        Conv2d(8, 8, 3),
        OtherConv(8, 8, 3, norm=FrozenBatchNorm2d(8)),
        nn.Conv2d(8, 8, 3),
        FrozenBatchNorm2d(8),
    ]
    module = fold_frozen_norms(nn.Sequential(*parts))
    assert list(module) == parts
    assert all(now is before for now, before in zip(module, parts, strict=True))


def test_live_norms_keep_learning() -> None:
    resnet = make_resnet("BN")
    pyramid = FPN(resnet, in_features=STAGES[1:], out_channels=32).train()
    assert not any(isinstance(part, FoldedConv2d) for part in pyramid.modules())
    norm = resnet.res3[0].conv1.norm
    before = norm.running_mean.clone()
    sum(x.square().mean() for x in pyramid(image()).values()).backward()
    assert not torch.equal(norm.running_mean, before)
    assert norm.weight.grad is not None


def test_norm_that_is_replaced_later_is_used() -> None:
    """A conversion of norms after the folding, as synchronised batch norm needs it."""
    (folded,) = fold_frozen_norms(nn.Sequential(make_conv()))
    x = torch.randn(4, 8, 6, 6)
    folded.norm = nn.BatchNorm2d(12)
    want = folded.norm(nn.functional.conv2d(x, folded.weight, padding=1))
    torch.testing.assert_close(folded(x), want)


def test_partly_frozen_backbone() -> None:
    """``freeze_at`` turns live norms of the first stages into frozen ones: only those fold."""
    resnet = make_resnet("BN", freeze_at=2)
    want = copy.deepcopy(resnet).eval()(image())
    pyramid = FPN(resnet, in_features=STAGES[1:], out_channels=32).eval()
    folded = {name for name, x in pyramid.named_modules() if isinstance(x, FoldedConv2d)}
    assert folded
    assert all(".stem." in name or ".res2." in name for name in folded)
    close(pyramid(image())["res2"], want["res2"])
    trains = {n for n, p in pyramid.bottom_up.named_parameters() if p.requires_grad}
    assert trains
    assert not any(n.startswith(("stem", "res2")) for n in trains)


def test_folded_convolution_under_autocast() -> None:
    conv = make_conv()
    (folded,) = fold_frozen_norms(nn.Sequential(copy.deepcopy(conv)))
    x = torch.randn(2, 8, 9, 11, generator=torch.Generator().manual_seed(4))
    with torch.autocast("cpu", torch.bfloat16):
        got = folded(x)
    assert got.dtype == torch.bfloat16
    close(got.float(), conv(x), 0.02)
