# SPDX-License-Identifier: Apache-2.0
"""Golden numbers of PDNet: small cases made by plain loops, and that nothing wrong passes."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_pdnet_cases import write_infer_case, write_loss_case
from golden_pdnet_head import PREFIX, write_head_case
from golden_tools import PUBLIC_CASES, TOOL, change_entry, load
from torch import Tensor

from d2_decouple.modeling import GIoUTerm, HardNMS, PDNetAssigner, clip_to_image

WRITERS: dict[str, Callable[[Path], Path]] = {
    "pdnet_head": write_head_case,
    "pdnet_loss": write_loss_case,
    "pdnet_infer": write_infer_case,
}


@pytest.fixture(scope="module")
def golden() -> Any:
    return load(TOOL)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("golden")
    return {kind: writer(folder) for kind, writer in WRITERS.items()}


def exceeded(golden: Any, path: Path) -> set[str]:
    """Outputs that do not meet their tolerance, in either precision, or have another shape."""
    case = golden.load_case(path)
    try:
        rows = golden.verify(case)
    except golden.GoldenError as error:
        return {name for name in case.outputs if f"{name!r} shall have shape" in str(error)}
    return {row.output.split()[0] for row in rows if not row.share <= 1}


@pytest.mark.parametrize("kind", WRITERS)
def test_right_case_passes(golden: Any, cases: dict[str, Path], kind: str) -> None:
    assert exceeded(golden, cases[kind]) == set()
    case = golden.load_case(cases[kind])
    assert all(golden.ADAPTERS[kind].left_out(name) is None for name in case.outputs)


@pytest.mark.parametrize("kind", WRITERS)
def test_changed_number_is_noticed(
    golden: Any, cases: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """One number of each output in turn, by a thousandth, or by one where it counts."""
    path = cases[kind]
    with np.load(path.with_suffix(".npz")) as stored:
        arrays = {name: stored[name] for name in stored.files}
    changed = tmp_path / path.name
    changed.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    case = golden.load_case(path)
    results = {
        dtype: golden.ADAPTERS[kind].run(case, getattr(torch, dtype))
        for dtype in ("float32", "float64")
    }
    for name in [name for name in case.outputs if arrays[f"out/{name}"].size]:
        wrong = arrays[f"out/{name}"].copy()
        wrong.flat[-1] += 1 if wrong.dtype.kind == "i" else 1e-3 * (1 + abs(wrong.flat[-1]))
        for dtype, found in results.items():
            tolerance = case.outputs[name]["tolerance"][dtype]
            row = golden.measure(name, found[name].detach().numpy(), wrong, tolerance)
            assert row.share > 1, f"{name} {dtype}"


def test_first_wrong_output_is_printed(
    golden: Any, cases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_infer_case(tmp_path)
    with np.load(path.with_suffix(".npz")) as stored:
        arrays = {name: stored[name] for name in stored.files}
    arrays["out/num_after_nms"][0] += 1
    np.savez(path.with_suffix(".npz"), **arrays)
    assert golden.main([str(tmp_path)]) == 1
    lines = [x for x in capsys.readouterr().out.splitlines() if x.endswith("EXCEEDED")]
    assert [line.split()[0] for line in lines] == ["num_after_nms"] * 2


# What a package that counts otherwise would give.


def plain_clamp(offsets: Tensor, limit: Tensor) -> Tensor:
    """Right for upright boxes alone."""
    return torch.maximum(torch.minimum(offsets, limit), -limit)


WRONG: dict[str, tuple[str, str, Any, str, set[str]]] = {
    # module, name, what is there instead, kind, outputs among those that must not pass
    "sides not swapped": (
        "golden_adapters.pdnet",
        "_swapped",
        lambda values, dim, size=1: values,
        "pdnet_head",
        {"coarse_box/p3", "reg_box/p3", "bound_pt/p3", "semantic_pt/p3"},
    ),
    "plain clamp": (
        "d2_decouple.modeling.dynamic_points",
        "_limited",
        plain_clamp,
        "pdnet_head",
        {"bound_pt/p3", "reg_box/p3"},
    ),
    "no + 1 in matching": (
        "golden_adapters.pdnet",
        "PDNetAssigner",
        lambda **settings: PDNetAssigner(**{**settings, "side_offset": 0.0}),
        "pdnet_loss",
        {"pos_index"},
    ),
    "no + 1 in the loss": (
        "golden_adapters.pdnet",
        "GIoUTerm",
        lambda **settings: GIoUTerm(**{**settings, "smoothing": 0.0}),
        "pdnet_loss",
        {"loss_crs", "loss_reg"},
    ),
    "no + 1 in suppression": (
        "golden_adapters.pdnet",
        "HardNMS",
        lambda **settings: HardNMS(**{**settings, "side_offset": 0.0}),
        "pdnet_infer",
        {"num_after_nms"},
    ),
    "cut to the image's size": (
        "golden_adapters.pdnet",
        "legacy_clip",
        clip_to_image,
        "pdnet_infer",
        {"boxes/0"},
    ),
    "labels from 0": (
        "golden_adapters.pdnet",
        "_their_labels",
        lambda labels, num_classes: labels,
        "pdnet_loss",
        {"labels"},
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_other_conventions_do_not_pass(
    golden: Any, cases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    module, name, instead, kind, noticed = WRONG[mistake]
    monkeypatch.setattr(sys.modules[module], name, instead)
    assert exceeded(golden, cases[kind]) >= noticed


PUBLIC_WRONG = {
    "slides that do not learn": ("BoundaryPoints", {"grad_dyn_bias_from/reg_box"}),
    "semantic points that do not learn": ("SemanticPoints", {"grad_dyn_bias_from/logits"}),
}


@pytest.mark.parametrize("mistake", PUBLIC_WRONG)
def test_gradients_are_compared(golden: Any, monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    """On the public case: the loops know no gradients of points."""
    path = PUBLIC_CASES / "pdnet_head_a.json"
    if not path.is_file():
        pytest.skip(f"no reference cases at {PUBLIC_CASES}; they are not part of a release")
    adapters = sys.modules["golden_adapters.pdnet"]
    name, noticed = PUBLIC_WRONG[mistake]
    kind = getattr(adapters, name)

    class Stopped(kind):  # type: ignore[valid-type, misc]
        def __call__(self, cells: Tensor, coarse: Tensor, offsets: Tensor) -> Tensor:
            return super().__call__(cells, coarse, offsets.detach())

    monkeypatch.setattr(adapters, name, Stopped)
    found = exceeded(golden, path)
    assert found >= noticed
    assert not any(output.startswith(("coarse_box", "reg_box", "logits")) for output in found)


# What cannot be compared says so.


def test_settings_without_counterpart_are_refused(golden: Any, tmp_path: Path) -> None:
    for writer, key, value, kind in (
        (write_loss_case, "neg_iou", 0.4, "pdnet_loss"),
        (write_loss_case, "num_gpus", 2, "pdnet_loss"),
        (write_infer_case, "min_size", 5, "pdnet_infer"),
    ):
        path = writer(tmp_path)
        change_entry(path, ["config", key], value)
        with pytest.raises(golden.GoldenError, match=rf"{kind}_small.*'{key}' is {value}"):
            golden.verify(golden.load_case(path))


def test_unknown_parameter_is_refused(golden: Any, cases: dict[str, Path]) -> None:
    case = golden.load_case(cases["pdnet_head"])
    more = replace(case, weight_entries=[*case.weight_entries, [f"{PREFIX}dreams", [1], 1, 0]])
    with pytest.raises(golden.GoldenError, match=r"dreams.*dyn_pt_pred"):
        golden.verify(more)
    fewer = replace(case, weight_entries=case.weight_entries[1:])
    with pytest.raises(golden.GoldenError, match=r"(?s)cannot be run.*point_pred\.weight"):
        golden.verify(fewer)
