# SPDX-License-Identifier: Apache-2.0
"""The compiled operators as part of the package: built, left out, or impossible to build.

The real compiler and the build backend run here, on the smallest of our sources, the schemas; what
is decided without compiling is in tools/test_build_extension.py.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from helpers_of_building import build, copy_checkout, run_backend

from d2_decouple import __version__

BROKEN = {"CXX": "false"}  # a program that every system has, and that fails
PURE = f"d2_decouple-{__version__}-py3-none-any.whl"
STATUS = "from d2_decouple.extension import status; print(status().loaded, status().reason)"

needs_compiler = pytest.mark.skipif(
    sys.platform == "win32"
    or not shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0])
    or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="there is no C++ compiler that could compile the operators, or no Python.h",
)
needs_posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no program 'false'")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("D2D_BUILD_EXT", raising=False)
    return copy_checkout(tmp_path / "tree")


def header_of(wheel: zipfile.ZipFile) -> bytes:
    return wheel.read(f"d2_decouple-{__version__}.dist-info/WHEEL")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel with operators that was built from the source archive, and the unpacked archive."""
    folder = tmp_path_factory.mktemp("built")
    shutil.unpack_archive(build(copy_checkout(folder / "tree"), "sdist"), folder / "unpacked")
    (unpacked,) = (folder / "unpacked").iterdir()
    for part in ("cpu", "cuda"):  # the kernels take their time
        shutil.rmtree(unpacked / "csrc" / part)
    return build(unpacked, "wheel", D2D_BUILD_EXT="1"), unpacked


def in_package(folder: Path, code: str, **variables: str) -> str:
    """What the code prints where `folder` holds the package."""
    own = {name: value for name, value in os.environ.items() if name != "D2D_USE_EXT"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**own, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def record_of(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("d2_decouple/_C_build.json"))


@needs_compiler
def test_wheel_with_operators_is_for_one_platform(built: tuple[Path, Path], tmp_path: Path) -> None:
    wheel, _ = built
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        assert wheel.name == f"d2_decouple-{__version__}-cp310-abi3-{platform}.whl"
    record = record_of(wheel)
    assert record["torch"] == torch.__version__
    assert record["compiler"]
    assert record["cuda"] is None
    assert "no CUDA: there is no source in csrc/cuda" in record["missing"]
    with zipfile.ZipFile(wheel) as archive:
        assert b"Root-Is-Purelib: false" in header_of(archive)
        archive.extractall(tmp_path / "site")
    code = (
        f"{STATUS}\nimport torch, d2_decouple\nprint(d2_decouple.__file__)\n"
        "print(torch.ops.d2_decouple.point_gather.default)"
    )
    # Nothing that builds is needed to use it.
    lines = in_package(tmp_path / "site", code, PATH=str(tmp_path)).splitlines()
    assert lines == [
        "True compiled for the CPU; no CUDA: there is no source in csrc/cuda",
        str(tmp_path / "site" / "d2_decouple" / "__init__.py"),
        "d2_decouple.point_gather.default",
    ]


@needs_compiler
def test_editable_install_has_them_in_the_checkout(built: tuple[Path, Path]) -> None:
    _, unpacked = built
    package = unpacked / "d2_decouple"
    build(unpacked, "editable", D2D_BUILD_EXT="1")
    assert in_package(unpacked, STATUS).startswith("True compiled for the CPU")
    (operators,) = package.glob("_C.*")

    failed = run_backend(unpacked, "editable", D2D_BUILD_EXT="1", **BROKEN)
    assert failed.returncode != 0
    assert operators.exists(), "what was there works as before"

    build(unpacked, "editable", D2D_BUILD_EXT="0")
    assert [file.name for file in package.glob("_C*")] == ["_C_build.json"]
    assert in_package(unpacked, STATUS).startswith("False not built (D2D_BUILD_EXT was 0)")


@needs_compiler
def test_warning_of_the_compiler_is_the_reason(tree: Path) -> None:
    shutil.rmtree(tree / "csrc")
    (tree / "csrc").mkdir()
    (tree / "csrc" / "odd.cpp").write_text("static int unused(int x) { return 0; }\n")

    done = run_backend(tree, "wheel")

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == PURE
    reason = record_of(tree.parent / "wheel" / PURE)["missing"]
    assert reason.startswith("compiling for the CPU failed: csrc/odd.cpp:1:")
    assert "error: unused" in reason or "defined but not used" in reason
    assert (done.stdout + done.stderr).count(reason) == 1
    assert "D2D_BUILD_EXT=1 shows all" in done.stderr


@needs_posix
def test_broken_compiler_leaves_a_working_package(tree: Path, tmp_path: Path) -> None:
    done = run_backend(tree, "wheel", **BROKEN)

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == PURE
    reason = "the C++ compiler does not work: false --version ends with status 1"
    assert (done.stdout + done.stderr).count(reason) == 1
    assert f"d2-decouple: no operators were compiled: {reason}. Name another one" in done.stderr
    with zipfile.ZipFile(tree.parent / "wheel" / PURE) as archive:
        assert b"Root-Is-Purelib: true" in header_of(archive)
        archive.extractall(tmp_path / "site")
    code = (
        f"{STATUS}\nimport torch\n"
        "from d2_decouple.layers.point_gather import deformable_point_gather as gather\n"
        "print(gather(torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 1, 1), 0.5)).item())"
    )
    said, value = in_package(tmp_path / "site", code).splitlines()
    assert said.startswith(f"False not built ({reason}); to build it, type in a checkout: ")
    assert value == "1.0"


@needs_posix
def test_broken_compiler_is_an_error_for_who_insists(tree: Path) -> None:
    done = run_backend(tree, "wheel", D2D_BUILD_EXT="1", **BROKEN)

    assert done.returncode != 0
    assert "false --version ends with status 1. Name another one: export CXX=..." in done.stderr
    assert "export D2D_BUILD_EXT=auto" in done.stderr
    assert not list((tree.parent / "wheel").glob("*.whl"))


@needs_compiler
def test_no_torch_where_it_is_built(tree: Path) -> None:
    """As in the environment that pip makes for building, unless it is told not to."""
    away = tree.parent / "away"
    away.mkdir()
    (away / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")\n")

    done = run_backend(tree, "wheel", PYTHONPATH=str(away))

    assert done.stdout.splitlines()[-1] == PURE, done.stderr
    reason = "(ModuleNotFoundError: No module named 'torch')"
    assert reason in record_of(tree.parent / "wheel" / PURE)["missing"]
    assert "pip install --no-build-isolation" in done.stderr


def test_without_operators(tree: Path) -> None:
    done = run_backend(tree, "wheel", D2D_BUILD_EXT="0", **BROKEN)
    assert done.stdout.splitlines()[-1] == PURE, done.stderr
    assert record_of(tree.parent / "wheel" / PURE)["missing"] == "D2D_BUILD_EXT was 0"


def test_unknown_wish(tree: Path) -> None:
    done = run_backend(tree, "wheel", D2D_BUILD_EXT="no")
    assert done.returncode != 0
    assert "D2D_BUILD_EXT is 'no'; wanted is auto" in done.stderr


def test_operators_in_the_checkout_are_not_packed(tree: Path) -> None:
    """Those of an editable install lie there, and fit only this machine."""
    (tree / "d2_decouple" / "_C.abi3.so").write_text("old")
    (tree / "d2_decouple" / "_C_build.json").write_text("{}")
    left = tree / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    (left / "d2_decouple").mkdir(parents=True)
    (left / "d2_decouple" / "_C.abi3.so").write_text("older")

    wheel = build(tree, "wheel", D2D_BUILD_EXT="0")

    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if "_C" in name]
    assert names == ["d2_decouple/_C_build.json"]
    assert record_of(wheel)["missing"] == "D2D_BUILD_EXT was 0"
    with tarfile.open(build(tree, "sdist")) as archive:
        names = archive.getnames()
    assert not [name for name in names if name.endswith((".so", "_C_build.json"))]
    assert [name for name in names if name.endswith("csrc/point_gather.cpp")]
