# SPDX-License-Identifier: Apache-2.0
"""Golden numbers of the balanced pyramid: a case made by plain loops, the authors', wrong ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from golden_bfp_cases import SIZES, write_case
from golden_tools import PUBLIC_CASES, TOOL, change_entry, exceeded, load, unnoticed

ALL = {f"out/{level}" for level in range(len(SIZES))}
REAL = {name: getattr(F, name) for name in ("interpolate", "scaled_dot_product_attention")}


@pytest.fixture(scope="module")
def golden() -> Any:
    return load(TOOL)


@pytest.mark.parametrize("level", [0, 1, 2, 4])
def test_right_case_passes(golden: Any, tmp_path: Path, level: int) -> None:
    path = write_case(tmp_path, level)
    assert all(row.share <= 1 for row in golden.verify(golden.load_case(path)))
    assert exceeded(golden, path) == set()


def test_the_authors_case_passes(golden: Any) -> None:
    path = PUBLIC_CASES / "bfp_a.json"
    if not path.is_file():
        pytest.skip(f"no reference cases at {PUBLIC_CASES}; they are not part of a release")
    case = golden.load_case(path)
    assert all(row.share <= 1 for row in golden.verify(case))
    assert all(golden.ADAPTERS["bfp"].left_out(name) is None for name in case.outputs)


def test_changed_number_is_noticed(golden: Any, tmp_path: Path) -> None:
    assert unnoticed(golden, write_case(tmp_path)) == []


# What a package that does otherwise would give.

WRONG = {
    "similarities over the root of C": (
        "scaled_dot_product_attention",
        lambda query, key, value, scale: REAL["scaled_dot_product_attention"](query, key, value),
    ),
    "means of windows": ("adaptive_max_pool2d", F.adaptive_avg_pool2d),
    "between the cells": (
        "interpolate",
        lambda x, size: REAL["interpolate"](x, size=size, mode="bilinear"),
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_other_ways_do_not_pass(
    golden: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    path = write_case(tmp_path)
    monkeypatch.setattr(F, *WRONG[mistake])
    assert exceeded(golden, path) == ALL


def test_another_level_does_not_pass(golden: Any, tmp_path: Path) -> None:
    path = write_case(tmp_path)
    change_entry(path, ["config", "refine_level"], 2)
    assert exceeded(golden, path) == ALL


@pytest.mark.parametrize("layer", ["theta", "phi", "g", "conv_out"])
def test_every_weight_counts(golden: Any, tmp_path: Path, layer: str) -> None:
    path = write_case(tmp_path)
    case = golden.load_case(path)
    for entry in case.weight_entries:
        if layer in entry[0] and entry[0].endswith("weight"):
            entry[2] = 0.5  # another scale
    found = golden.ADAPTERS["bfp"].run(case, torch.float64)
    wanted = torch.from_numpy(case.array("out/1", case.outputs["out/1"]))
    assert not torch.allclose(found["out/1"], wanted, rtol=1e-3, atol=1e-3)


# What cannot be compared says so.


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["config", "refine_type"], "conv", r"refine_type is 'conv'; known are \['non_local'\]"),
        (["config", "non_local", "use_scale"], True, r"non_local is .*True.*known is .*False"),
        (["config", "channels"], 5, r"bfp_small.*size mismatch"),
    ],
)
def test_another_kind_is_refused(
    golden: Any, tmp_path: Path, keys: list[str], value: Any, message: str
) -> None:
    path = write_case(tmp_path)
    change_entry(path, keys, value)
    with pytest.raises(golden.GoldenError, match=f"(?s){message}"):
        golden.verify(golden.load_case(path))


def test_unknown_parameter_is_refused(golden: Any, tmp_path: Path) -> None:
    path = write_case(tmp_path)
    case = golden.load_case(path)
    case.weight_entries.append(["dreams.weight", [1], 1.0, 0.0])
    with pytest.raises(golden.GoldenError, match=r"dreams\.weight.*refine\.conv_out"):
        golden.verify(case)
