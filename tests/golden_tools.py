# SPDX-License-Identifier: Apache-2.0
"""The scripts that the tests of golden numbers need; neither is part of the package."""

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "verify_golden.py"
OWN_CASES = ROOT / "tests" / "data" / "golden"
PUBLIC_CASES = ROOT.parent / "shared" / "golden"  # not part of a release


def load(script: Path) -> ModuleType:
    """A script as a module, as it comes when its folder is not on the path."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def change_entry(case: Path, keys: Sequence[str], value: Any) -> None:
    """Put a value into the header of a case, at a path of keys; None deletes what is there."""
    header = json.loads(case.read_text(encoding="utf-8"))
    *parents, last = keys
    node = header
    for parent in parents:
        node = node[parent]
    if value is None:
        del node[last]
    else:
        node[last] = value
    case.write_text(json.dumps(header), encoding="utf-8")


def exceeded(golden: Any, path: Path) -> set[str]:
    """Outputs that do not meet their tolerance, in either precision, or have another shape."""
    case, names = golden.load_case(path), set()
    for dtype in ("float32", "float64"):
        results = golden.ADAPTERS[case.kind].run(case, getattr(torch, dtype))
        for name, entry in case.outputs.items():
            got, want = results[name].detach().numpy(), case.array(name, entry)
            tolerance = entry["tolerance"][dtype]
            if got.shape != want.shape or golden.measure(name, got, want, tolerance).share > 1:
                names.add(name)
    return names


def unnoticed(golden: Any, path: Path) -> list[str]:
    """Outputs whose last number could be another one, by a thousandth, or by one if it counts."""
    case, names = golden.load_case(path), []
    for dtype in ("float32", "float64"):
        found = golden.ADAPTERS[case.kind].run(case, getattr(torch, dtype))
        for name, entry in case.outputs.items():
            wrong = case.array(name, entry).copy()
            if not wrong.size:
                continue
            wrong.flat[-1] += 1 if wrong.dtype.kind == "i" else 1e-3 * (1 + abs(wrong.flat[-1]))
            got, tolerance = found[name].detach().numpy(), entry["tolerance"][dtype]
            if golden.measure(name, got, wrong, tolerance).share <= 1:
                names.append(f"{name} {dtype}")
    return names
