# SPDX-License-Identifier: Apache-2.0
"""The stack of convolutions: names as in Detectron2's checkpoints, shapes, initialisation."""

from typing import Any

import pytest
import torch
from torch import nn

from d2_decouple.layers.tower import bias_free_tower, conv_tower, init_conv


def names(tower: nn.Module) -> list[str]:
    return list(tower.state_dict())


def test_names_with_and_without_norm() -> None:
    """Detectron2 lays convolution, norm and ReLU flat: 0, 1, (2,) 3, 4, (5,)."""
    with_norm = conv_tower(in_channels=32, conv_dims=[64, 32], norm="GN")
    assert names(with_norm) == [
        *("0.weight", "0.bias", "1.weight", "1.bias"),
        *("3.weight", "3.bias", "4.weight", "4.bias"),
    ]
    assert isinstance(with_norm[1], nn.GroupNorm)
    without = conv_tower(in_channels=8, conv_dims=[8, 8], norm="")
    assert names(without) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    no_bias = conv_tower(in_channels=8, conv_dims=[8], norm="", bias=False)
    assert names(no_bias) == ["0.weight"]


def test_norm_may_be_a_callable() -> None:
    tower = conv_tower(
        in_channels=8, conv_dims=[12], norm=lambda channels: nn.GroupNorm(3, channels)
    )
    assert isinstance(tower[1], nn.GroupNorm)
    assert (tower[1].num_groups, tower[1].num_channels) == (3, 12)


def test_empty_tower_is_the_identity() -> None:
    tower = conv_tower(in_channels=8, conv_dims=[])
    assert names(tower) == []
    x = torch.randn(2, 8, 3, 5)
    assert tower(x) is x


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (6, 4)])
def test_keeps_size_and_ends_with_relu(size: tuple[int, int]) -> None:
    tower = conv_tower(in_channels=8, conv_dims=[32, 64], norm="GN")
    out = tower(torch.randn(2, 8, *size))
    assert out.shape == (2, 64, *size)
    assert out.min() >= 0
    assert out.max() > 0


def test_towers_share_nothing() -> None:
    first = conv_tower(in_channels=8, conv_dims=[8], norm="")
    second = conv_tower(in_channels=8, conv_dims=[8], norm="")
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}


def test_initialisation() -> None:
    torch.manual_seed(0)
    tower = conv_tower(in_channels=64, conv_dims=[64, 64], norm="GN")
    for part in (tower[0], tower[3]):
        assert part.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert part.weight.mean().item() == pytest.approx(0, abs=3e-4)
        assert part.bias.abs().max() == 0
    assert (tower[1].weight == 1).all()  # the norm keeps its own initial values
    init_conv(tower, std=0.1, bias=-2.0)
    assert tower[0].weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert (tower[3].bias == -2).all()


def test_every_parameter_learns() -> None:
    tower = conv_tower(in_channels=8, conv_dims=[32, 32], norm="GN")
    tower(torch.randn(2, 8, 4, 4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.parameters())


def test_bias_free_tower() -> None:
    """As the other, convolution for convolution, without biases; the norm has one."""
    tower = bias_free_tower(in_channels=8, conv_dims=[32, 64], norm="GN")
    with_bias = names(conv_tower(in_channels=8, conv_dims=[32, 64], norm="GN"))
    assert names(tower) == [name for name in with_bias if name not in ("0.bias", "3.bias")]
    assert "1.bias" in names(tower)
    assert tower(torch.randn(1, 8, 3, 5)).shape == (1, 64, 3, 5)


def test_an_unknown_norm_names_some() -> None:
    with pytest.raises(ValueError, match=r"norm is 'none'; .* GN, BN .*model\.head\.norm="):
        conv_tower(in_channels=8, conv_dims=[32], norm="none")


@pytest.mark.parametrize("norm", ["", None, False])
def test_no_norm(norm: Any) -> None:
    assert names(conv_tower(in_channels=8, conv_dims=[32], norm=norm)) == ["0.weight", "0.bias"]


def test_an_error_of_ones_own_norm_is_kept() -> None:
    def norm(channels: int) -> nn.Module:
        raise KeyError(f"{channels} channels")

    with pytest.raises(KeyError, match="32 channels"):
        conv_tower(in_channels=8, conv_dims=[32], norm=norm)
