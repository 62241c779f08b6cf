# SPDX-License-Identifier: Apache-2.0
"""What PyTorch must know of the gather: derivatives, shapes, autocast."""

import itertools

import pytest
import torch
from helpers_of_point_gather import (
    GROUPS_AND_SUM,
    Case,
    both_paths,
    gather_by,
    make_case,
    needs_kernel,
)
from torch import Tensor

from d2_decouple.layers.point_gather import (
    deformable_point_gather,
    dynamic_point_gather,
)

every_layout = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "channels_last"]
)


def away_from_whole_numbers(case: Case) -> Case:
    """A derivative by differences needs both sides: keep inside and outside, but no kink."""
    generator = torch.Generator().manual_seed(5)
    whole = case.points.nan_to_num(-3).clamp(-3, 7).floor()
    part = 0.1 + 0.8 * torch.rand(whole.shape, generator=generator, dtype=whole.dtype)
    return case._replace(points=whole + part)


@both_paths
@every_layout
@pytest.mark.parametrize(("own_channels", "sum_points"), GROUPS_AND_SUM)
def test_gradcheck(
    own_channels: bool, sum_points: bool, layout: torch.memory_format, path: str
) -> None:
    case = away_from_whole_numbers(
        make_case(own_channels=own_channels, sum_points=sum_points, out_size=(2, 3), share=2)
    )

    def function(maps: Tensor, points: Tensor) -> Tensor:
        maps = maps.contiguous(memory_format=layout)
        return gather_by(path)(maps, points, case.groups, sum_points)

    inputs = [t.clone().requires_grad_() for t in case[:2]]
    assert torch.autograd.gradcheck(function, inputs)


OPCHECKS = [
    *("test_schema", "test_autograd_registration", "test_faketensor"),
    *("test_aot_dispatch_static", "test_aot_dispatch_dynamic"),
]


def channels_last_points(points: Tensor) -> Tensor:
    """As a channels-last convolution writes them: (x, y) innermost."""
    flat = points.flatten(1, 2).contiguous(memory_format=torch.channels_last)
    return flat.unflatten(1, points.shape[1:3])


@needs_kernel
@every_layout
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("own_channels", "sum_points"), GROUPS_AND_SUM)
def test_opcheck(
    own_channels: bool, sum_points: bool, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    case = make_case(own_channels=own_channels, sum_points=sum_points, dtype=dtype)
    maps = case.maps.contiguous(memory_format=layout)
    points = channels_last_points(case.points)
    for wanted in ((True, True), (True, False), (False, True), (False, False)):
        inputs = [t.detach().requires_grad_(w) for t, w in zip((maps, points), wanted, strict=True)]
        torch.library.opcheck(
            torch.ops.d2_decouple.point_gather.default,
            (*inputs, case.groups, sum_points),
            test_utils=OPCHECKS if all(wanted) else OPCHECKS[:3],
        )


@needs_kernel
@every_layout
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck_of_the_backward(dtype: torch.dtype, layout: torch.memory_format) -> None:
    operator = torch.ops.d2_decouple._point_gather_backward.default
    for (own_channels, sum_points), *mask in itertools.product(
        GROUPS_AND_SUM, [True, False], [True, False]
    ):
        case = make_case(own_channels=own_channels, sum_points=sum_points, dtype=dtype)
        maps = case.maps.contiguous(memory_format=layout)
        points = channels_last_points(case.points)
        for grad in (case.grad, case.grad[:1, :1, :1, :1].expand_as(case.grad)):
            torch.library.opcheck(
                operator,
                (grad, maps, points, case.groups, sum_points, mask),
                test_utils=OPCHECKS if all(mask) and grad is case.grad else OPCHECKS[:3],
            )


ODD = [
    *(dict(images=0), dict(size=(0, 3)), dict(num_points=0), dict(share=0), dict(out_size=(0, 2))),
    *(dict(share=1), dict(share=1, num_points=1), dict(size=(1, 1), out_size=(1, 1))),
    *(dict(images=1, out_size=(1, 4)), dict(size=(5, 1), out_size=(3, 1))),
]


@needs_kernel
@every_layout
@pytest.mark.parametrize("kind", ODD, ids=str)
def test_opcheck_of_odd_sizes(kind: dict[str, int], layout: torch.memory_format) -> None:
    """An axis of length 0 or 1 may have any stride; the compiler is told one."""
    for own_channels, sum_points in GROUPS_AND_SUM:
        case = make_case(own_channels=own_channels, sum_points=sum_points, **kind)  # type: ignore[arg-type]
        maps = case.maps.contiguous(memory_format=layout)
        for of in (maps, maps.mT.contiguous().mT):
            inputs = [t.detach().requires_grad_() for t in (of, case.points)]
            options = (case.groups, sum_points)
            forward = torch.ops.d2_decouple.point_gather.default
            backward = torch.ops.d2_decouple._point_gather_backward.default
            given = (case.grad, of, case.points, *options, [True, True])
            torch.library.opcheck(forward, (*inputs, *options), test_utils=OPCHECKS[:3])
            torch.library.opcheck(backward, given, test_utils=OPCHECKS[:3])


@needs_kernel
@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)])
def test_no_second_derivative(which: tuple[bool, bool]) -> None:
    case = make_case(sum_points=True)
    inputs = [t.detach().requires_grad_(w) for t, w in zip(case[:2], which, strict=True)]
    asked = [t for t in inputs if t.requires_grad]
    values = dynamic_point_gather(inputs[0], inputs[1], "sum")
    grads = torch.autograd.grad(values.square().sum(), asked, create_graph=True)
    with pytest.raises(RuntimeError, match="point_gather has no second derivative") as raised:
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), asked)
    assert "create_graph=True" in str(raised.value)


def test_autocast_takes_half_points_as_float() -> None:
    """Points that a half-precision convolution made are read as float32; maps stay half."""
    case = make_case(dtype=torch.bfloat16)
    points = case.points.nan_to_num(0, 0, 0).clamp(-9, 9).bfloat16()
    for public, groups in ((dynamic_point_gather, 3), (deformable_point_gather, 1)):
        maps = case.maps.detach().requires_grad_()
        half = points.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            values = public(maps, half)
        assert values.dtype == torch.bfloat16
        want = gather_by("reference")(case.maps, points.float(), groups, False)
        torch.testing.assert_close(values, want)
        values.float().sum().backward()
        assert maps.grad is not None
        assert maps.grad.dtype == torch.bfloat16
        assert half.grad is not None
        assert half.grad.dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="half precision is too coarse for coordinates"):
            public(maps, half)  # without autocast somebody else's mistake stays one


def test_autocast_leaves_other_types_alone() -> None:
    for dtype in (torch.float32, torch.float64, torch.float16):
        case = make_case(dtype=dtype, sum_points=True)
        want = dynamic_point_gather(case.maps, case.points, "sum")
        with torch.autocast("cpu", torch.bfloat16):
            got = dynamic_point_gather(case.maps, case.points, "sum")
        assert got.dtype == dtype
        assert got.equal(want)
