# SPDX-License-Identifier: Apache-2.0
"""The convolution over points against torchvision's deformable convolution."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_of_point_gather import both_paths, gather_by, needs_kernel
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torchvision.ops import deform_conv2d

from d2_decouple.layers import point_conv
from d2_decouple.layers.point_conv import deformable_point_conv
from d2_decouple.layers.points import grid_cells

KERNELS = [(3, 3), (1, 1), (1, 5), (5, 1)]
SIZES = [(6, 7), (1, 1), (5, 1), (1, 4)]


def problem(
    kernel: tuple[int, int] = (3, 3),
    size: tuple[int, int] = (6, 7),
    images: int = 2,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Features of 5 channels, points all over the map and a little outside, weight for 4, bias."""
    generator = torch.Generator().manual_seed(0)
    height, width = size

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    share = torch.rand(images, kernel[0] * kernel[1], 2, *size, generator=generator).double()
    made = [
        random(images, 5, *size),
        share * torch.tensor([width + 1.2, height + 1.2])[:, None, None] - 1.1,
        random(4, 5, *kernel),
        random(4),
    ]
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def by_torchvision(features: Tensor, points: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Its offsets are (y, x), from where an ordinary convolution would read for each tap."""
    kernel, size = weight.shape[-2:], points.shape[-2:]
    cells = grid_cells(tuple(size), device=points.device, dtype=points.dtype)
    taps = grid_cells(tuple(kernel), device=points.device, dtype=points.dtype)
    taps = taps - taps.new_tensor([kernel[1] // 2, kernel[0] // 2])
    offsets = points - cells.T.reshape(2, *size) - taps[:, :, None, None]
    padding = (kernel[0] // 2, kernel[1] // 2)
    return deform_conv2d(features, offsets.flip(2).flatten(1, 2), weight, bias, padding=padding)


def value_and_gradients(result: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    return [result, *torch.autograd.grad(result, inputs, grad.to(result.dtype))]


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    gather = gather_by(request.param)
    monkeypatch.setattr(
        point_conv, "deformable_point_gather", lambda maps, points: gather(maps, points, 1, False)
    )


by_both_paths = pytest.mark.parametrize("path", both_paths.args[1], indirect=True)


@by_both_paths
@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_is_deformable_convolution(kernel: tuple[int, int], size: tuple[int, int]) -> None:
    inputs = problem(kernel, size)
    got = value_and_gradients(deformable_point_conv(*inputs), inputs)
    want = value_and_gradients(by_torchvision(*inputs), inputs)
    assert want[2].abs().max() > 0.1  # the points have gradients to compare
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@by_both_paths
@pytest.mark.usefixtures("path")
def test_gradients_are_those_of_differences() -> None:
    """Also where not everything is trained."""
    inputs = problem(size=(2, 3), images=1)
    assert torch.autograd.gradcheck(deformable_point_conv, inputs)
    for frozen in inputs:
        frozen.requires_grad_(False)
        assert torch.autograd.gradcheck(deformable_point_conv, inputs)
        frozen.requires_grad_(True)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 9, 10])
def test_parts_are_invisible(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine points in parts as large as each other, and not; more parts than points, too."""
    inputs = problem()
    want = value_and_gradients(deformable_point_conv(*inputs), inputs)
    monkeypatch.setattr(point_conv, "_PARTS", parts)
    for one, other in zip(
        value_and_gradients(deformable_point_conv(*inputs), inputs), want, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_result_is_channels_last(layout: torch.memory_format) -> None:
    features, *others = problem()
    result = deformable_point_conv(features.contiguous(memory_format=layout), *others)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(result, deformable_point_conv(features, *others))


def test_empty_batch_has_gradients() -> None:
    inputs = problem(images=0)
    result = deformable_point_conv(*inputs)
    assert result.shape == (0, 4, 6, 7)
    features, points, weight, bias = torch.autograd.grad(result.sum(), inputs)
    assert features.shape == (0, 5, 6, 7)
    assert points.shape == (0, 9, 2, 6, 7)
    assert not weight.any()
    assert not bias.any()


def test_no_locations_have_gradients() -> None:
    features, points, weight, bias = problem()
    inputs = [features, points[..., :0, :], weight, bias]
    result = deformable_point_conv(*inputs)
    assert result.shape == (features.shape[0], 4, 0, 7)
    assert not any(x.any() for x in torch.autograd.grad(result.sum(), [features, weight, bias]))


def test_backward_inside_autocast_keeps_its_dtypes() -> None:
    inputs = problem(dtype=torch.float32)
    want = torch.autograd.grad(deformable_point_conv(*inputs).sum(), inputs)
    result = deformable_point_conv(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(result.sum(), inputs)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_output_may_have_another_size_than_the_features() -> None:
    features, points, weight, bias = problem()
    some = points[..., 1:5, 2:4]
    want = deformable_point_conv(features, points, weight, bias)[..., 1:5, 2:4]
    torch.testing.assert_close(deformable_point_conv(features, some, weight, bias), want)


def test_points_outside_and_not_a_number_read_zero() -> None:
    features, _, weight, bias = problem()
    for place in (-1.0, 50.0, 1e9, float("nan"), float("inf")):
        points = torch.full((2, 9, 2, 6, 7), place, dtype=torch.float64)
        result = deformable_point_conv(features, points, weight, bias)
        assert torch.equal(result, bias[:, None, None].expand_as(result))


@by_both_paths
@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_a_convolution_of_exact_points(dtype: torch.dtype) -> None:
    """Coordinates up to 300 cells: half precision would be off by a cell."""
    inputs = problem(size=(3, 300), images=1, dtype=torch.float32)
    want = value_and_gradients(deformable_point_conv(*inputs), inputs)
    with torch.autocast("cpu", dtype=dtype):
        result = deformable_point_conv(*inputs)
    got = value_and_gradients(result, inputs)
    assert result.dtype == dtype
    for ours, exact in zip(got, want, strict=True):
        assert ours.dtype == exact.dtype or ours is result
        # A few roundings of terms of the size of the largest value.
        error = (ours.float() - exact).abs().max() / exact.abs().max()
        assert 0 < error < 4 * torch.finfo(dtype).eps


@needs_kernel
def test_a_second_derivative_is_refused() -> None:
    inputs = problem(size=(2, 2))
    grads = torch.autograd.grad(deformable_point_conv(*inputs).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grads[0].square().sum(), inputs[2])


def test_compiles_as_one_graph() -> None:
    inputs = problem(dtype=torch.float32)
    compiled = torch.compile(deformable_point_conv, fullgraph=True, backend="aot_eager")
    got = value_and_gradients(compiled(*inputs), inputs)
    want = value_and_gradients(deformable_point_conv(*inputs), inputs)
    for ours, eager in zip(got, want, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"),
    reason=f"torch {torch.__version__} cannot tell that it exports",
)
def test_exported_program_has_no_operator_of_its_own() -> None:
    class Module(torch.nn.Module):
        def forward(self, features: Tensor, points: Tensor, weight: Tensor) -> Tensor:
            return deformable_point_conv(features, points, weight)

    inputs = tuple(tensor.detach() for tensor in problem(dtype=torch.float32)[:3])
    sizes = {name: torch.export.Dim(name, min=2, max=500) for name in ("rows", "columns")}
    shapes = (
        {2: sizes["rows"], 3: sizes["columns"]},
        {3: sizes["rows"], 4: sizes["columns"]},
        None,
    )
    program = torch.export.export(Module(), inputs, dynamic_shapes=shapes, strict=True)
    assert "d2_decouple" not in str(program.graph)
    other = tuple(tensor.detach() for tensor in problem(size=(9, 4), dtype=torch.float32)[:3])
    torch.testing.assert_close(program.module()(*other), deformable_point_conv(*other))


def test_what_was_gathered_is_not_kept() -> None:
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    features, points, weight, _ = problem(size=(40, 40), dtype=torch.float32)
    features, weight = (torch.cat([one] * 16, dim=1) for one in (features, weight))
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = deformable_point_conv(features, points, weight)
    assert result.requires_grad
    gathered = 9 * features.nbytes
    assert features.nbytes < sum(kept.values()) < 0.75 * gathered


MEASURE = """
import torch
from helpers_of_point_gather import peak_growth
from d2_decouple.benchmarks import gather

gather._SIZES, gather._CHANNELS = ((64, 64),), 128
torch.set_num_threads(1)
for ours in (True, False):
    step = gather._salt(ours, "cpu")
    step()
    print(peak_growth(step))
"""


@needs_kernel
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak of memory to read")
def test_peak_memory_is_below_that_of_deform_conv2d() -> None:
    """Forward and backward, in a process whose allocator gives back what is freed."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(paths), "MALLOC_MMAP_THRESHOLD_": str(2**17)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = map(int, done.stdout.split())
    columns = 9 * 128 * 64 * 64 * 4
    assert theirs > columns
    assert ours < 0.95 * theirs


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            [(2, 5, 6, 7), (2, 8, 2, 6, 7), (4, 5, 3, 3)],
            r"points have shape \(2, 8, 2, 6, 7\); wanted is \(N, 9, 2, Ho, Wo\).*3x3 weight",
        ),
        ([(2, 5, 6, 7), (2, 9, 6, 7), (4, 5, 3, 3)], r"points have shape \(2, 9, 6, 7\)"),
        ([(2, 5, 6, 7), (2, 9, 3, 6, 7), (4, 5, 3, 3)], r"points have shape \(2, 9, 3, 6, 7\)"),
        (
            [(2, 6, 6, 7), (2, 9, 2, 6, 7), (4, 5, 3, 3)],
            r"features have shape \(2, 6, 6, 7\); wanted is \(N, 5, H, W\).*\(4, 5, 3, 3\)",
        ),
        ([(5, 6, 7), (2, 9, 2, 6, 7), (4, 5, 3, 3)], r"features have shape \(5, 6, 7\)"),
        (
            [(2, 5, 6, 7), (2, 9, 2, 6, 7), (4, 45)],
            r"weight has shape \(4, 45\); wanted is \(out, C, kh, kw\)",
        ),
        ([(2, 5, 6, 7), (2, 0, 2, 6, 7), (4, 5, 0, 3)], r"weight has shape \(4, 5, 0, 3\)"),
        ([(2, 5, 6, 7), (1, 9, 2, 6, 7), (4, 5, 3, 3)], r"of 1 images, maps of 2"),
        (
            [(2, 5, 6, 7), (2, 9, 2, 6, 7), (4, 5, 3, 3), (4, 1)],
            r"bias has shape \(4, 1\); wanted is \(4,\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(shapes: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        deformable_point_conv(*(torch.zeros(shape) for shape in shapes))


def test_half_points_are_refused_outside_autocast() -> None:
    features, points, weight, _ = problem(dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"points are (torch.b|B)[fF]loat16; wanted is"):
        deformable_point_conv(features, points.bfloat16(), weight)
