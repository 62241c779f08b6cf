# SPDX-License-Identifier: Apache-2.0
"""The training loop and the evaluation, on Detectron2's trainer and hooks."""

import argparse
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    create_ddp_model,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from ..checkpoint import Checkpointer, CheckpointError
from ..config import ConfigError
from .recipe import Recipe

__all__ = [
    "EXPECTED_ERRORS",
    "TrainingError",
    "distributed",
    "evaluate",
    "load_weights",
    "set_up",
    "train",
]

_logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """A training that cannot go on; the message says why, and what to type."""


EXPECTED_ERRORS = (ConfigError, CheckpointError, TrainingError, FileNotFoundError)
"""What a user can mend: a command prints their message alone, without a traceback."""


class _Remembering:
    """The batches of a loader; ``images`` are the ids of the last one."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.images: list[str] = []
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            self.images = [str(item.get("image_id", item.get("file_name"))) for item in batch]
            yield batch


def set_up(recipe: Recipe, args: argparse.Namespace) -> None:
    """Detectron2's set-up (log, seed, a backup of the config), with this package's log as well.

    Args:
        recipe: what is about to run.
        args: command-line arguments; ``eval_only`` at least.
    """
    default_setup(recipe.config, args)
    setup_logger(recipe.output_dir, distributed_rank=comm.get_rank(), name="d2_decouple")


def train(recipe: Recipe, *, resume: bool = False) -> dict[str, Any]:
    """Train, evaluate at the end, and leave checkpoints, log and metrics in the output folder.

    Args:
        recipe: what to train.
        resume: go on from the last checkpoint in the output folder, if there is one. A finished
            training is only evaluated.

    Returns:
        The last evaluation: ``{"bbox": {"AP": ..., ...}}`` (by dataset if there are several);
        empty on all processes but the first.

    Raises:
        TrainingError: the loss became infinite or NaN.
    """
    model = recipe.model().train()
    optimizer = recipe.optimizer(model)
    model = distributed(recipe, model)
    loader = _Remembering(recipe.train_loader())
    trainer = (AMPTrainer if recipe.amp else SimpleTrainer)(model, loader, optimizer)
    checkpointer = Checkpointer(
        model, recipe.output_dir, extras=_stored_with_weights(recipe), trainer=trainer
    )
    results: dict[str, Any] = {}

    def evaluation() -> dict[str, Any]:
        results.clear()
        results.update(evaluate(recipe, model))
        return results

    saving = writing = None  # the first process does these for all
    if comm.is_main_process():
        saving = hooks.PeriodicCheckpointer(checkpointer, **recipe.checkpointer)
        writing = hooks.PeriodicWriter(
            default_writers(recipe.output_dir, recipe.max_iter), period=recipe.log_period
        )
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(optimizer, recipe.lr_scheduler(optimizer)),
            saving,
            hooks.EvalHook(recipe.eval_period, evaluation),
            writing,
        ]
    )
    checkpointer.resume_or_load(recipe.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    if start >= recipe.max_iter:
        _logger.info("The training of %d iterations is complete; evaluating it", recipe.max_iter)
        return evaluation()
    try:
        trainer.train(start, recipe.max_iter)
    except FloatingPointError as error:
        raise TrainingError(
            f"{error}\nlearning rate {optimizer.param_groups[0]['lr']:g}, images "
            f"{', '.join(loader.images)}. The weights were not updated with it. Look at these "
            "images' annotations, or lower the rate: type optimizer.lr=0.001 (yacs: "
            "SOLVER.BASE_LR 0.001); --resume goes on from the last checkpoint"
        ) from error
    return results


def distributed(recipe: Recipe, model: nn.Module) -> nn.Module:
    """The model itself, or wrapped for gradients over several processes, on CPUs as well."""
    device_ids = None if recipe.device == "cpu" else [torch.cuda.current_device()]
    return create_ddp_model(model, **{**recipe.ddp, "device_ids": device_ids})


def evaluate(recipe: Recipe, model: nn.Module) -> dict[str, Any]:
    """Evaluate on every test set: ``{"bbox": {...}}``, or that by name if there are several."""
    results = {}
    for name, loader, evaluator in recipe.evaluations():
        results[name] = inference_on_dataset(model, loader, evaluator)
        if comm.is_main_process():
            _logger.info("Evaluation results for %s in csv format:", name)
            print_csv_format(results[name])
    return next(iter(results.values())) if len(results) == 1 else results


def load_weights(recipe: Recipe, model: nn.Module, *, resume: bool = False) -> None:
    """Load ``init_checkpoint``, or with ``resume`` the last one in the output folder.

    Raises:
        CheckpointError: there is neither, or some tensor of the model would stay random.
    """
    checkpointer = Checkpointer(model, recipe.output_dir, complete=True)
    found = resume and checkpointer.has_checkpoint()
    if not found and not recipe.init_checkpoint:
        raise CheckpointError(
            "there are no weights to evaluate: "
            + (f"no last_checkpoint in {recipe.output_dir}, and " if resume else "")
            + "no init_checkpoint is set; type train.init_checkpoint=FILE (yacs: MODEL.WEIGHTS "
            "FILE), or --resume with the output folder of a training"
        )
    checkpointer.resume_or_load(recipe.init_checkpoint, resume=resume)


def _stored_with_weights(recipe: Recipe) -> dict[str, Any]:
    """Class names, and the config as text, so that a checkpoint says what it is."""
    config = Path(recipe.output_dir) / "config.yaml"
    classes = MetadataCatalog.get(recipe.train_datasets[0]).get("thing_classes") or []
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    return {"classes": list(classes), "config": text}
