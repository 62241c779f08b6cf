# SPDX-License-Identifier: Apache-2.0
"""The pyramid with a second path against its formula; P6 and P7 without a ReLU."""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import instantiate
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import Tensor, nn
from util import loss_sum, random_input, tiny, tiny_resnet, without_gradient

from d2_decouple.config import get_config
from d2_decouple.modeling import FPN, PAFPN, LinearP6P7

C = 8
IN_FEATURES = ["res3", "res4", "res5"]


def make(kind: Any = PAFPN, top: Any = LastLevelP6P7, **changes: Any) -> Any:
    """On one seed, with biases that are not zero; in float64."""
    torch.manual_seed(2)
    top_block = top(C, C, in_feature="p5") if top is not None else None
    arguments = {"in_features": IN_FEATURES, "out_channels": C, "top_block": top_block, **changes}
    pyramid = kind(tiny_resnet(), **arguments).double()
    for name, parameter in pyramid.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return pyramid


def plain_twin(pyramid: PAFPN, **changes: Any) -> FPN:
    """The same without the second path."""
    twin = make(FPN, **changes)
    state = {k: v for k, v in pyramid.state_dict().items() if not k.startswith("pa_")}
    twin.load_state_dict(state)
    return twin


def image(size: tuple[int, int] = (64, 96)) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(4)).double()


def conv(x: Tensor, part: nn.Conv2d, stride: int = 1) -> Tensor:
    return F.conv2d(x, part.weight, part.bias, stride, padding=1)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_second_path_by_hand() -> None:
    pyramid = make()
    plain, found = plain_twin(pyramid)(image()), pyramid(image())
    assert list(found) == list(plain)
    assert torch.equal(found["p3"], plain["p3"])
    assert torch.equal(found["res2"], plain["res2"])
    middle = plain["p4"] + conv(plain["p3"], pyramid.pa_down[0], stride=2)
    last = plain["p5"] + conv(middle, pyramid.pa_down[1], stride=2)
    close(found["p4"], conv(middle, pyramid.pa_output[0]))
    p5 = conv(last, pyramid.pa_output[1])
    close(found["p5"], p5)
    p6 = conv(p5, pyramid.top_block.p6, stride=2)
    close(found["p6"], p6)
    close(found["p7"], conv(p6.relu(), pyramid.top_block.p7, stride=2))
    assert all(not torch.allclose(found[name], plain[name]) for name in ("p4", "p5", "p6", "p7"))


def test_names_are_the_pyramids_and_the_second_paths() -> None:
    pyramid = make()
    added = pyramid.state_dict().keys() - plain_twin(pyramid).state_dict().keys()
    assert added == {
        f"pa_{kind}.{index}.{name}"
        for kind in ("down", "output")
        for index in range(2)
        for name in ("weight", "bias")
    }
    shapes = {pyramid.state_dict()[name].shape for name in added}
    assert shapes == {(C, C, 3, 3), (C,)}


def test_told_shapes_are_the_maps_shapes() -> None:
    pyramid = make(passed_on=("res2", "res4"))
    shapes = pyramid.output_shape()
    maps = pyramid(image())
    assert set(maps) == set(shapes) == {"p3", "p4", "p5", "p6", "p7", "res2", "res4"}
    for name, x in maps.items():
        assert x.shape[1] == shapes[name].channels
        assert x.shape[-2:] == tuple(-(-side // shapes[name].stride) for side in (64, 96))


@torch.no_grad()
def test_other_top_blocks() -> None:
    linear = make(top=LinearP6P7)
    found = linear(image())
    close(found["p7"], conv(conv(found["p5"], linear.top_block.p6, 2), linear.top_block.p7, 2))
    pooled = make(top=None, top_block=LastLevelMaxPool())(image())
    assert torch.equal(pooled["p6"], pooled["p5"][..., ::2, ::2])
    bare = make(top=None)(image())
    assert set(bare) == {"p3", "p4", "p5", "res2"}
    for name in bare:
        assert torch.equal(bare[name], pooled[name]), name


@torch.no_grad()
def test_one_level_has_no_second_path() -> None:
    pyramid = make(in_features=["res5"])
    found, plain = pyramid(image()), plain_twin(pyramid, in_features=["res5"])(image())
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_top_block_must_start_from_the_last_output() -> None:
    for wrong, channels in (("res5", 40), ("p4", C)):
        top_block = LastLevelP6P7(channels, C, in_feature=wrong)
        with pytest.raises(ValueError, match=rf"from '{wrong}'.*'p5': set backbone\.top_block"):
            make(top_block=top_block)


@torch.no_grad()
@pytest.mark.parametrize("kind", [FPN, PAFPN])
def test_two_threads_at_once(kind: Any) -> None:
    """Both are inside the same module, with their hooks in place, when its parts run."""
    pyramid = make(kind)
    images = [image(), -image((96, 64))]
    want = [pyramid(x) for x in images]
    barrier = Barrier(2, timeout=20)

    def meet(*_: Any) -> None:
        barrier.wait()

    parts = [pyramid.bottom_up, *pyramid.lateral_convs, *pyramid.output_convs, pyramid.top_block]
    for part in parts:
        part.register_forward_hook(meet)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(pyramid, images))
    for one, other in zip(found, want, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], value) for name, value in other.items())


def test_no_hook_stays_behind() -> None:
    pyramid = make()
    before = pyramid(image())
    with pytest.raises(RuntimeError):
        pyramid(torch.zeros(1, 4, 64, 64))  # four channels
    for part in pyramid.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
    copied = copy.deepcopy(pyramid)
    nn.init.zeros_(pyramid.pa_output[1].weight)
    assert torch.equal(copied(image())["p5"], before["p5"])
    assert not torch.equal(pyramid(image())["p5"], before["p5"])


@pytest.mark.parametrize("host", ["fcos", "atss", "gfl"])
def test_every_parameter_of_a_detector_gets_a_gradient(host: str) -> None:
    cfg = tiny(get_config(f"{host}_R_50_FPN_1x"))
    cfg.model.backbone._target_ = PAFPN
    model = instantiate(cfg.model)
    loss_sum(model([random_input((64, 96), 3), random_input((33, 47), 0)])).backward()
    assert without_gradient(model) == []


def test_linear_p6_and_p7() -> None:
    """Detectron2's have a ReLU between them; names and weights are the same."""
    torch.manual_seed(0)
    theirs, ours = LastLevelP6P7(C, C, "p5"), LinearP6P7(C, C, "p5")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, C, 7, 9)
    p6, p7 = ours(x)
    assert torch.equal(p6, conv(x, ours.p6, 2))
    assert p6.min() < 0
    assert torch.equal(p7, conv(p6, ours.p7, 2))
    assert torch.equal(theirs(x)[0], p6)
    assert not torch.allclose(theirs(x)[1], p7)
    assert [tuple(y.shape[-2:]) for y in (p6, p7)] == [(4, 5), (2, 3)]


@pytest.mark.parametrize("host", ["atss", "gfl"])
def test_hosts_have_it(host: str) -> None:
    assert get_config(f"{host}_R_50_FPN_1x").model.backbone.top_block._target_ is LinearP6P7
