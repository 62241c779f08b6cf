# SPDX-License-Identifier: Apache-2.0
"""Make a virtual environment with torch, Detectron2 and this package.

    python3 tools/setup_env.py [--venv .venv] [--dev] [--wheel FILE]

Nothing outside the environment's folder is changed. Where everything is up to date this takes a
moment; after a failure the same command goes on where it stopped.

torch is what the package index has under that name. The variable D2D_TORCH names another one:

    D2D_TORCH="torch==2.4.1 torchvision==0.19.1"
    D2D_TORCH="torch torchvision --index-url URL"

PyTorch's installation page has the URL of builds for the CPU, which are much smaller.

The compiled operators of a checkout are built where there is a compiler. With D2D_BUILD_EXT=1 it is
an error if that fails, with D2D_BUILD_EXT=0 they are not built.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pip_steps import (
    CUDA_BUILD_GIB,
    StepError,
    Tools,
    clean_environment,
    explain_os_error,
    free_gib,
    last_lines,
)

__all__ = ["Progress", "Request", "fingerprint", "main", "set_up"]

ROOT = Path(__file__).resolve().parents[1]
MARK = "made-by-d2-decouple"
STAMP = "d2-decouple-stamp.json"
LOG = "d2-decouple-setup.log"
BUILD_TOOLS = ("pip<26", "setuptools>=77,<82", "wheel", "ninja")
STAMPED_FILES = (
    "setup.py",
    "pyproject.toml",
    "tools/build_extension.py",
    "tools/detectron2_source.py",
    "tools/environment.py",
    "tools/install_detectron2.py",
    "tools/pip_steps.py",
)
TORCH_CHECK = (
    "import torch, torchvision; "
    "torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5); "
    "print('torch', torch.__version__ + ', torchvision', torchvision.__version__)"
)
OPERATORS_CHECK = "from d2_decouple.extension import status; print(status().reason)"


class BrokenEnvironmentError(StepError):
    """What is in the environment does not work, and installing again does not mend it."""


class Request(NamedTuple):
    """What the caller asked for."""

    venv: Path
    dev: bool = False
    wheel: Path | None = None
    torch: str = "torch torchvision"
    operators: str = "auto"  # D2D_BUILD_EXT

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return self.venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def ours(self) -> bool:
        """Whether the folder was made here, so that it may be deleted and made again."""
        return (self.venv / MARK).is_file()


class Progress:
    """One line for each step; on a terminal it ends in what is being done at the moment."""

    def __init__(self) -> None:
        self._line = ""
        self._open = False
        self._live = sys.stdout.isatty()

    def step(self, title: str, action: Callable[[], str | None]) -> None:
        """Run a step between its title and its result."""
        self._line = title
        start = time.monotonic()
        self._write(f"{title} ...")
        try:
            result = action()
        except BaseException:
            self._end("failed")
            raise
        self._end(f"{result or 'done'} ({time.monotonic() - start:.0f} s)")

    def show(self, line: str) -> None:
        """A line of a program's output: only a terminal shows it, until the next one comes."""
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._write(f"\r\033[K{f'{self._line} ... {line.strip()}'[:width]}")

    def note(self, line: str) -> None:
        """A line that stays."""
        if self._open:
            self._write("\r\033[K" if self._live else "\n")
        print(f"      {line}", flush=True)
        self._open = False

    def _end(self, result: str) -> None:
        if self._live:
            self._write("\r\033[K")
            self._open = False
        print(f" {result}" if self._open else f"{self._line}: {result}", flush=True)
        self._open = False

    def _write(self, text: str) -> None:
        print(text, end="", flush=True)
        self._open = True


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of the script: 0 if the environment is complete."""
    request = _parse(arguments)
    try:
        set_up(request, Progress())
    except StepError as error:
        reason = str(error)
    except OSError as error:
        reason = explain_os_error(error, request.venv)
    except KeyboardInterrupt:
        reason = "Interrupted; the same command goes on from here."
    else:
        return 0
    print(f"\nThe set-up did not succeed: {reason}", file=sys.stderr)
    return 1


def set_up(request: Request, progress: Progress) -> None:
    """Bring the environment up to date, and stamp it when it is."""
    if is_up_to_date(request):
        print(f"{_shown(request.venv)} is up to date.")
        return
    existed = request.ours
    try:
        _run_steps(request, progress)
    except BrokenEnvironmentError as error:
        if not (existed and request.ours):
            raise
        progress.note(f"{str(error).splitlines()[0]}: {_shown(request.venv)} is made again.")
        shutil.rmtree(request.venv)
        _run_steps(request, progress)


def is_up_to_date(request: Request) -> bool:
    """Whether the stamp tells of all that is asked for, and it is still there."""
    try:
        stamp = json.loads((request.venv / STAMP).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    # Having the linters as well does not hurt who did not ask for them.
    wanted = fingerprint(request._replace(dev=request.dev or stamp.get("dev") is True))
    return stamp == wanted and _is_complete(request.python, request.dev)


def fingerprint(request: Request) -> dict[str, Any]:
    """All that decides what is installed."""
    files = [ROOT / name for name in STAMPED_FILES]
    files += sorted(file for file in (ROOT / "csrc").rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in [*files, *([request.wheel] if request.wheel else [])]:
        digest.update(f"{file.name}\0".encode())
        digest.update(file.read_bytes())
    return {
        "torch": request.torch,
        "operators": request.operators,
        "dev": request.dev,
        "package": str(request.wheel or ROOT),
        "sha256": digest.hexdigest(),
    }


def _run_steps(request: Request, progress: Progress) -> None:
    tools = Tools(request.python, request.venv / LOG, progress.show)
    steps: list[tuple[str, Callable[[], str | None]]] = [
        ("virtual environment", lambda: _make_venv(request)),
        ("pip, setuptools, ninja", lambda: _install_build_tools(request, tools)),
        ("torch and torchvision", lambda: _install_torch(request, tools, progress)),
        ("Detectron2", lambda: _install_detectron2(tools, progress)),
        ("d2-decouple", lambda: _install_package(request, tools)),
    ]
    for number, (title, action) in enumerate(steps, start=1):
        progress.step(f"[{number}/{len(steps)}] {title}", action)
    # Written at the end and in one move: a stamp means that all of it succeeded.
    fresh = request.venv / f"{STAMP}.new"
    fresh.write_text(json.dumps(fingerprint(request), indent=2), encoding="utf-8")
    fresh.replace(request.venv / STAMP)


def _make_venv(request: Request) -> str:
    """Make it, or find out whether the one that is there can be used."""
    folder = request.venv
    if folder.exists() and not folder.is_dir():
        raise StepError(f"{folder} is a file. Name another folder by --venv.")
    if folder.is_dir() and any(folder.iterdir()):
        if version := _usable_python(request.python):
            (folder / STAMP).unlink(missing_ok=True)
            (folder / LOG).unlink(missing_ok=True)
            return f"{_shown(folder)} has Python {version}"
        if not request.ours:
            raise StepError(
                f"{folder} is not a virtual environment with Python 3.10 or newer and pip that "
                "works, and was not made here, so it is left alone. Delete it, or name another "
                "folder by --venv."
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    tools = Tools(Path(sys.executable), folder / LOG)
    status, output = tools.attempt([sys.executable, "-I", "-m", "venv", str(folder)])
    if status and "ensurepip" in output:
        name = f"python{sys.version_info.major}.{sys.version_info.minor}"
        raise StepError(
            f"{sys.executable} cannot make virtual environments: its module ensurepip is missing."
            f"\n  On Debian and Ubuntu type: sudo apt install {name}-venv"
        )
    version = _usable_python(request.python)
    if status or not version:
        raise StepError(f"making {folder} failed; the last lines were\n{last_lines(output, 8)}")
    return f"{_shown(folder)} made with Python {version}"


def _install_build_tools(request: Request, tools: Tools) -> None:
    # The pip of an environment that somebody else made stays as it is.
    wanted = [name for name in BUILD_TOOLS if request.ours or not name.startswith("pip")]
    tools.pip("install", *wanted, what="installing pip, setuptools and ninja")


def _install_torch(request: Request, tools: Tools, progress: Progress) -> str:
    free = free_gib(request.venv)
    if not _is_found(request.python, "torch") and free < CUDA_BUILD_GIB:
        progress.note(
            f"only {free:.1f} GiB of disk are free: torch needs about {CUDA_BUILD_GIB} GiB with "
            "CUDA, 1 GiB without"
        )
    tools.pip("install", *shlex.split(request.torch), what="installing torch and torchvision")
    status, output = tools.attempt([str(tools.python), "-c", TORCH_CHECK])
    if status:
        raise BrokenEnvironmentError(
            f"torch and torchvision are installed, but do not work ("
            f"{last_lines(output, 1) or f'the import ends with status {status}'})\n"
            f"  Delete {request.venv} and type the same command again; D2D_TORCH chooses other "
            "versions."
        )
    return last_lines(output, 1)


def _install_detectron2(tools: Tools, progress: Progress) -> None:
    script = ROOT / "tools" / "install_detectron2.py"
    status, _ = tools._replace(show=progress.note).attempt([str(tools.python), str(script)])
    if status:
        raise StepError(
            f"Detectron2, for the reason above.\n  full output: {tools.log}, and "
            f"{tools.log.parent / 'install_detectron2.log'}"
        )


def _install_package(request: Request, tools: Tools) -> str:
    extra = "[dev]" if request.dev else ""
    if request.wheel:
        # The same version may be installed from another wheel, which pip would keep.
        options = ["--no-deps", "--force-reinstall"]
        tools.pip("install", *options, str(request.wheel), what="installing the wheel")
        target = [f"{request.wheel}{extra}"]
    else:
        target = ["--no-build-isolation", "--editable", f"{ROOT}{extra}"]
    tools.pip("install", *target, what="installing d2-decouple and what it needs")
    if not _is_complete(request.python, request.dev):
        raise BrokenEnvironmentError("not all that was installed can be found")
    said = _python_says(request.python, OPERATORS_CHECK)
    return f"operators: {said or 'not usable; python -m d2_decouple.collect_env says why'}"


def _is_complete(python: Path, dev: bool) -> bool:
    names = ["torch", "torchvision", "detectron2", "d2_decouple"]
    return _is_found(python, *names, *(["pytest", "mypy"] if dev else []))


def _is_found(python: Path, *names: str) -> bool:
    """Whether the environment has these modules; they are not imported, which takes long."""
    code = f"from importlib.util import find_spec; assert all(map(find_spec, {names!r}))"
    return _python_says(python, code) is not None


def _usable_python(python: Path) -> str:
    """Version of an environment's Python, empty if it is too old or does not run, or has no pip."""
    code = "import sys, pip; assert sys.version_info >= (3, 10); print(sys.version.split()[0])"
    return _python_says(python, code) or ""


def _python_says(python: Path, code: str) -> str | None:
    """What the code prints, None if it fails."""
    if not python.exists():
        return None
    try:
        done = subprocess.run(
            [str(python), "-c", code],
            cwd=python.parent,
            env=clean_environment(python),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _parse(arguments: Sequence[str] | None) -> Request:
    parser = argparse.ArgumentParser(
        prog="setup_env.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--venv", type=Path, default=ROOT / ".venv", help="its folder (default: %(default)s)"
    )
    parser.add_argument("--dev", action="store_true", help="also pytest, the linters and build")
    parser.add_argument(
        "--wheel", type=Path, help="install this wheel; without it the checkout, editable"
    )
    args = parser.parse_args(arguments)
    if args.wheel and not (args.wheel.suffix == ".whl" and args.wheel.is_file()):
        parser.error(f"--wheel: there is no wheel {args.wheel}")
    # Commands run in another folder. Links are kept: the folder's own name is what users know.
    wheel = args.wheel.absolute() if args.wheel else None
    torch = os.environ.get("D2D_TORCH", "").strip() or "torch torchvision"
    operators = os.environ.get("D2D_BUILD_EXT", "auto")
    return Request(args.venv.absolute(), args.dev, wheel, torch, operators)


def _shown(folder: Path) -> str:
    """The folder as one would type it."""
    return str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)
