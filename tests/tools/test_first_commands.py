# SPDX-License-Identifier: Apache-2.0
"""The first things that somebody types: with too old a Python, and through the Makefile."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_of_tools import ROOT, TOOLS, fake_program, require_python


@pytest.mark.parametrize("script", ["setup_env.py", "install_detectron2.py"])
def test_older_python_gets_a_message(script: str, tmp_path: Path) -> None:
    """The version is faked: what is tried is the order of imports and the message."""
    good = fake_program(tmp_path / "python3.12", "", status=0)
    fake_program(tmp_path / "python3.13", "a version manager's placeholder", status=127)
    code = (
        "import os, runpy, shutil, subprocess, sys; sys.version_info = (3, 8, 18, 'final', 0); "
        f"runpy.run_path({str(TOOLS / script)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PATH": f"{tmp_path}", "PYTHONPATH": str(TOOLS)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "Python 3.10 or newer is needed" in done.stderr
    assert f"{sys.executable} is Python 3.8.18" in done.stderr
    assert f"On your path there is: {good.name}\n" in done.stderr
    assert "make setup PYTHON=python3.12" in done.stderr
    assert "Traceback" not in done.stderr


def test_older_python_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "On your path there is none. Install one" in require_python.problem((3, 9, 18))
    assert require_python.problem((3, 10, 0)) == ""


@pytest.mark.parametrize("name", ["setup_env", "require_python", "install_detectron2"])
def test_older_python_can_parse(name: str) -> None:
    ast.parse((TOOLS / f"{name}.py").read_text(), feature_version=(3, 6))
    assert "from __future__ import annotations" not in (TOOLS / f"{name}.py").read_text()


def run_make(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    return subprocess.run(
        ["make", "-C", str(ROOT), "--no-print-directory", *arguments],
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_make_lists_its_targets() -> None:
    said = run_make().stdout
    names = ("setup", "run", "test", "test-head", "lint", "ext", "benchmark", "wheel", "clean")
    for name in names:
        assert f"make {name} " in said


@pytest.mark.parametrize("name", ["run", "test", "lint", "benchmark", "wheel"])
def test_make_sets_up_first(name: str) -> None:
    commands = run_make("-n", name, "PYTHON=python3.99").stdout.splitlines()
    assert commands[0] == "python3.99 tools/setup_env.py --venv .venv --dev"
    assert all(command.startswith(".venv/bin/") for command in commands[1:])
    assert len(commands) > 1


def test_make_with_another_detectron2(tmp_path: Path) -> None:
    done = run_make("test-head", f"DETECTRON2={tmp_path}", "PYTHON=no-python")
    assert done.returncode != 0
    assert f"There is no Detectron2 in '{tmp_path}'" in done.stderr
    assert "make test-head DETECTRON2=DIR" in done.stderr
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").touch()
    commands = run_make("-n", "test-head", f"DETECTRON2={tmp_path}").stdout
    assert f'PYTHONPATH="{tmp_path}" .venv/bin/python -m pytest -n auto' in commands
