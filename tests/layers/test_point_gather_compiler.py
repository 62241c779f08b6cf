# SPDX-License-Identifier: Apache-2.0
"""Compiling and exporting what gathers points: one graph, and the same numbers."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers_of_point_gather import both_paths, needs_kernel, pretend
from torch import Tensor, nn
from util import environment

from d2_decouple.layers.point_gather import deformable_point_gather, dynamic_point_gather

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Both(nn.Module):
    """A small head: convolutions make points and maps for both functions."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Conv2d(4, 18, 1)
        self.maps = nn.Conv2d(4, 27, 1, bias=False)
        self.merge = nn.Conv2d(36, 2, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, 4, H, W) -> summed (N, 3, H, W) and merged (N, 2, H, W)."""
        y, x = (torch.arange(n, device=features.device) for n in features.shape[-2:])
        cells = torch.stack(torch.meshgrid(x, y, indexing="xy"))
        points = self.points(features).unflatten(1, (9, 2)).float() + cells
        summed = dynamic_point_gather(self.maps(features), points, "sum")
        return summed, self.merge(deformable_point_gather(features, points))


def results(model: Callable[..., tuple[Tensor, ...]], features: Tensor) -> list[Tensor]:
    """Both results, and the gradient of the input."""
    features = features.detach().requires_grad_()
    summed, merged = model(features)
    (grad,) = torch.autograd.grad(summed.float().square().sum() + merged.float().sum(), features)
    return [summed, merged, grad]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def path_in_use(path: str, monkeypatch: pytest.MonkeyPatch) -> str:
    if path == "reference":
        pretend(monkeypatch, cpu=False, cuda=False, reason="taken away by a test")
    return path


@both_paths
@pytest.mark.usefixtures("path_in_use")
@pytest.mark.parametrize(
    ("layout", "autocast", "dynamic"),
    [
        (torch.contiguous_format, False, False),
        (torch.channels_last, False, True),
        (torch.contiguous_format, True, True),
        (torch.channels_last, True, False),
    ],
)
def test_compiles_as_one_graph(layout: torch.memory_format, autocast: bool, dynamic: bool) -> None:
    model = Both().to(memory_format=layout)
    # Under autocast three gradients of the features are added in bfloat16, in either order.
    close = dict(rtol=0.05, atol=0.05) if autocast else dict(rtol=1e-5, atol=1e-5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for size in ((5, 6), (4, 7)) if dynamic else ((5, 6),):
            features = torch.randn(2, 4, *size).to(memory_format=layout)
            pairs = zip(results(compiled, features), results(model, features), strict=True)
            for got, want in pairs:
                torch.testing.assert_close(got, want, **close)
                assert got.stride() == want.stride()


@needs_kernel
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_graph_holds_the_operators(dynamic: bool) -> None:
    """The kernel is called from what was compiled, forward and backward."""
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        from torch._dynamo.backends.common import aot_autograd

        def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
            seen.extend(str(node.target) for node in graph.graph.nodes)
            return graph.forward

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(graph, inputs)

    compiled = torch.compile(Both(), fullgraph=True, backend=backend, dynamic=dynamic)
    results(compiled, torch.randn(2, 4, 5, 6))
    assert seen.count("d2_decouple.point_gather.default") == 2
    assert seen.count("d2_decouple._point_gather_backward.default") == 2
    assert not [name for name in seen if "grid_sampler" in name]


# In a process of its own: a compiler warns once in each.
QUIETLY = """
import torch
from d2_decouple.layers.point_gather import dynamic_point_gather
function = torch.compile(
    lambda maps, points: dynamic_point_gather(maps, points, "sum"),
    fullgraph=True, backend={backend!r},
)
maps = torch.randn(2, 27, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
points = (7 * torch.rand(2, 9, 2, 5, 6) - 1).requires_grad_()
results = []
for call in (function, lambda maps, points: dynamic_point_gather(maps, points, "sum")):
    values = call(maps, points)
    results.append([values, *torch.autograd.grad(values.square().sum(), (maps, points))])
for got, want in zip(*results):
    torch.testing.assert_close(got, want)
    assert got.stride() == want.stride()
print("equal")
"""


def test_compiles_without_a_warning_of_ours() -> None:
    """By inductor where it can, which needs a C++ compiler."""
    backend = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", QUIETLY.format(backend=backend)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "equal\n", done.stderr
    assert "d2_decouple" not in done.stderr, done.stderr


needs_export_to_be_told = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"),
    reason=f"torch {torch.__version__} cannot tell that it exports",
)


@needs_export_to_be_told
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_exported_program_needs_no_extension(dynamic: bool) -> None:
    """It holds grid_sample in place of the operator, and gives the same numbers."""
    model = Both().eval()
    features = torch.randn(2, 4, 5, 6)
    names = dict(enumerate(("batch", None, "height", "width")))
    shapes = {i: torch.export.Dim(name, min=2, max=64) for i, name in names.items() if name}
    program = torch.export.export(
        model, (features,), dynamic_shapes={"features": shapes} if dynamic else None
    )
    called = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert not [name for name in called if "d2_decouple" in name]
    assert len([name for name in called if "grid_sampler" in name]) == 2
    for size in ((2, 4, 5, 6), (3, 4, 9, 4)) if dynamic else ((2, 4, 5, 6),):
        features = torch.randn(size)
        with torch.no_grad():
            for got, want in zip(program.module()(features), model(features), strict=True):
                torch.testing.assert_close(got, want)


@needs_export_to_be_told
@needs_kernel
def test_export_leaves_the_kernel_in_use() -> None:
    """Exporting changes what is exported, and no call after it."""
    model = Both().eval()
    torch.export.export(model, (torch.randn(2, 4, 5, 6),))
    with torch.profiler.profile() as profile, torch.no_grad():
        model(torch.randn(2, 4, 5, 6))
    assert [e for e in profile.key_averages() if e.key == "d2_decouple::point_gather"]
