# SPDX-License-Identifier: Apache-2.0
"""Report what is installed and what is missing: `python -m d2_decouple.collect_env`.

Every library is imported in a process of its own. So one that is absent, raises or even crashes
while it is imported costs one row of the report and not the report.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from d2_decouple import __version__

__all__ = ["collect", "format_report", "main"]

Rows = list[tuple[str, str]]

PROBE_SECONDS = 120
TOOL_SECONDS = 20


def collect() -> tuple[Rows, list[str]]:
    """Rows of (what, value), and one line for each thing that is missing or broken."""
    rows = [*_platform_rows(), *_build_rows(), *_package_rows()]
    problems: list[str] = []
    with ThreadPoolExecutor() as pool:
        for name, (found, reason) in zip(_PROBES, pool.map(_run_probe, _PROBES), strict=True):
            rows += found
            if reason:
                rows.append((name, reason))
                problems.append(f"{name}: {reason}. {_REMEDIES[name]}")
    return rows, problems


def format_report(rows: Rows, problems: list[str]) -> str:
    """The rows as a table of two columns, and below it what to do about each problem."""
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines.append("")
    lines += [f"! {line}" for line in problems] or ["Nothing is missing."]
    return "\n".join(lines)


def main() -> None:
    """Print the report; what is missing is a finding, so the exit status is 0 all the same."""
    parser = argparse.ArgumentParser(prog="python -m d2_decouple.collect_env", description=__doc__)
    parser.add_argument("--probe", choices=list(_PROBES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        print(json.dumps(_PROBES[args.probe]()))
    else:
        print(format_report(*collect()))


def _platform_rows() -> Rows:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    datasets = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    origin = "set" if "DETECTRON2_DATASETS" in os.environ else "not set, so the default"
    state = "exists" if datasets.is_dir() else "does not exist"
    return [
        ("platform", platform.platform()),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("CPU cores", f"{os.cpu_count()}, of which this process may use {usable}"),
        ("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "not set")),
        ("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "not set")),
        ("DETECTRON2_DATASETS", f"{datasets.absolute()} ({origin}; the folder {state})"),
    ]


def _build_rows() -> Rows:
    """What would compile the operators, and the variables that say whether to."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = (f"{home}/bin/nvcc",) if home else ("nvcc", "/usr/local/cuda/bin/nvcc")
    return [
        ("C++ compiler", _tool(shlex.split(os.environ.get("CXX", "c++"))[0])),
        ("ninja", _tool(str(Path(sys.executable).with_name("ninja")), "ninja")),
        ("nvcc", _tool(*nvcc)),
        ("D2D_BUILD_EXT", os.environ.get("D2D_BUILD_EXT", "not set, so auto")),
        ("D2D_USE_EXT", os.environ.get("D2D_USE_EXT", "not set, so 1")),
    ]


def _tool(*commands: str) -> str:
    """Version and place of the first of these programs that is there."""
    path = next(filter(None, map(shutil.which, commands)), None)
    if path is None:
        return f"none (sought: {', '.join(commands)})"
    try:
        done = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TOOL_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path}, which does not run: {error}"
    if done.returncode:
        return f"{path}, which does not run: exit status {done.returncode}"
    lines = done.stdout.splitlines() or ["unknown version"]
    # The first line of most tells the version; nvcc's is in the one with its release.
    return f"{next((line for line in lines if ' release ' in line), lines[0])}: {path}"


def _package_rows() -> Rows:
    package = Path(__file__).resolve().parent
    return [("d2_decouple", f"{__version__}, {_install_kind(package)}: {package}")]


def _install_kind(package: Path) -> str:
    if not (package.parent / "pyproject.toml").is_file():
        return "installed from a wheel"
    try:
        origin = importlib.metadata.distribution("d2-decouple").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        origin = None
    editable = json.loads(origin or "{}").get("dir_info", {}).get("editable", False)
    return "editable install of a checkout" if editable else "checkout that is not installed"


def _probe_torch() -> Rows:
    import torch

    rows = [
        ("torch", f"{torch.__version__} ({torch.get_num_threads()} threads)"),
        ("torch's CUDA", f"{torch.version.cuda or 'built without'}"),
    ]
    if not torch.cuda.is_available():
        return [*rows, ("CUDA devices", "none that can be used: everything runs on the CPU")]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        rows.append((f"CUDA device {index}", f"{name}, compute capability {major}.{minor}"))
    return rows


def _probe_torchvision() -> Rows:
    import torch
    import torchvision

    # The first import succeeds in some builds whose operators do not fit the installed torch.
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    torchvision.ops.nms(boxes, torch.ones(1), 0.5)
    return [("torchvision", torchvision.__version__)]


def _probe_pycocotools() -> Rows:
    importlib.import_module("pycocotools.mask")
    return [("pycocotools", importlib.metadata.version("pycocotools"))]


def _probe_detectron2() -> Rows:
    import detectron2

    importlib.import_module("detectron2.structures")
    return [
        ("detectron2", f"{detectron2.__version__}: {Path(detectron2.__file__).parent}"),
        ("detectron2._C", _compiled_part_of_detectron2()),
    ]


def _compiled_part_of_detectron2() -> str:
    spec = importlib.util.find_spec("detectron2._C")
    without = "only rotated boxes, its own deformable convolution and fast COCO evaluation need it"
    if spec is None or spec.origin is None:
        return f"absent ({without})"
    if not spec.origin.endswith(tuple(EXTENSION_SUFFIXES)):
        return f"a stub in Python ({without})"
    try:
        importlib.import_module("detectron2._C")
    except ImportError as error:
        return f"compiled, but it cannot be loaded: {error}"
    return "compiled"


def _probe_recipes() -> Rows:
    from d2_decouple.config import config_names, configs_root

    return [("recipes", f"{len(config_names())} below {configs_root()}")]


def _probe_operators() -> Rows:
    from d2_decouple.extension import status

    operators = status()
    unused = "" if operators.loaded else "none, so PyTorch's own are used: "
    return [("compiled operators", f"{unused}{operators.reason}")]


def _version_probe(module: str, row: str | None = None) -> Callable[[], Rows]:
    def probe() -> Rows:
        return [(row or module, importlib.import_module(module).__version__)]

    return probe


_PROBES: dict[str, Callable[[], Rows]] = {
    "torch": _probe_torch,
    "torchvision": _probe_torchvision,
    "numpy": _version_probe("numpy"),
    "cv2": _version_probe("cv2", "cv2 (OpenCV)"),
    "PIL": _version_probe("PIL", "PIL (Pillow)"),
    "pycocotools": _probe_pycocotools,
    "matplotlib": _version_probe("matplotlib"),
    "omegaconf": _version_probe("omegaconf"),
    "detectron2": _probe_detectron2,
    "recipes": _probe_recipes,
    "compiled operators": _probe_operators,
}

_REMEDIES = {
    "torch": "Install it: pip install torch torchvision",
    "torchvision": "Install the one that belongs to your torch: pip install torch torchvision",
    "numpy": "Install it: pip install numpy",
    "cv2": (
        "Install the build that needs no libGL: "
        "pip uninstall opencv-python; pip install --force-reinstall opencv-python-headless"
    ),
    "PIL": "Install it: pip install Pillow",
    "pycocotools": "Install it: pip install pycocotools",
    "matplotlib": "Install it: pip install matplotlib",
    "omegaconf": "Install it: pip install omegaconf",
    "detectron2": "Install it from a checkout of d2-decouple: python tools/install_detectron2.py",
    "compiled operators": (
        "Build them again in a checkout: D2D_BUILD_EXT=1 pip install --no-build-isolation -e . "
        "To do without them: export D2D_USE_EXT=0"
    ),
    "recipes": "Mend what is named above; if nothing is, install d2-decouple again",
}


def _run_probe(name: str) -> tuple[Rows, str]:
    """Rows found by one probe, and why there are none (empty where there are)."""
    command = [sys.executable, "-m", "d2_decouple.collect_env", "--probe", name]
    # The child must look where this process looks, also after changes to sys.path.
    search = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": search},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return [], f"importing it takes longer than {PROBE_SECONDS} seconds"
    if done.returncode == 0:
        return [(row, value) for row, value in json.loads(done.stdout.splitlines()[-1])], ""
    if done.returncode < 0:
        return [], f"crashes while it is imported (signal {-done.returncode})"
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    if last == f"ModuleNotFoundError: No module named '{name}'":
        return [], "not installed"
    return [], f"cannot be imported ({last})"


if __name__ == "__main__":
    main()
