# SPDX-License-Identifier: Apache-2.0
"""The tools that break and watch trainings, as modules; a training that is broken from inside."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from d2_decouple.engine.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))

faults = importlib.import_module("faults")
on_paper = importlib.import_module("on_paper")
slurm_train = importlib.import_module("slurm_train")
soak = importlib.import_module("soak")
tiny_runs = importlib.import_module("tiny_runs")

STEPS = 4
IN_PROCESS = (  # what a test does to the training reaches the loading of images, too
    "dataloader.train.num_workers=0",
    "train.eval_period=0",
    "train.checkpointer.period=1",
)


def tiny(folder: Path, *options: str, iterations: int = STEPS) -> object:
    return tiny_runs.TinyTraining(
        folder, "fcos", iterations=iterations, options=[*IN_PROCESS, *options]
    )


def at_forward(
    monkeypatch: pytest.MonkeyPatch, number: int, happens: Callable[[], None]
) -> list[Sequence[str]]:
    """Let something happen before a forward pass, counted from 1; the images of all passes."""
    forward, seen = Trainer._losses, []

    def losses(self, batch):
        if len(seen) + 1 == number:
            happens()
        seen.append([Path(item["file_name"]).name for item in batch])
        return forward(self, batch)

    monkeypatch.setattr(Trainer, "_losses", losses)
    return seen
