# SPDX-License-Identifier: Apache-2.0
"""Writing an :class:`~.graph.ExportableDetector` into a file of one of three kinds."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torchvision.ops import DeformConv2d

from ..modeling.pyramid import BalancedFeatures
from ..runtime.model import DESCRIPTION
from .description import ExportError
from .graph import ExportableDetector
from .translations import FreeSizes, translations

__all__ = ["FORMATS", "LEAST_OPSET", "check_format", "export_file", "traced"]

LEAST_OPSET = 18
_DEFORMABLE_OPSET = 19
# Of the example image: no level of any pyramid has one cell in a direction, nor as many as another.
_EXAMPLE = (2, 3, 300, 450)
# Of another size in each direction; TSCODE's coarsest maps still have more than one cell in each,
# since the trace takes maps of one cell for another case.
_OTHER_EXAMPLE = (3, 3, 390, 290)
_DEFORMABLE_RUNTIME = "onnxruntime 1.25 or newer"
_EXTRAS = ("onnx", "onnxscript")
# Older exporters write files that onnxruntime refuses, or none.
_LEAST_TORCH = (2, 10)


def traced(
    graph: ExportableDetector,
    *,
    fixed_size: tuple[int, int] | None = None,
    guarded: bool = True,
) -> Any:
    """The graph as a ``torch.export.ExportedProgram``.

    Args:
        graph: what to trace.
        fixed_size: (H, W) of the only images that it shall take, one at a time; by default any
            number of images of any one size.
        guarded: refuse also what the program itself would refuse at another size.

    Raises:
        ExportError: the model can be traced for one size only, since it computes in Python with
            the sizes of its maps.
    """
    example = torch.zeros(_EXAMPLE if fixed_size is None else (1, 3, *fixed_size))
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    # Not under grad mode: the graph would be told to switch it off and on.
    with torch.no_grad():
        if fixed_size is not None:
            return torch.export.export(graph, (example,), strict=False)
        try:
            program = torch.export.export(
                graph, (example,), dynamic_shapes={"image": free}, strict=False
            )
            _compare_elsewhere(graph, program, guarded=guarded)
        except (torch._dynamo.exc.UserError, AssertionError) as error:
            raise ExportError(_size_needed(graph, error)) from error
    return program


def _compare_elsewhere(
    graph: ExportableDetector, program: torch.export.ExportedProgram, *, guarded: bool
) -> None:
    """Raise AssertionError unless a program answers what its graph does at another size.

    What was assumed of the sizes is guarded in a program, and lost in an ONNX file. Some is always
    true of the answers: a map that is cut to its own size stays what it is.
    """
    images = 255 * torch.rand(_OTHER_EXAMPLE, generator=torch.Generator().manual_seed(0))
    try:
        found = program.module(check_guards=guarded)(images)
    except (RuntimeError, IndexError) as error:  # maps or tables that do not fit each other
        raise AssertionError(str(error)) from error
    torch.testing.assert_close(found, graph(images), rtol=1e-3, atol=1e-3)


def _size_needed(graph: ExportableDetector, error: Exception) -> str:
    pyramid = graph.backbone
    network = getattr(pyramid, "bottom_up", getattr(pyramid, "net", pyramid))
    return (
        f"{type(network).__name__}, or the head above it, computes with the sizes of its maps, so "
        "that a file traced with one size of images is wrong for others "
        f"({str(error).splitlines()[0]}); type --size H W, the size of images after resizing"
    )


def check_format(kind: str, file: Path) -> None:
    """Raise :class:`ExportError` for a kind that there is not, or a name that it cannot have."""
    if kind not in FORMATS:
        raise ExportError(f"--format is {kind!r}; wanted is one of {', '.join(FORMATS)}")
    if kind == "aoti" and not str(file).endswith(".pt2"):
        raise ExportError(
            f"--format aoti writes a package, whose name must end in .pt2, and --output is {file}; "
            f"type --output {file.parent / file.stem}.pt2"
        )


def export_file(
    graph: ExportableDetector,
    description: Mapping[str, Any],
    file: Path,
    *,
    kind: str = "onnx",
    opset: int = LEAST_OPSET,
    fixed_size: tuple[int, int] | None = None,
) -> None:
    """Write a graph and its description into a file.

    Args:
        graph: of :func:`~.graph.exportable`.
        description: of :func:`~.description.describe`.
        file: is replaced.
        kind: one of ``FORMATS``.
        opset: of ONNX.
        fixed_size: as in :func:`traced`.

    Raises:
        ExportError: an unknown kind, a name that it cannot have, an opset that is too old or that
            the exporter does not write, packages that are missing, or an operator of the model
            that the kind does not have.
    """
    check_format(kind, file)
    if opset < LEAST_OPSET:
        raise ExportError(f"--opset is {opset}; wanted is {LEAST_OPSET} or newer")
    if kind != "onnx" and graph.nms_inside:
        raise ExportError(
            f"--format {kind} has no suppression inside, which is an operator of ONNX; type "
            "--nms outside"
        )
    if kind == "onnx":
        _require_extras()
        _require_operators(graph, opset)
    elif fixed_size is None and any(isinstance(x, BalancedFeatures) for x in graph.modules()):
        raise ExportError(
            f"--format {kind} has no pooling to a size that is not known before, which the "
            "backbone's BFP needs; type --size H W, the size of images after resizing"
        )
    _require_torch()
    with FreeSizes() if kind == "onnx" else nullcontext():
        program = traced(graph, fixed_size=fixed_size, guarded=kind != "onnx")
    FORMATS[kind](program, graph, description, file, opset)


def _require_torch() -> None:
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _LEAST_TORCH:
        least = ".".join(map(str, _LEAST_TORCH))
        raise ExportError(
            f"the export needs torch {least} or newer, and this is {torch.__version__}; type: "
            f"pip install 'torch>={least}' torchvision"
        )


def _require_extras() -> None:
    missing = [name for name in _EXTRAS if find_spec(name) is None]
    if missing:
        raise ExportError(
            f"for an ONNX file {' and '.join(missing)} must be installed; type: pip install "
            f"{' '.join(missing)} onnxruntime"
        )


def _require_operators(graph: ExportableDetector, opset: int) -> None:
    deformable = any(isinstance(module, DeformConv2d) for module in graph.modules())
    if deformable and opset < _DEFORMABLE_OPSET:
        raise ExportError(
            f"the model has deformable convolutions, which ONNX has from opset "
            f"{_DEFORMABLE_OPSET} on, and --opset is {opset}; type --opset {_DEFORMABLE_OPSET}. To "
            f"run such a file takes {_DEFORMABLE_RUNTIME}"
        )


def _write_onnx(
    program: Any, graph: ExportableDetector, description: Mapping[str, Any], file: Path, opset: int
) -> None:
    try:
        with _quiet():
            onnx_program: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=["image"],
                output_names=list(graph.output_names),
                custom_translation_table=translations(),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"the model cannot be written as ONNX: {error}") from error
    # What the exporter cannot convert to another opset it leaves as it is, without a word.
    found = onnx_program.model.opset_imports.get("")
    if found != opset:
        raise ExportError(
            f"--opset is {opset}, and PyTorch's exporter made opset {found} of it, so nothing was "
            f"written; type --opset {found}, or install newer packages onnx and onnxscript"
        )
    onnx_program.model.metadata_props[DESCRIPTION] = json.dumps(description)
    onnx_program.save(str(file))


def _write_torch_export(
    program: Any, graph: ExportableDetector, description: Mapping[str, Any], file: Path, opset: int
) -> None:
    torch.export.save(program, file, extra_files={DESCRIPTION: json.dumps(description)})


def _write_aoti(
    program: Any, graph: ExportableDetector, description: Mapping[str, Any], file: Path, opset: int
) -> None:
    torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(file),
        inductor_configs={"aot_inductor.metadata": {DESCRIPTION: json.dumps(description)}},
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says about itself."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


_Writer = Callable[[Any, ExportableDetector, Mapping[str, Any], Path, int], None]
FORMATS: dict[str, _Writer] = {
    "onnx": _write_onnx,
    "torch-export": _write_torch_export,
    "aoti": _write_aoti,
}
"""Kinds of files, and what writes them."""
