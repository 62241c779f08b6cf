# SPDX-License-Identifier: Apache-2.0
"""Run the tests of the kernels for the CPU under AddressSanitizer and UBSan.

    python tools/sanitize.py                       the tests that call the kernels most
    python tools/sanitize.py -k "channels_last"    what follows goes to pytest

It compiles ``csrc/`` anew, with the sanitizers, into a scratch folder beside a copy of the package
and its tests: the checkout and what is built in it stay as they are. Two planted faults must be
reported first, so a silent run means something. Needs g++ on Linux and takes some minutes.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = [
    f"tests/layers/test_point_gather{name}.py" for name in ("", "_bad_input", "_deform", "_threads")
]

# Appended to what the build says, so that these win: lines in reports, warnings that do not end it,
# no definition of what a signed overflow does, which would hide it, and what -O1 lacks to join
# products and sums as a usual build does.
FLAGS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all", "-g"]
FLAGS += ["-O1", "-fexpensive-optimizations", "-fno-omit-frame-pointer", "-fno-wrapv"]
FLAGS += ["-Wno-error", "-D_GLIBCXX_ASSERTIONS"]

FAULTY = """// Two faults to be reported: reading behind an array, a number too large for an int.
#include <cstdlib>
extern "C" int behind(int count) {
  int* numbers = static_cast<int*>(std::calloc(count, sizeof(int)));
  const int result = numbers[count];
  std::free(numbers);
  return result;
}
extern "C" int index_of(float coordinate) { return static_cast<int>(coordinate); }
"""
FAULTS = {
    "behind(3)": "AddressSanitizer: heap-buffer-overflow",
    "index_of(ctypes.c_float(1e30))": "is outside the range of representable values of type 'int'",
}


class SanitizeError(Exception):
    """What is missing, or which fault went unseen."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, plant, test; pytest's exit status."""
    chosen = list(sys.argv[1:] if arguments is None else arguments)
    with tempfile.TemporaryDirectory(prefix="d2-decouple-sanitize-") as folder:
        tree = Path(folder)
        try:
            environment = sanitized_environment()
            compiler = sanitizing_compiler(tree)
            check_planted_faults(tree, compiler, environment)
            copy_package(tree)
            build(tree, compiler)
            check_extension(tree, environment)
        except SanitizeError as error:
            print(error, file=sys.stderr)
            return 2
        if not any(Path(argument.split("::")[0]).suffix == ".py" for argument in chosen):
            chosen = TESTS + chosen
        # Not captured: a sanitizer ends the process, and what pytest had kept would be lost.
        command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *chosen]
        return subprocess.run(command, cwd=tree, env=environment).returncode


def sanitized_environment() -> dict[str, str]:
    """The sanitizers' libraries come first in the process: Python itself is built without them."""
    compiler = os.environ.get("CXX", "g++")
    if not sys.platform.startswith("linux") or shutil.which(compiler) is None:
        raise SanitizeError(
            f"There is no {compiler} on {sys.platform}. Wanted is Linux with g++: install it, or "
            "type CXX=g++-12 before the command if it has another name."
        )
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        if not Path(found).is_absolute():
            raise SanitizeError(
                f"{compiler} has no {name}. Install the sanitizers of g++, which some systems "
                f"pack as libasan and libubsan; the sanitizers of other compilers do not fit."
            )
        libraries.append(found)
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(libraries),
        # Python keeps memory until it ends; a GPU's driver maps what ASan would reserve.
        "ASAN_OPTIONS": "detect_leaks=0:protect_shadow_gap=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "D2D_USE_EXT": "1",
        "OMP_NUM_THREADS": "2",
    }


def sanitizing_compiler(tree: Path) -> Path:
    """A compiler for the project's own build: g++ with more flags."""
    script = tree / "g++"
    compiler = shlex.quote(os.environ.get("CXX", "g++"))
    script.write_text(f'#!/bin/sh\nexec {compiler} "$@" {shlex.join(FLAGS)}\n')
    script.chmod(0o755)
    return script


def check_planted_faults(tree: Path, compiler: Path, environment: Mapping[str, str]) -> None:
    """Call two faulty functions under the sanitizers, each in a process that must not survive."""
    source, library = tree / "faulty.cpp", tree / "faulty.so"
    source.write_text(FAULTY)
    _run([str(compiler), "-O3", "-shared", "-fPIC", str(source), "-o", str(library)], tree)
    for call, report in FAULTS.items():
        code = f"import ctypes; ctypes.CDLL({str(library)!r}).{call}"
        done = _python(["-c", code], tree, environment)
        if done.returncode == 0 or report not in done.stderr:
            raise SanitizeError(
                f"A planted fault, {call}, went unseen: the tests would prove nothing. Wanted was "
                f"'{report}', got status {done.returncode} and:\n{done.stderr}"
            )
        print(f"Planted fault is reported: {report}", flush=True)


def copy_package(tree: Path) -> None:
    """The package without what was built in it, and all that its build and its tests need."""
    ignore = shutil.ignore_patterns("*.so", "_C_build.json", "__pycache__")
    for name in ("csrc", "d2_decouple", "tests", "tools"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tree)


def build(tree: Path, compiler: Path) -> None:
    """Compile the operators for the CPU into the copied package, as the project does it."""
    print("Compiling csrc/ with the sanitizers", flush=True)
    variables = {"CXX": str(compiler), "D2D_BUILD_EXT": "1", "CUDA_HOME": str(tree / "none")}
    _run([sys.executable, "tools/build_extension.py"], tree, variables)


def check_extension(tree: Path, environment: Mapping[str, str]) -> None:
    """Without its kernels all tests would be skipped, and nothing shown."""
    code = "from d2_decouple import extension as e; print(e.__file__, e.status())"
    done = _python(["-c", code], tree, environment)
    if str(tree) not in done.stdout or "cpu=True" not in done.stdout:
        raise SanitizeError(f"The extension does not load:\n{done.stdout}{done.stderr}")


def _python(
    arguments: list[str], folder: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def _run(command: list[str], folder: Path, variables: Mapping[str, str] | None = None) -> None:
    environment = {**os.environ, **(variables or {})}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SanitizeError(f"'{shlex.join(command)}' failed:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    sys.exit(main())
