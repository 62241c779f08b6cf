# SPDX-License-Identifier: Apache-2.0
"""What is looked at before the first iteration: a recipe's values, and its data."""

import logging
import os
import tempfile
from pathlib import Path

import torch
from detectron2.data import MetadataCatalog
from detectron2.utils import comm

from ..config import ConfigError
from ..data import require_dataset
from ..data.checks import check_datasets
from ..data.loader import DataError
from .recipe import Recipe

__all__ = ["check_data", "check_recipe"]

_logger = logging.getLogger(__name__)


def check_recipe(recipe: Recipe, *, training: bool = True, resume: bool = False) -> None:
    """Stop before the first iteration on what would fail, or silently go wrong, later.

    Raises:
        ConfigError: an unknown dataset, a class count that differs from the data's, mixed
            precision or devices that are not there, an output folder that cannot be written.
            The message says what to type.
    """
    for name in (*(recipe.train_datasets if training else ()), *recipe.test_datasets):
        try:
            require_dataset(name)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        classes = MetadataCatalog.get(name).get("thing_classes")
        if classes and recipe.num_classes not in (None, len(classes)):
            raise ConfigError(
                f"the model predicts {recipe.num_classes} classes, dataset {name!r} has "
                f"{len(classes)} ({', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''});"
                f" type {recipe.type_num_classes.format(len(classes))}"
            )
    if recipe.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"the config wants device {recipe.device!r}, but torch sees no GPU; type "
            f"{recipe.type_device.format('cpu')}"
        )
    if not isinstance(recipe.max_iter, int) or recipe.max_iter < 1:
        raise ConfigError(
            f"the number of iterations must be a whole number from 1, got {recipe.max_iter!r}; "
            "type train.max_iter=1000 (yacs: SOLVER.MAX_ITER 1000)"
        )
    if recipe.precision is torch.float16 and recipe.device == "cpu":
        _logger.warning(
            "float16 on a CPU is many times slower than float32; train.amp.dtype=bfloat16 is not"
        )
    other_folder = recipe.type_output_dir.format("FOLDER")
    _check_writable(recipe.output_dir, other_folder)
    last = Path(recipe.output_dir) / "last_checkpoint"
    if training and not resume and last.is_file():
        name = last.read_text(errors="replace").strip()
        raise ConfigError(
            f"{recipe.output_dir} holds an earlier training ({name}), which a new one would "
            f"overwrite; type --resume to go on with it, or {other_folder}"
        )


def check_data(recipe: Recipe, *, training: bool = True) -> None:
    """Look for what would stop or spoil a training in its data; warnings go to the log.

    The first process does it for all. Images' headers are read, of at most some thousands.

    Raises:
        DataError: there is such a fault.
    """
    if not comm.is_main_process():
        return
    report = check_datasets(
        recipe.train_datasets if training else (),
        recipe.test_datasets,
        num_classes=recipe.num_classes,
        decode=False,
    )
    for line in report.warnings:
        _logger.warning("%s", line)
    if report.faults:
        raise DataError(
            "\n".join(["these faults in the data would stop or spoil a training:", *report.faults])
            + "\n`python -m d2_decouple.data.checks` with the folder lists them all"
        )


def _check_writable(folder: str, remedy: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"the output folder {os.path.abspath(folder)} cannot be written "
            f"({error.strerror}); type {remedy} with one that can"
        ) from error
