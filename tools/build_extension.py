# SPDX-License-Identifier: Apache-2.0
"""Compile csrc/ into the package's operators: what `setup.py` runs, and `make ext`.

    python tools/build_extension.py [--into FOLDER]

D2D_BUILD_EXT=auto (the default) goes on without what cannot be compiled and says why; 1 makes that
an error; 0 compiles nothing. As with every extension of PyTorch, CXX names the compiler, CUDA_HOME
the toolkit, TORCH_CUDA_ARCH_LIST the GPUs, and MAX_JOBS how many files are compiled at a time.

Beside the operators, or alone, lies _C_build.json: what they were compiled with, and what is
missing and why. The package reads it before it loads them (d2_decouple/extension.py).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["BuildError", "Result", "build", "gist", "main"]

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
RECORD = "_C_build.json"
GPUS = "7.5;8.0;9.0+PTX"  # Turing, Ampere, Hopper, and by PTX whatever comes later

# Python without its global lock has no stable interface yet.
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")
ABI_DEFINE = "-DPy_LIMITED_API=0x030A0000"

NAME_TOOLKIT = "Name another toolkit: export CUDA_HOME=..."
SHOW_ALL = "D2D_BUILD_EXT=1 shows all that the compiler says."

_TELLING = re.compile(r"\berror(:| #)|\bfatal\s*:|: cannot find |undefined (reference|symbol)")


class BuildError(RuntimeError):
    """Something cannot be compiled: why, what to type, and what the compiler said."""

    def __init__(self, reason: str, remedy: str = "", output: str = "") -> None:
        super().__init__(reason)
        self.remedy = remedy
        self.output = output


class Result(NamedTuple):
    """What was built."""

    compiled: Path | None
    record: dict[str, Any]  # content of _C_build.json
    remedy: str = ""  # what to type to get more

    def __str__(self) -> str:
        """One line, for the user."""
        torch, cuda, missing = (self.record.get(key) for key in ("torch", "cuda", "missing"))
        if not self.compiled:
            return f"no operators were compiled: {missing}. {self.remedy}".strip()
        gpus = f" and CUDA {cuda} ({self.record['architectures']})" if cuda else ""
        done = f"operators for the CPU{gpus} were compiled for torch {torch}"
        return f"{done}; {missing}. {self.remedy}".strip() if missing else done


class Torch(NamedTuple):
    """The PyTorch to compile for: its version, and that of CUDA, None in builds without."""

    version: str
    cuda: str | None


class Toolkit(NamedTuple):
    """An installed CUDA: its folder, and its version such as "13.0"."""

    home: Path
    version: str


def main() -> int:
    """Exit status of the script: 0 unless something fails that the user insisted on."""
    args = _parse()
    if args.part:
        _compile(args.part, args.into[0], args.objects)
        return 0
    try:
        result = build(os.environ.get("D2D_BUILD_EXT", "auto"))
    except BuildError as error:
        said = f"{error.output}\nd2-decouple: the operators were not compiled: {error}."
        print(f"{said} {error.remedy}", file=sys.stderr)
        print("Or go on without what fails: export D2D_BUILD_EXT=auto", file=sys.stderr)
        return 1
    for folder in args.into or [ROOT / "d2_decouple"]:
        _place(folder, result)
    print(f"d2-decouple: {result}", file=sys.stderr)
    return 0


def build(mode: str) -> Result:
    """Compile what D2D_BUILD_EXT's value asks for; no folder of the package is changed.

    Raises:
        BuildError: an unknown mode, or a failure although the mode is "1".
    """
    if mode not in ("auto", "0", "1"):
        raise BuildError(
            f"D2D_BUILD_EXT is {mode!r}; wanted is auto (compile what can be compiled), "
            "1 (a failure is an error) or 0 (compile nothing)"
        )
    if mode == "0":
        return Result(None, {"torch": None, "missing": "D2D_BUILD_EXT was 0"})
    try:
        return _build_most(insist=mode == "1")
    except BuildError as error:
        if mode == "1":
            raise
        return Result(None, {"torch": None, "missing": str(error)}, error.remedy)


def _build_most(insist: bool) -> Result:
    """For CPU and CUDA if that can be, else for the CPU."""
    if sys.platform == "win32":
        raise BuildError("they need GCC or Clang, which PyTorch on Windows is not compiled with")
    compiler, torch = _ask_compiler(), _ask_torch()
    record = {"torch": torch.version, "compiler": compiler, "cuda": None, "architectures": ""}
    missing = [] if _has_openmp(compiler) else ["no threads: torch's are those of GCC's OpenMP"]
    file, remedy = None, ""
    try:
        toolkit, lacking = _find_toolkit(torch)
        if toolkit:
            file = _compile_apart("cuda", torch, toolkit)
            record["cuda"] = toolkit.version
            record["architectures"] = os.environ.get("TORCH_CUDA_ARCH_LIST", GPUS)
    except BuildError as error:
        if insist:
            raise
        lacking, remedy = str(error), error.remedy
    if file is None:
        missing.insert(0, f"no CUDA: {lacking}")
        file = _compile_apart("cpu", torch)
    return Result(file, {**record, "missing": "; ".join(missing)}, remedy)


def _ask_compiler() -> str:
    """First line of what the C++ compiler says of itself."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    if not shutil.which(command[0]):
        raise BuildError(
            f"there is no C++ compiler {command[0]!r}",
            "Install one (Debian, Ubuntu: sudo apt install g++; macOS: xcode-select --install), "
            "or name one: export CXX=...",
        )
    status, said = _run([*command, "--version"])
    if status:
        raise BuildError(
            f"the C++ compiler does not work: {shlex.join(command)} --version ends with status "
            f"{status}",
            "Name another one: export CXX=...",
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        raise BuildError(
            f"the headers of Python are missing: there is no {header}",
            "Install them (Debian, Ubuntu: sudo apt install python3-dev)",
        )
    return said.splitlines()[0]


def _has_openmp(compiler: str) -> bool:
    # PyTorch's threads on Linux are those of GCC's OpenMP, and two kinds in a process do not mix.
    return sys.platform == "linux" and "clang" not in compiler.lower()


def _ask_torch() -> Torch:
    # In a process of its own, since a damaged PyTorch may raise anything, or crash.
    code = "import json, torch; print(json.dumps([torch.__version__, torch.version.cuda]))"
    status, said = _run([sys.executable, "-c", code])
    if status:
        raise BuildError(
            f"PyTorch cannot be imported where this is built ({gist(said)})",
            "Install it, and let pip build in the same environment: "
            "pip install --no-build-isolation ...",
        )
    return Torch(*json.loads(said.splitlines()[-1]))


def _find_toolkit(torch: Torch) -> tuple[Toolkit | None, str]:
    """The toolkit to compile for CUDA with, or why there is nothing to compile or none to do it."""
    if not any(CSRC.glob("cuda/*.cu")):
        return None, "there is no source in csrc/cuda"
    if torch.cuda is None:
        return None, f"torch {torch.version} is a build without"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    named = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")
    nvcc = shutil.which(named or "/usr/local/cuda/bin/nvcc")
    if not nvcc:
        return None, f"there is no nvcc {f'in CUDA_HOME={home}' if home else 'on the path'}"
    release = re.search(r"release (\d+)(\.\d+)", _run([nvcc, "--version"])[1])
    if not release:
        raise BuildError(f"{nvcc} --version names no release", NAME_TOOLKIT)
    if release[1] != torch.cuda.split(".")[0]:
        raise BuildError(
            f"{nvcc} is of CUDA {release[1]}{release[2]}, torch {torch.version} of CUDA "
            f"{torch.cuda}; wanted is the same first number",
            NAME_TOOLKIT,
        )
    # nvcc may be a link, or a script elsewhere that starts the real one.
    top = re.search(r"^#\$ TOP=(.+)$", _run([nvcc, "--dryrun", "-E", "any.cu"])[1], re.MULTILINE)
    found = Path(top[1].strip()) if top else Path(nvcc).resolve().parents[1]
    return Toolkit(Path(home) if home else found.resolve(), release[1] + release[2]), ""


def _compile_apart(part: str, torch: Torch, toolkit: Toolkit | None = None) -> Path:
    """Compile in a process of its own, whose output is kept back; the file that it made."""
    # Objects are kept for the next time; they fit one Python and one torch.
    kept = ROOT / "build" / "operators" / f"{sys.implementation.cache_tag}-torch{torch.version}"
    finished = kept / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    # Ninja may lie beside Python in an environment that is not activated.
    search = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    variables = {
        "TORCH_CUDA_ARCH_LIST": GPUS,
        **os.environ,
        "PATH": os.pathsep.join(search),
        **({"CUDA_HOME": str(toolkit.home)} if toolkit else {}),
    }
    options = ["--part", part, "--into", str(finished), "--objects", str(kept)]
    status, said = _run([sys.executable, str(Path(__file__).resolve()), *options], variables)
    if status:
        what = "CUDA" if toolkit else "the CPU"
        raise BuildError(f"compiling for {what} failed: {gist(said)}", SHOW_ALL, said)
    (file,) = finished.rglob("_C.*")
    return file


def _compile(part: str, into: Path, objects: Path) -> None:
    """What the process of its own does: PyTorch's builder, with warnings that are errors."""
    from setuptools import Distribution
    from torch.utils import cpp_extension

    sources = [*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")]
    make = cpp_extension.CppExtension
    if part == "cuda":
        sources += CSRC.glob("cuda/*.cu")
        make = cpp_extension.CUDAExtension
    extension = make("d2_decouple._C", sorted(map(str, sources)), py_limited_api=STABLE_ABI)
    headers = _as_system([*cpp_extension.include_paths(), sysconfig.get_path("include")])
    # A toolkit without all its libraries lacks headers that torch's own headers include. torch
    # brings them; those that the toolkit has as well come first.
    shipped = sorted(Path(cpp_extension.__file__).parents[2].glob("nvidia/*/include"))
    openmp, link = _openmp_options(Path(cpp_extension.TORCH_LIB_PATH))
    # Newer versions of torch define it themselves.
    abi = STABLE_ABI and not hasattr(cpp_extension, "min_supported_cpython")
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    both = ["-O3", *headers, *([ABI_DEFINE] if abi else [])]
    extension.include_dirs = [str(CSRC)]
    extension.extra_link_args = link
    extension.extra_compile_args = {
        # A product and a sum become one instruction, which -std=c++NN alone would forbid.
        "cxx": [*both, "-g0", "-ffp-contract=fast", *warnings, *openmp],
        "nvcc": [
            *both,
            *("-Werror", "all-warnings", "-Xcompiler", ",".join(warnings)),
            *_as_system(map(str, shipped)),
        ],
    }
    distribution = Distribution({"name": "d2-decouple", "ext_modules": [extension]})
    command = cpp_extension.BuildExtension(distribution)
    command.build_lib, command.build_temp, command.force = str(into), str(objects), True
    command.ensure_finalized()
    command.run()


def _as_system(folders: Iterable[str]) -> list[str]:
    """Options for headers of others, whose warnings are not ours."""
    return [word for folder in dict.fromkeys(folders) for word in ("-isystem", folder)]


def _openmp_options(libraries: Path) -> tuple[list[str], list[str]]:
    """Options for compiling and for linking."""
    if not _has_openmp(_ask_compiler()):
        return [], []
    # torch's own copy, whose name may be a special one: a second one would have its own threads.
    own = sorted(map(str, libraries.glob("libgomp*.so*")))
    return ["-fopenmp"], own[:1] or ["-fopenmp"]


def _place(folder: Path, result: Result) -> None:
    """Exchange what an earlier build left; a process that has loaded it keeps its own."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = result.compiled.name if result.compiled else ""
    for old in (folder / RECORD, *folder.glob("_C.*")):
        if old.name != wanted:
            old.unlink(missing_ok=True)
    if result.compiled:
        fresh = folder / f"{wanted}.new"
        shutil.copyfile(result.compiled, fresh)
        fresh.replace(folder / wanted)
    (folder / RECORD).write_text(json.dumps(result.record, indent=2) + "\n", encoding="utf-8")


def gist(output: str) -> str:
    """The line of an output that tells what went wrong: the first that looks so, or the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["without a word"]
    line = next(filter(_TELLING.search, lines), lines[-1]).replace(f"{ROOT}{os.sep}", "")
    if re.search(r"\bKilled\b", output):
        line += " (if the memory was too small: export MAX_JOBS=1)"
    return line


def _run(command: Sequence[str], variables: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit status and output of a command."""
    done = subprocess.run(
        command,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    return done.returncode, done.stdout


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--into",
        type=Path,
        action="append",
        help="folder of the package, several if repeated (default: d2_decouple of this checkout)",
    )
    parser.add_argument("--part", choices=["cpu", "cuda"], help=argparse.SUPPRESS)
    parser.add_argument("--objects", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
