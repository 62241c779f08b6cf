# SPDX-License-Identifier: Apache-2.0
"""Run pip and its like inside one environment, and say why they failed.

Standard library only: it is used before anything is installed.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "StepError",
    "Tools",
    "clean_environment",
    "explain",
    "explain_os_error",
    "free_gib",
    "gist",
    "last_lines",
]

CUDA_BUILD_GIB = 6
"""Disk that torch takes with CUDA; builds for the CPU take about 1 GiB."""

TAIL_LINES = 25
"""Where the reason of a failure is sought: earlier lines may tell of what a retry cured."""

# What would send packages elsewhere, leave some out, or let modules of another place in.
_LEAKS = {
    "PIP_DRY_RUN",
    "PIP_EDITABLE",
    "PIP_FORCE_REINSTALL",
    "PIP_IGNORE_INSTALLED",
    "PIP_NO_DEPS",
    "PIP_PREFIX",
    "PIP_PYTHON",
    "PIP_REQUIREMENT",
    "PIP_ROOT",
    "PIP_TARGET",
    "PIP_UPGRADE",
    "PYTHONHOME",
    "PYTHONINSPECT",
    "PYTHONOPTIMIZE",
    "PYTHONPATH",
    "PYTHONSTARTUP",
    "PYTHONUSERBASE",
    "PYTHONWARNINGS",
    "VIRTUAL_ENV",
    "__PYVENV_LAUNCHER__",
}

_DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded|not enough space on the disk")
_HASHES = re.compile(r"Expected sha256 (\w+)\s+Got\s+(\w+)")
_CERTIFICATE = re.compile(r"CERTIFICATE_VERIFY_FAILED|SSLCertVerificationError|SSLError")
_NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|[Ff]ailed to establish a new connection"
    r"|[Nn]ame resolution|ConnectTimeoutError|ReadTimeoutError|Read timed out|ProxyError"
    r"|Network is unreachable|Connection refused|Connection reset|Connection aborted"
    r"|Max retries exceeded|IncompleteRead"
)
_NO_MATCH = re.compile(r"No matching distribution found for ([^\s;(]+)")
_NO_COMPILER = re.compile(
    r"command '[^']*(?:cc|\+\+|clang|nvcc|cl\.exe)' failed|Microsoft Visual C\+\+|Python\.h"
    r"|No such file or directory: '[^']*(?:cc|\+\+|clang)'|Error compiling objects"
)


class StepError(RuntimeError):
    """A step failed. The message says which, why, and what to type next."""


class Tools(NamedTuple):
    """An environment's interpreter, the file for all output, and where its lines are shown."""

    python: Path
    log: Path
    show: Callable[[str], None] = lambda line: None

    def pip(self, *arguments: str, what: str) -> str:
        """Output of `pip ARGUMENTS`; it asks nothing, and a failure is a `StepError`."""
        verb, *rest = arguments
        return self.run(
            [str(self.python), "-m", "pip", verb, "--no-input", *quiet_options(verb), *rest],
            what=what,
        )

    def run(self, command: Sequence[str], *, what: str) -> str:
        """Output of a command; a failure is a `StepError`."""
        status, output = self.attempt(command)
        if status:
            reason = explain(output, self.python.parent)
            raise StepError(f"{what}: {reason}\n  full output: {self.log}")
        return output

    def attempt(self, command: Sequence[str]) -> tuple[int, str]:
        """Exit status and output of a command; the log gets the output too."""
        lines = []
        with (
            self.log.open("a", encoding="utf-8") as log,
            subprocess.Popen(
                command,
                cwd=self.log.parent,  # holds no module that would hide an installed one
                env=clean_environment(self.python),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            ) as process,
        ):
            log.write(f"\n$ {' '.join(command)}\n")
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                log.write(line)
                log.flush()
                self.show(line.rstrip())
        return process.returncode, "".join(lines)


def quiet_options(verb: str) -> list[str]:
    """Options of pip that keep a log readable; not every command has a progress bar."""
    bar = ["--progress-bar", "off"] if verb in {"install", "download"} else []
    return ["--disable-pip-version-check", *bar]


def clean_environment(python: Path) -> dict[str, str]:
    """The user's environment variables without those that would lead an installation astray.

    What says how to reach the package index (proxies, `PIP_INDEX_URL`, certificates) stays, and so
    does `PIP_REQUIRE_VIRTUALENV`.
    """
    kept = {name: value for name, value in os.environ.items() if name not in _LEAKS}
    search = os.pathsep.join([str(python.parent), kept.get("PATH", os.defpath)])
    # Stated, not only removed: a configuration file may say "user = true" as well.
    return {**kept, "PATH": search, "PIP_USER": "0", "PYTHONNOUSERSITE": "1"}


def explain(output: str, folder: Path) -> str:
    """Why a command failed, judged by its output, and what helps; `folder` is on the disk used."""
    tail = last_lines(output, TAIL_LINES)
    if _DISK_FULL.search(tail):
        return _disk_full(folder)
    if hashes := _HASHES.search(output):
        return (
            "a downloaded file has another SHA-256 than the pinned one, nothing was installed.\n"
            f"  wanted: {hashes[1]}\n  got:    {hashes[2]}\n"
            "  The package index, or something on the way to it, hands out another file."
        )
    if _CERTIFICATE.search(tail):
        return (
            "the package index's certificate was refused. If your network has a certificate of "
            "its own, name its file: export PIP_CERT=/path/to/certificates.pem"
        )
    if _NO_NETWORK.search(tail):
        return (
            "no network: the package index cannot be reached.\n"
            "  Check the connection. Behind a proxy: export HTTPS_PROXY=http://name:port. Another "
            "index: export PIP_INDEX_URL=...\n"
            "  Then type the same command again."
        )
    if missing := _NO_MATCH.search(tail):
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return (
            f"the package index has no {missing[1]} for Python {version} on this machine, or "
            "cannot be reached.\n"
            "  A very new Python may be the reason: try another, for example "
            "make setup PYTHON=python3.12"
        )
    if _NO_COMPILER.search(tail):
        return f"compiling failed; the last lines were\n{gist(output, 8)}"
    return f"failed; the last lines were\n{gist(output, 8)}"


def explain_os_error(error: OSError, folder: Path) -> str:
    """The same for an error of the file system that this process met itself."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return _disk_full(folder)
    return f"{error.strerror or error}: {error.filename or folder}"


def free_gib(folder: Path) -> float:
    """Free disk space in GiB where the folder is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / 2**30


def last_lines(output: str, count: int) -> str:
    """The last lines that are not empty."""
    lines = [line for line in output.splitlines() if line.strip()]
    return "\n".join(lines[-count:])


def gist(output: str, count: int) -> str:
    """The last lines, indented, of the first program that pip reports on, or of pip itself.

    After a program has failed pip tells at length that this is not the fault of pip.
    """
    said = last_lines(output.split("[end of output]")[0], count)
    return "\n".join(f"    {line.strip()}" for line in said.splitlines())


def _disk_full(folder: Path) -> str:
    temporary = Path(tempfile.gettempdir())
    return (
        f"the disk is full: {free_gib(folder):.1f} GiB free at {folder}, "
        f"{free_gib(temporary):.1f} GiB at {temporary} for temporary files.\n"
        f"  torch needs about {CUDA_BUILD_GIB} GiB with CUDA, 1 GiB without.\n"
        "  Make room (pip cache purge helps), or move the temporary files: export TMPDIR=..., "
        "or choose a smaller torch: export D2D_TORCH=...\n"
        "  Then type the same command again."
    )
