# SPDX-License-Identifier: Apache-2.0
"""What the build of the operators decides and says, without compiling anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers_of_tools import build_extension as tool
from helpers_of_tools import run_tool

TORCH = tool.Torch("2.15.0+cu132", "13.2")
GCC = "c++ (GCC) 12.2.0"
ask_compiler = tool._ask_compiler  # the tests get another answer


def fake_nvcc(home: Path, release: str, top: Path | None = None) -> Path:
    """A toolkit whose nvcc tells its release, and with --dryrun the folder that it works in."""
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    says = f"Cuda compilation tools, release {release}, V{release}.88\n#$ TOP={top or home}"
    nvcc.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\n")
    nvcc.chmod(0o755)
    return home


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with sources, a GCC and a torch with CUDA, on a machine without nvcc."""
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "kernel.cu").touch()
    monkeypatch.setattr(tool, "CSRC", tmp_path / "csrc")
    monkeypatch.setattr(tool, "_ask_compiler", lambda: GCC)
    monkeypatch.setattr(tool, "_ask_torch", lambda: TORCH)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "no-toolkit"))
    return tmp_path


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Parts that were compiled; nothing is."""
    parts: list[str] = []

    def compile_apart(part: str, torch: object, toolkit: object = None) -> Path:
        parts.append(part)
        return Path("_C.abi3.so")

    monkeypatch.setattr(tool, "_compile_apart", compile_apart)
    return parts


def test_without_nvcc_the_cpu_part_is_all_that_can_be_wanted(compiled: list[str]) -> None:
    result = tool.build("1")
    assert compiled == ["cpu"]
    assert result.record["torch"] == "2.15.0+cu132"
    assert result.record["compiler"] == GCC
    assert result.record["cuda"] is None
    assert "there is no nvcc in CUDA_HOME=" in result.record["missing"]
    assert "operators for the CPU were compiled for torch 2.15.0+cu132; no CUDA" in str(result)


def test_nvcc_of_the_path(
    machine: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_HOME")
    # As with scripts that start the real one: the folder above is not the toolkit's.
    fake_nvcc(machine / "usr", "13.0", top=machine / "cuda-13.0")
    monkeypatch.setenv("PATH", f"{machine / 'usr' / 'bin'}:/usr/bin:/bin")
    assert tool._find_toolkit(TORCH)[0] == (machine / "cuda-13.0", "13.0")
    result = tool.build("auto")
    assert compiled == ["cuda"]
    assert (result.record["cuda"], result.record["architectures"]) == ("13.0", "7.5;8.0;9.0+PTX")
    assert result.record["missing"] == ""
    assert str(result).startswith("operators for the CPU and CUDA 13.0 (7.5;8.0;9.0+PTX) were")


def test_gpus_are_chosen_by_a_variable(
    machine: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(machine / "cuda", "13.0")))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "10.0")
    assert tool.build("1").record["architectures"] == "10.0"


REASONS = {
    "another CUDA": ("12.8", "is of CUDA 12.8, torch 2.15.0+cu132 of CUDA 13.2"),
    "no version": ("unknown", "names no release"),
}


@pytest.mark.parametrize("case", REASONS)
def test_unfit_toolkit(
    machine: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    release, reason = REASONS[case]
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(machine / "cuda", release)))
    result = tool.build("auto")
    assert compiled == ["cpu"]
    assert reason in result.record["missing"]
    assert "export CUDA_HOME=..." in str(result)
    with pytest.raises(tool.BuildError, match=reason.replace("+", r"\+")) as caught:
        tool.build("1")
    assert "export CUDA_HOME=..." in caught.value.remedy


def test_torch_without_cuda(
    machine: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(machine / "cuda", "13.0")))
    monkeypatch.setattr(tool, "_ask_torch", lambda: tool.Torch("2.15.0+cpu", None))
    assert tool.build("1").record["missing"] == "no CUDA: torch 2.15.0+cpu is a build without"
    assert compiled == ["cpu"]


@pytest.mark.parametrize(
    ("failing", "parts", "missing"),
    [
        ({"cuda"}, ["cuda", "cpu"], "no CUDA: cuda fails"),
        ({"cuda", "cpu"}, ["cuda", "cpu"], "cpu fails"),
    ],
)
def test_part_that_fails_is_left_out(
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: set[str],
    parts: list[str],
    missing: str,
) -> None:
    tried = []

    def compile_apart(part: str, torch: object, toolkit: object = None) -> Path:
        tried.append(part)
        if part in failing:
            raise tool.BuildError(f"{part} fails", "Do this.", "all that was said")
        return Path("_C.abi3.so")

    monkeypatch.setattr(tool, "_compile_apart", compile_apart)
    monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(machine / "cuda", "13.0")))
    result = tool.build("auto")
    assert tried == parts
    assert result.record["missing"] == missing
    assert (result.compiled is None) == ("cpu" in failing)
    assert str(result).endswith(f"{missing}. Do this.")
    with pytest.raises(tool.BuildError, match="cuda fails"):
        tool.build("1")


def test_clang_on_linux_has_other_threads(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(tool, "_ask_compiler", lambda: "Debian clang version 14.0.6")
    assert "no threads: torch's are those of GCC's OpenMP" in tool.build("1").record["missing"]
    assert tool._openmp_options(Path()) == ([], [])


def test_threads_are_those_of_torch(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert tool._openmp_options(machine) == (["-fopenmp"], ["-fopenmp"])
    own = machine / "libgomp-a34b3233.so.1"
    own.touch()
    assert tool._openmp_options(machine) == (["-fopenmp"], [str(own)])


def test_windows_takes_the_reference(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert "need GCC or Clang" in tool.build("auto").record["missing"]
    assert compiled == []
    with pytest.raises(tool.BuildError, match="need GCC or Clang"):
        tool.build("1")


def test_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(tool.BuildError, match=r"no C.. compiler 'no-such-compiler'") as caught:
        ask_compiler()
    assert "sudo apt install g++" in caught.value.remedy
    assert "export CXX=..." in caught.value.remedy


def test_python_without_headers(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Debian packs it, although there is a compiler."""
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(tool.sysconfig, "get_path", lambda name: str(machine))
    with pytest.raises(tool.BuildError, match=f"there is no {machine / 'Python.h'}") as caught:
        ask_compiler()
    assert "sudo apt install python3-dev" in caught.value.remedy
    (machine / "Python.h").touch()
    assert ask_compiler().startswith("Python 3.")


def test_unknown_mode() -> None:
    with pytest.raises(tool.BuildError, match=r"D2D_BUILD_EXT is 'yes'; wanted is auto \(.*\), 1"):
        tool.build("yes")
    done = run_tool("build_extension.py", D2D_BUILD_EXT="yes")
    assert done.returncode == 1
    assert "D2D_BUILD_EXT is 'yes'" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_an_earlier_build_left_is_exchanged(machine: Path) -> None:
    folder = machine / "package"
    folder.mkdir()
    (folder / "_C.cpython-39-x86_64-linux-gnu.so").touch()
    (folder / "_C.abi3.so").write_text("old")
    new = machine / "_C.abi3.so"
    new.write_text("new")
    with (folder / "_C.abi3.so").open() as loaded:
        tool._place(folder, tool.Result(new, {"torch": "2.15.0"}))
        assert loaded.read() == "old", "a process that has it loaded keeps what it has"
    assert {file.name for file in folder.iterdir()} == {"_C.abi3.so", "_C_build.json"}
    assert (folder / "_C.abi3.so").read_text() == "new"
    tool._place(folder, tool.Result(None, {"torch": None, "missing": "D2D_BUILD_EXT was 0"}))
    assert [file.name for file in folder.iterdir()] == ["_C_build.json"]
    assert json.loads((folder / "_C_build.json").read_text())["missing"] == "D2D_BUILD_EXT was 0"


GISTS = {
    "csrc/cpu/a.cpp:3:9: error: unused variable 'x' [-Werror=unused-variable]": (
        "c++ -Wall -Werror -c a.cpp\n"
        f"{tool.ROOT}/csrc/cpu/a.cpp:3:9: error: unused variable 'x' [-Werror=unused-variable]\n"
        "cc1plus: all warnings being treated as errors\nninja: build stopped"
    ),
    "csrc/cuda/a.cu(171): error #128-D: loop is not reachable": (
        f"nvcc -Werror all-warnings\n{tool.ROOT}/csrc/cuda/a.cu(171): error #128-D: loop is not "
        "reachable\n\n2 errors detected"
    ),
    "nvcc fatal   : Unsupported gpu architecture 'compute_90'": (
        "nvcc -c\nnvcc fatal   : Unsupported gpu architecture 'compute_90'\nninja: stopped"
    ),
    "/usr/bin/ld: cannot find -lcudart: No such file or directory": (
        "/usr/bin/ld: cannot find -lcudart: No such file or directory\n"
        "collect2: error: ld returned 1 exit status"
    ),
    "OSError: libcudart.so.13: cannot open shared object file": (
        "Traceback (most recent call last):\nOSError: libcudart.so.13: cannot open shared object "
        "file\n"
    ),
    "c++: fatal error: Killed signal terminated program cc1plus (if the memory was too small: "
    "export MAX_JOBS=1)": "c++ -c\nc++: fatal error: Killed signal terminated program cc1plus\n",
    "without a word": "\n",
}


@pytest.mark.parametrize("line", GISTS)
def test_telling_line_of_an_output(line: str) -> None:
    assert tool.gist(GISTS[line]) == line
