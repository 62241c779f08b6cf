# SPDX-License-Identifier: Apache-2.0
"""The scripts that the tests of golden numbers need; neither is part of the package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

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
