# SPDX-License-Identifier: Apache-2.0
"""What the tests of the demo's looks inside have in common: weights, pictures, a call of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from util import excite, tiny_model

from d2_decouple import demo

CLASSES = ["ant", "bee", "cat"]
RECIPE = """
from util import tiny
from d2_decouple.config import get_config

cfg = tiny(get_config("{name}"))
model, dataloader = cfg.model, cfg.dataloader
dataloader.test.mapper.augmentations[0].update(short_edge_length=64, max_size=96)
"""

Files = Mapping[str, tuple[Path, Path]]


def write_trained(folder: Path, names: Iterable[str]) -> dict[str, tuple[Path, Path]]:
    """For each recipe its file and weights."""
    files = {}
    for name in names:
        files[name] = (folder / f"{name}.py", folder / f"{name}.pth")
        files[name][0].write_text(RECIPE.format(name=name))
        torch.manual_seed(0)
        model = excite(tiny_model(name), 0.7)
        torch.save({"model": model.state_dict(), "classes": CLASSES}, files[name][1])
    return files


def demo_of(
    trained: Files, folder: Path, capsys: Any, look: str, usual: str
) -> Callable[..., tuple[int, str, str]]:
    """Runs the demo on inputs; exit status, what was printed, what was complained about.

    Args:
        trained: of :func:`write_trained`.
        folder: its outputs go below.
        capsys: of the test.
        look: the option that is given where a call does not say.
        usual: the recipe, likewise.
    """

    def call(
        *inputs: Any, options: Sequence[str] = (look,), recipe: str = usual, output: str = "out"
    ) -> tuple[int, str, str]:
        config, weights = trained[recipe]
        status = demo.main(
            [
                *("--config-file", str(config), "--weights", str(weights), "--device", "cpu"),
                *("--output", str(folder / output), "--score-thresh", "0.05"),
                *("--input", *map(str, inputs), *options),
            ]
        )
        return status, *capsys.readouterr()

    return call


def save_picture(path: Path, seed: int = 0) -> Path:
    """Noise of 90 x 60 pixels."""
    noise = np.random.default_rng(seed).integers(256, size=(8, 8, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).resize((90, 60), Image.Resampling.NEAREST).save(path)
    return path


def written(folder: Path) -> list[str]:
    """Names of a folder's files."""
    return sorted(path.name for path in folder.iterdir())
