# SPDX-License-Identifier: Apache-2.0
"""What the tests of packaging and of the compiled operators share: a copy that can be built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What .gitignore names: made by tools, no part of the source.
NOT_SOURCE = {
    ".git",
    "__pycache__",
    "build",
    "dist",
    "site",
    "output",
    "datasets",
    "htmlcov",
    "shared",
}
NOT_SOURCE_MARKS = (".venv", ".egg-info", "_cache", ".pyc", ".so", "_C_build.json", ".coverage")
NOT_SOURCE_MARKS += (".hypothesis",)


def source_files() -> list[Path]:
    """Files of the checkout, relative to it."""
    found = []
    for folder, names, files in os.walk(ROOT):
        names[:] = [name for name in names if is_source(name)]
        found += [Path(folder, name).relative_to(ROOT) for name in files if is_source(name)]
    return sorted(found)


def is_source(name: str) -> bool:
    return name not in NOT_SOURCE and not any(mark in name for mark in NOT_SOURCE_MARKS)


def copy_checkout(to: Path) -> Path:
    """A clean copy of the checkout, so that building leaves nothing behind in it."""
    for file in source_files():
        (to / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, to / file)
    return to


def run_backend(
    tree: Path, kind: str, settings: str = "None", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the build backend's hook `build_<kind>` in `tree`; results go to `<kind>` beside it."""
    out = tree.parent / kind
    code = (
        "import setuptools.build_meta as backend\n"
        f"print(backend.build_{kind}({str(out)!r}, {settings}))"
    )
    out.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


def build(tree: Path, kind: str, settings: str = "None", **variables: str) -> Path:
    """Result of the same, which must succeed."""
    done = run_backend(tree, kind, settings, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return tree.parent / kind / done.stdout.splitlines()[-1]
