# SPDX-License-Identifier: Apache-2.0
"""A strided convolution over a map plus an enlarged one: values and both ways to the gradient."""

import pytest
import torch
import torch.nn.functional as F

from d2_decouple.layers.strided import HalvingConv2d, StridedConv


def inputs(size, finer_size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    level = torch.randn(2, 32, *size, generator=generator, dtype=dtype)
    finer = torch.randn(2, 32, *finer_size, generator=generator, dtype=dtype)
    return level.requires_grad_(), finer


def gradients(module, level, finer, how):
    output = how(module, level, finer)
    upstream = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
    loss = (output * upstream).sum()
    return output, torch.autograd.grad(loss, [level, *module.parameters()])


def plainly(module, level, finer):
    return module(F.interpolate(level, finer.shape[-2:], mode="nearest") + finer)


@pytest.mark.parametrize("norm", ["GN", ""])
@pytest.mark.parametrize("size", [(6, 8), (3, 5), (2, 1), (1, 1)])
@pytest.mark.parametrize("cut", [(0, 0), (1, 0), (0, 1)])
def test_the_short_way_is_exact(norm, size, cut):
    """Even sizes take it; where a row or column is missing, the ordinary one is taken."""
    finer_size = (2 * size[0] - cut[0], 2 * size[1] - cut[1])
    level, finer = inputs(size, finer_size)
    torch.manual_seed(1)
    module = StridedConv(32, norm=norm).double()
    wanted, wanted_gradients = gradients(module, level, finer, plainly)
    got, got_gradients = gradients(module, level, finer, StridedConv.over_enlarged)
    assert got.shape == (2, 32, *size)
    torch.testing.assert_close(got, wanted)
    for ours, theirs in zip(got_gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_short_way_is_taken_where_it_can_be(monkeypatch):
    calls = []
    plain = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *a, **k: calls.append(1) or plain(*a, **k))
    module = StridedConv(32).double()
    for needs, convolutions in ((False, 2), (True, 1)):  # one of them in the backward
        level, finer = inputs((4, 4), (8, 8))
        calls.clear()
        finer.requires_grad_(needs)
        gradients(module, level, finer, StridedConv.over_enlarged)
        assert len(calls) == convolutions
    larger = StridedConv(32, kernel_size=5).double()
    level, finer = inputs((4, 4), (8, 8))
    _, ours = gradients(larger, level, finer, StridedConv.over_enlarged)
    _, theirs = gradients(larger, level, finer, plainly)
    torch.testing.assert_close(ours[0], theirs[0])


def test_both_inputs_get_their_gradients():
    level, finer = inputs((4, 6), (8, 12))
    finer.requires_grad_()
    module = StridedConv(32).double()
    for how in (plainly, StridedConv.over_enlarged):
        loss = how(module, level, finer).square().sum()
        found = torch.autograd.grad(loss, [level, finer])
        assert all(x.abs().sum() > 0 for x in found)


def test_inputs_stay_as_they_are():
    level, finer = inputs((4, 6), (8, 12))
    before = level.detach().clone(), finer.clone()
    StridedConv(32).double().over_enlarged(level, finer).sum().backward()
    assert torch.equal(level, before[0])
    assert torch.equal(finer, before[1])


def test_under_autocast_the_gradient_is_that_of_float32():
    level, finer = inputs((8, 8), (16, 16), torch.float32)
    torch.manual_seed(1)
    module = StridedConv(32, norm="")
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = module.over_enlarged(level, finer).float().square().sum()
        found.append(torch.autograd.grad(loss, level)[0])
    assert found[1].dtype == torch.float32
    difference = (found[0] - found[1]).abs().max()
    assert 0 < difference < 0.02 * found[0].abs().max()


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("size", [(1, 1), (5, 1), (1, 5), (4, 4), (5, 7)])
def test_halving_rounds_up(kernel, size):
    conv = HalvingConv2d(4, 4, kernel, stride=2, padding=kernel // 2)
    x = torch.randn(1, 4, *size)
    plain = F.conv2d(x, conv.weight, conv.bias, stride=2, padding=kernel // 2)
    assert plain.shape[-2:] == ((size[0] + 1) // 2, (size[1] + 1) // 2)
    torch.testing.assert_close(conv(x), plain)
