# SPDX-License-Identifier: Apache-2.0
"""Trainings of tiny detectors in processes of their own, for the tools that break and watch them.

The recipe is written by ``tests/faults/tiny_training.py``, the images are generated: both need a
checkout.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from d2_decouple.data.shapes import make_shapes
from d2_decouple.engine.methods import METHODS, chosen_recipe

__all__ = [
    "PATHS",
    "ROOT",
    "RunError",
    "TinyTraining",
    "differences",
    "free_port",
    "rank_of",
    "start",
]

ROOT = Path(__file__).resolve().parents[1]
_RECIPE = """from tiny_training import tiny_training

dataloader, lr_multiplier, model, optimizer, train = tiny_training("{recipe}")
"""
PATHS = (str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "faults"))
_PRELOADED = ["d2_decouple.train", "d2_decouple.modeling", "torchvision.ops"]


class RunError(RuntimeError):
    """A training that did not do what it must; the message says what, and where its words are."""


class TinyTraining:
    """A method's training on generated images, and how to call it.

    Attributes:
        folder: holds data, recipe and what the trainings write.
        method: its name.
    """

    def __init__(
        self, folder: Path, method: str, *, iterations: int, options: Sequence[str] = ()
    ) -> None:
        """
        Args:
            folder: a new one is made; one of an earlier call is used again.
            method: one of d2_decouple.engine.methods.METHODS.
            iterations: of the whole training.
            options: further ``key=value`` overrides.
        """
        self.folder, self.method = folder, method
        self._options = [f"train.max_iter={iterations}", *options]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.py").write_text(_RECIPE.format(recipe=recipe_of(method)))
        if not (folder / "data").is_dir():
            make_shapes(folder / "data", images=12, size=(64, 96))

    def arguments(self, output: Path, *options: str, resume: bool = False) -> list[str]:
        """The arguments of ``python -m d2_decouple.train``."""
        words = ["--config-file", str(self.folder / "recipe.py")]
        words += ["--dataset", str(self.folder / "data"), *["--resume"][: int(resume)]]
        return [*words, f"train.output_dir={output}", *self._options, *options]


def recipe_of(method: str) -> str:
    """The recipe for COCO of a method with its first host, whose batch norms are frozen."""
    return chosen_recipe(method, next(iter(METHODS[method])) or None, "l")


def start(
    arguments: Sequence[str], console: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Start a training in a process and session of its own, forked from one that has imported all.

    Args:
        arguments: of ``python -m d2_decouple.train``.
        console: what the process says is appended to this file.
        environment: further variables.
    """
    for path in PATHS:
        if path not in sys.path:
            sys.path.insert(0, path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    console.parent.mkdir(parents=True, exist_ok=True)
    process = context.Process(
        target=_train, args=(list(arguments), str(console), dict(environment or {}))
    )
    process.start()
    return process


def _train(arguments: list[str], console: str, environment: dict[str, str]) -> None:
    os.setsid()  # its group, with its workers, can be killed as a whole
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    file = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method("fork", force=True)  # of its workers, as in any training

    import torch

    from d2_decouple.train import main

    torch.set_num_threads(1)
    status = main(arguments)
    sys.stdout.flush()
    sys.exit(status)


def _end_with_parent() -> None:
    """A training does not outlive the tool that started it, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)


def rank_of(rank: int, processes: int, port: int) -> dict[str, str]:
    """The environment variables by which processes of this machine meet, as torchrun sets them."""
    values: dict[str, Any] = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "tiny",
    }
    return {name: str(value) for name, value in values.items()}


def free_port() -> int:
    """A port of this machine where nobody listens now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def differences(one: Any, two: Any, path: str = "") -> list[str]:
    """Paths at which two checkpoints are not bit-equal."""
    if isinstance(one, dict) and isinstance(two, dict):
        found = [path] if one.keys() != two.keys() else []
        shared = one.keys() & two.keys()
        return found + [
            x for key in shared for x in differences(one[key], two[key], f"{path}/{key}")
        ]
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        found = [path] if len(one) != len(two) else []
        pairs = enumerate(zip(one, two, strict=False))
        return found + [x for i, (a, b) in pairs for x in differences(a, b, f"{path}/{i}")]
    if hasattr(one, "dtype") and hasattr(two, "dtype"):
        same = one.dtype == two.dtype and one.shape == two.shape and bool((one == two).all())
    else:
        same = one == two
    return [] if same else [path]
