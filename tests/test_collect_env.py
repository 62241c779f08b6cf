# SPDX-License-Identifier: Apache-2.0
"""The report of the environment must come out above all where something is broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from d2_decouple import __version__, collect_env, extension

ROOT = Path(__file__).resolve().parents[1]


def report(*first_on_path: Path, python: str = sys.executable) -> str:
    """What the command prints when `first_on_path` hide installed packages."""
    path = os.pathsep.join(str(entry) for entry in (*first_on_path, ROOT))
    done = subprocess.run(
        [python, "-m", "d2_decouple.collect_env"],
        env={**os.environ, "PYTHONPATH": path},
        cwd=first_on_path[0] if first_on_path else None,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def row(text: str, name: str) -> str:
    """Value of the row `name`."""
    values = [line[len(name) :] for line in text.splitlines() if line.startswith(name + "  ")]
    assert len(values) == 1, f"{len(values)} rows {name!r} in\n{text}"
    return values[0].strip()


def test_names_versions_and_places() -> None:
    import numpy
    import torch

    text = report()

    assert torch.__version__ in row(text, "torch")
    assert row(text, "numpy") == numpy.__version__
    assert row(text, "d2_decouple").startswith(__version__)
    assert str(ROOT / "d2_decouple") in row(text, "d2_decouple")
    assert str(ROOT / "configs") in row(text, "recipes")
    operators = extension.status()
    unused = "" if operators.loaded else "none, so PyTorch's own are used: "
    assert row(text, "compiled operators") == unused + operators.reason


def test_tells_where_datasets_are_sought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = {
        None: f"{tmp_path / 'datasets'} (not set, so the default; the folder does not exist)",
        str(tmp_path / "nowhere"): f"{tmp_path / 'nowhere'} (set; the folder does not exist)",
        str(tmp_path): f"{tmp_path} (set; the folder exists)",
    }
    for value, row_value in expected.items():
        if value is None:
            monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
        else:
            monkeypatch.setenv("DETECTRON2_DATASETS", value)
        assert dict(collect_env._platform_rows())["DETECTRON2_DATASETS"] == row_value


def test_nothing_is_installed(tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", with_pip=False)
    folder = "Scripts" if os.name == "nt" else "bin"

    text = report(tmp_path, python=str(tmp_path / "empty" / folder / "python"))

    for name in ("torch", "numpy", "cv2", "detectron2"):
        assert row(text, name) == "not installed"
    assert "none, so PyTorch's own are used: not" in row(text, "compiled operators")
    assert "! torch: not installed. Install it: pip install torch torchvision" in text
    assert "python tools/install_detectron2.py" in text


BROKEN = {
    "raises": ("import numpy\nnumpy.no_such_name", "has no attribute 'no_such_name'"),
    "lacks a library": ("raise OSError('libGL.so.1: cannot open')", "libGL.so.1: cannot open"),
    "crashes": ("import os\nos.abort()", "crashes while it is imported (signal 6)"),
}


@pytest.mark.skipif(os.name == "nt", reason="signals are those of POSIX")
@pytest.mark.parametrize("how", BROKEN)
def test_broken_library_is_a_row(tmp_path: Path, how: str) -> None:
    source, expected = BROKEN[how]
    (tmp_path / "detectron2.py").write_text(source + "\n")
    (tmp_path / "cv2.py").write_text(source + "\n")

    text = report(tmp_path)

    for name, remedy in (
        ("detectron2", "install_detectron2.py"),
        ("cv2", "opencv-python-headless"),
    ):
        assert expected in row(text, name)
        (problem,) = [line for line in text.splitlines() if line.startswith(f"! {name}: ")]
        assert remedy in problem
    assert row(text, "torch")[0].isdigit()


@pytest.mark.parametrize(
    ("suffix", "expected"),
    [
        (None, "absent"),
        (".py", "a stub in Python"),
        (EXTENSION_SUFFIXES[0], "compiled, but it cannot be loaded"),
    ],
)
def test_compiled_part_of_detectron2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str | None, expected: str
) -> None:
    package = tmp_path / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '0.0-test'\n")
    (package / "structures.py").touch()
    if suffix is not None:
        (package / f"_C{suffix}").touch()
    monkeypatch.syspath_prepend(tmp_path)

    rows, reason = collect_env._run_probe("detectron2")

    assert not reason
    assert dict(rows)["detectron2"] == f"0.0-test: {package}"
    assert dict(rows)["detectron2._C"].startswith(expected)


OPERATORS = {
    "fit": ("", None, "compiled for the CPU"),
    "of another torch": (
        "",
        "1.13.1",
        "none, so PyTorch's own are used: not loaded, because it was",
    ),
    "do not load": ("raise ImportError('libgomp.so.1')", None, "cannot be loaded: libgomp.so.1"),
    "crash": ("import os\nos.abort()", None, "crashes while it is imported (signal 6)"),
}


@pytest.mark.skipif(os.name == "nt", reason="signals are those of POSIX")
@pytest.mark.parametrize("case", OPERATORS)
def test_compiled_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    import torch

    source, built_for, expected = OPERATORS[case]
    package = tmp_path / "d2_decouple"
    package.mkdir()
    for name in ("__init__", "collect_env", "config", "extension"):
        shutil.copy(ROOT / "d2_decouple" / f"{name}.py", package)
    (package / "_C.py").write_text(source + "\n")
    (package / "_C_build.json").write_text(json.dumps({"torch": built_for or torch.__version__}))
    monkeypatch.delenv("D2D_USE_EXT", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    rows, reason = collect_env._run_probe("compiled operators")

    assert expected in dict([*rows, ("", reason)]).get("compiled operators", reason)
    assert bool(reason) == (case == "crash")


def test_unknown_wish_for_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2D_USE_EXT", "perhaps")
    rows, reason = collect_env._run_probe("compiled operators")
    assert rows == []
    assert "D2D_USE_EXT is 'perhaps'; wanted is 1" in reason


@pytest.mark.skipif(os.name == "nt", reason="the programs are scripts of a POSIX shell")
def test_what_could_compile_the_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def program(path: str, *lines: str) -> str:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("\n".join(["#!/bin/sh", *lines, ""]))
        (tmp_path / path).chmod(0o755)
        return str(tmp_path / path)

    compiler = program("bin/gcc", "echo 'gcc 12.2.0'", "echo 'no warranty'")
    nvcc = program("cuda/bin/nvcc", "echo 'a compiler'", "echo 'tools, release 13.0, V13.0.88'")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("CXX", f"{compiler} -m64")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("D2D_BUILD_EXT", "1")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "python"))
    rows = dict(collect_env._build_rows())
    assert rows["C++ compiler"] == f"gcc 12.2.0: {compiler}"
    assert rows["ninja"] == f"none (sought: {tmp_path / 'venv' / 'ninja'}, ninja)"
    assert rows["nvcc"] == f"tools, release 13.0, V13.0.88: {nvcc}"
    assert rows["D2D_BUILD_EXT"] == "1"

    program("bin/gcc", "exit 3")
    ninja = program("bin/ninja", "sleep 9")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert collect_env._tool("gcc") == f"{compiler}, which does not run: exit status 3"
    monkeypatch.setattr(collect_env, "TOOL_SECONDS", 0.1)
    assert collect_env._tool("ninja").startswith(f"{ninja}, which does not run: ")


def test_probe_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect_env, "PROBE_SECONDS", 0.001)
    rows, problems = collect_env.collect()
    assert ("torch", "importing it takes longer than 0.001 seconds") in rows
    assert len(problems) == len(collect_env._PROBES)


def test_table_is_aligned() -> None:
    text = collect_env.format_report([("a", "1"), ("long name", "2")], [])
    assert text.splitlines() == ["a          1", "long name  2", "", "Nothing is missing."]
