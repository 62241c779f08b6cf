# SPDX-License-Identifier: Apache-2.0
"""The scripts that the tests of golden numbers need; neither is part of the package."""

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

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
