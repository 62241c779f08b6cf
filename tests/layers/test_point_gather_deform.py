# SPDX-License-Identifier: Apache-2.0
"""Gathered points and a convolution over them are torchvision's deformable convolution."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from helpers_of_point_gather import both_paths, gather_by
from torch import Tensor
from torchvision.ops import deform_conv2d

SIZES = [(7, 9), (2, 2), (1, 1), (1, 5)]
TAPS = 9


class Problem(NamedTuple):
    features: Tensor  # (N, C, H, W)
    points: Tensor  # (N, 9, 2, H, W), (x, y) in cells
    weight: Tensor  # (K, C, 3, 3)
    grad: Tensor  # (N, K, H, W), of the result


def problem(size: tuple[int, int], channels: int = 6, outputs: int = 4) -> Problem:
    """Points around their cells, some outside the map; none is on a whole number."""
    generator = torch.Generator().manual_seed(sum(size))
    options = dict(generator=generator, dtype=torch.float64)
    around = 4 * torch.rand(2, TAPS, 2, *size, **options) - 2
    return Problem(
        torch.randn(2, channels, *size, **options),
        own_cells(size) + around,
        torch.randn(outputs, channels, 3, 3, **options),
        torch.randn(2, outputs, *size, **options),
    )


def own_cells(size: tuple[int, int]) -> Tensor:
    """(2, H, W): x and y of each cell."""
    rows, columns = torch.meshgrid(*map(torch.arange, size), indexing="ij")
    return torch.stack((columns, rows)).double()


def torchvision_result(features: Tensor, points: Tensor, weight: Tensor) -> Tensor:
    """Its offsets are (y, x), from where an ordinary convolution would read for each tap."""
    taps = torch.tensor([(k % 3 - 1, k // 3 - 1) for k in range(TAPS)])
    offsets = points - (own_cells(tuple(features.shape[-2:])) + taps[:, :, None, None])
    return deform_conv2d(features, offsets.flip(2).flatten(1, 2), weight, padding=1)


def deformable_result(path: str, features: Tensor, points: Tensor, weight: Tensor) -> Tensor:
    """All channels at each point, then a 1x1 convolution over points and channels."""
    gathered = gather_by(path)(features, points, 1, False)
    return torch.einsum("opc,npchw->nohw", weight.flatten(2).mT, gathered.unflatten(1, (TAPS, -1)))


def dynamic_result(path: str, features: Tensor, points: Tensor, weight: Tensor) -> Tensor:
    """A 1x1 convolution makes channels for each tap; each point collects its own, summed."""
    own = weight.flatten(2).permute(2, 0, 1).flatten(0, 1)
    maps = torch.nn.functional.conv2d(features, own[:, :, None, None])
    return gather_by(path)(maps, points, TAPS, True)


def value_and_gradients(result: Tensor, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    return [result, *torch.autograd.grad(result, inputs, grad)]


@both_paths
@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ours", [deformable_result, dynamic_result])
def test_is_deformable_convolution(
    ours: Callable[..., Tensor], size: tuple[int, int], channels_last: bool, path: str
) -> None:
    case = problem(size)
    inputs = [tensor.requires_grad_() for tensor in case[:3]]
    features = inputs[0]
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    got = value_and_gradients(ours(path, features, *inputs[1:]), inputs, case.grad)
    want = value_and_gradients(torchvision_result(*inputs), inputs, case.grad)
    assert want[2].abs().max() > 0.1  # the points have gradients to compare
    for ours_, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-12, atol=1e-12)


@both_paths
def test_ordinary_convolution_at_the_taps_of_its_own(path: str) -> None:
    """Undisplaced points give the 3x3 convolution, whose border is zero as well."""
    case = problem((7, 9))
    taps = torch.tensor([(k % 3 - 1.0, k // 3 - 1.0) for k in range(TAPS)]).double()
    points = (own_cells((7, 9)) + taps[:, :, None, None]).expand(2, -1, -1, -1, -1)
    want = torch.nn.functional.conv2d(case.features, case.weight, padding=1)
    for ours in (deformable_result, dynamic_result):
        torch.testing.assert_close(ours(path, case.features, points, case.weight), want)
