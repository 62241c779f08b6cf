# SPDX-License-Identifier: Apache-2.0
"""The compiled part of the package, which is optional: whether it is loaded, and why not.

The build leaves ``_C_build.json`` beside it (tools/build_extension.py), also where nothing was
compiled. ``D2D_USE_EXT=0`` keeps it from being loaded, so that everything runs in PyTorch.
"""

import importlib
import json
import os
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

from .config import ConfigError

__all__ = ["Status", "status"]

MODULE = f"{__package__}._C"
RECORD = Path(__file__).with_name("_C_build.json")
BUILD = "to build it, type in a checkout: D2D_BUILD_EXT=1 pip install --no-build-isolation -e ."


class Status(NamedTuple):
    """What of the extension can be used."""

    loaded: bool  # the operators are registered
    cpu: bool  # they have a kernel for the CPU
    cuda: bool  # they have a kernel for CUDA
    reason: str  # which path is in use, and why


@cache
def status() -> Status:
    """Load the extension once and say what came of it.

    Raises:
        ConfigError: ``D2D_USE_EXT`` is neither 0 nor 1.
    """
    wanted = os.environ.get("D2D_USE_EXT") or "1"
    if wanted not in ("0", "1"):
        raise ConfigError(
            f"D2D_USE_EXT is {wanted!r}; wanted is 1 (use the compiled operators where there are "
            "some, as without the variable) or 0 (use PyTorch's)"
        )
    if wanted == "0":
        return _unloaded("not loaded, because D2D_USE_EXT=0")
    record, unreadable = _read_record()
    # Beside this file only: an editable install of another checkout would offer its own.
    if PathFinder.find_spec(MODULE, [str(RECORD.parent)]) is None:
        return _unloaded(f"not built ({record.get('missing') or unreadable}); {BUILD}")
    if unreadable:
        return _unloaded(f"not loaded, because {unreadable}; {BUILD}")
    return _load(record)


def _load(record: dict[str, Any]) -> Status:
    try:
        import torch  # its libraries must be in the process before ours
    except (ImportError, OSError) as error:
        return _unloaded(f"not loaded, because PyTorch cannot be imported: {error}")
    if _minor(record["torch"]) != _minor(torch.__version__):
        # Between minor versions the layout of PyTorch's classes changes, and calls crash.
        return _unloaded(
            f"not loaded, because it was built for torch {record['torch']}, and this is torch "
            f"{torch.__version__}; {BUILD}"
        )
    try:
        importlib.import_module(MODULE)
    except ImportError as error:
        return _unloaded(f"it cannot be loaded: {error}; {BUILD}")
    missing = f"; {record['missing']}" if record.get("missing") else ""
    if record.get("cuda"):
        cuda = f" and CUDA {record['cuda']} ({record.get('architectures')})"
        return Status(True, True, True, f"compiled for the CPU{cuda}{missing}")
    return Status(True, True, False, f"compiled for the CPU{missing}")


def _read_record() -> tuple[dict[str, Any], str]:
    """What the build has left, and why that cannot be read, if so."""
    try:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {}, f"nothing tells how it was built ({RECORD.name}: {error})"
    if not isinstance(record, dict) or not isinstance(record.get("torch", 0), str | None):
        return {}, f"nothing tells how it was built ({RECORD.name} has no version of torch)"
    return record, ""


def _minor(version: str | None) -> list[str]:
    """("2.15.0+cu132") -> ["2", "15"]."""
    return (version or "").split(".")[:2]


def _unloaded(reason: str) -> Status:
    return Status(False, False, False, reason)
