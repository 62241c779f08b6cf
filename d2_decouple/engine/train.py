# SPDX-License-Identifier: Apache-2.0
"""The training loop and the evaluation, on Detectron2's trainer and hooks."""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import create_ddp_model, default_setup, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter
from detectron2.utils.logger import setup_logger
from torch import nn

from ..checkpoint import Checkpointer, CheckpointError
from ..config import ConfigError
from ..data.loader import DataError
from .failures import enough_disk
from .hooks import EarlyStop, Evaluating, Progress, Saving, forget_after
from .processes import take_buffers
from .recipe import Recipe
from .trainer import Average, BatchError, Trainer, unwrapped

__all__ = ["distributed", "evaluate", "load_weights", "set_up", "train"]

_logger = logging.getLogger(__name__)


class _Watched:
    """A test loader that raises when the training was asked to stop."""

    def __init__(self, loader: Any, trainer: Trainer) -> None:
        self._loader, self._trainer = loader, trainer

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            # Of several processes one alone must not leave: the others would wait for it.
            if self._trainer.signalled and comm.get_world_size() == 1:
                raise self._trainer.stopped()
            yield batch


class _Readable:
    """A test loader that names the test set whose image cannot be read."""

    def __init__(self, loader: Any, name: str) -> None:
        self._loader, self._name = loader, name

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (ConfigError, DataError):
                raise
            except (EOFError, OSError, SyntaxError, ValueError) as error:
                # Of a worker's error the last line is the error, what is before it a traceback.
                reason = str(error).strip().rsplit("\n", 1)[-1]
                raise DataError(
                    f"an image of the test set {self._name!r} cannot be read: {reason}. Mend it, "
                    "or take it out of its split; `python -m d2_decouple.data.checks DIR` lists "
                    "all faults of a folder. A training goes on with --resume"
                ) from error
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):
                    raise
                raise DataError(
                    f"a process that loads test images died: {error}. Type "
                    "dataloader.test.num_workers=0 (yacs: DATALOADER.NUM_WORKERS 0) to load them "
                    "without such processes. A training goes on with --resume"
                ) from error
            yield batch


def set_up(recipe: Recipe, args: argparse.Namespace) -> None:
    """Detectron2's set-up (log, seed, a backup of the config), with this package's log as well.

    Args:
        recipe: what is about to run.
        args: command-line arguments; ``eval_only`` at least.
    """
    default_setup(recipe.config, args)
    logger = setup_logger(recipe.output_dir, distributed_rank=comm.get_rank(), name="d2_decouple")
    if not _on_terminal():
        return
    for each in (logger, *map(logging.getLogger, ("detectron2", "fvcore"))):
        for handler in each.handlers:
            if not isinstance(handler, logging.FileHandler):
                # The bar says it already.
                handler.addFilter(lambda record: not getattr(record, "progress", False))
                handler.addFilter(Progress.make_room)


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
        TrainingError: a loss became infinite or NaN, or the memory or the disk is full
            (:class:`TrainingStoppedError`: a signal came).
        DataError: an image could not be loaded; the state before it is saved.
        CheckpointError: a checkpoint could not be read or written.
    """
    trainer = _trainer(recipe)
    model, average = trainer.model, trainer.average
    checkpointer = Checkpointer(
        model,
        recipe.output_dir,
        extras=_stored_with_weights(recipe, recipe.train_datasets),
        trainer=trainer,
    )
    if average is not None:
        checkpointer.add_checkpointable("ema", average)
    results: dict[str, Any] = {}

    def evaluation() -> dict[str, Any]:
        results.clear()
        evaluated = average.model if average else model
        take_buffers(evaluated)
        results.update(evaluate(recipe, evaluated, wrap=lambda loader: _Watched(loader, trainer)))
        return results

    evaluating = Evaluating(
        evaluation,
        period=recipe.eval_period,
        checkpointer=checkpointer,
        patience=recipe.patience,
    )
    trainer.register_hooks([*_hooks(recipe, trainer, checkpointer), evaluating])
    start = _start(recipe, trainer, checkpointer, resume)
    if start >= recipe.max_iter:
        _logger.info("The training of %d iterations is complete; evaluating it", recipe.max_iter)
        return evaluating.finished()
    if comm.is_main_process():
        trainer.register_hooks([hooks.PeriodicWriter(_writers(recipe, start), recipe.log_period)])
        _logger.info("Training from iteration %d to %d", start, recipe.max_iter)
    with enough_disk(recipe.output_dir, recipe.type_output_dir.format("FOLDER")):
        _run(trainer, checkpointer, start, recipe.max_iter)
    return results


def _run(trainer: Trainer, checkpointer: Checkpointer, start: int, max_iter: int) -> None:
    """Train to the end, or to where it stops early; save what there is if a batch cannot be had."""
    try:
        trainer.train(start, max_iter)
    except EarlyStop as reached:
        checkpointer.save("model_final", iteration=trainer.iter)
        comm.synchronize()  # a process that ends may end the one that saves
        _logger.info("The training was %s", reached)
    except BatchError as error:
        if trainer.iter == start:
            raise
        # The step that wanted the image has not begun, so this is the state of the one before.
        trainer.iter -= 1
        checkpointer.save(f"model_{trainer.iter:07d}", iteration=trainer.iter)
        comm.synchronize()  # a process that ends may end the one that saves
        raise DataError(
            f"{error}. {trainer.iter + 1} iterations are saved: --resume goes on from there"
        ) from error


def _trainer(recipe: Recipe) -> Trainer:
    model = recipe.model().train()
    average = None if recipe.ema_decay is None else Average(model, recipe.ema_decay)
    optimizer = recipe.optimizer(model)
    return Trainer(
        model=distributed(recipe, model),
        loader=recipe.train_loader(),
        optimizer=optimizer,
        precision=recipe.precision,
        accumulate=recipe.accumulate,
        max_grad_norm=recipe.max_grad_norm,
        average=average,
        failures=recipe.output_dir,
    )


def _start(recipe: Recipe, trainer: Trainer, checkpointer: Checkpointer, resume: bool) -> int:
    """Load what the training begins with; the first iteration to run."""
    going_on = resume and checkpointer.has_checkpoint()
    checkpointer.resume_or_load(recipe.init_checkpoint, resume=resume)
    if trainer.average is not None and not trainer.average.updates:  # switched on only now
        trainer.average.load_state_dict(unwrapped(trainer.model).state_dict())
    start = trainer.iter + 1 if going_on else 0
    starts = comm.all_gather(start)
    if len(set(starts)) > 1:
        raise CheckpointError(
            f"the processes would begin at different iterations ({', '.join(map(str, starts))}): "
            f"not all of them see the checkpoints in {recipe.output_dir}; put it on a disk that "
            f"all machines share: type {recipe.type_output_dir.format('FOLDER')}"
        )
    return start


def _hooks(recipe: Recipe, trainer: Trainer, checkpointer: Checkpointer) -> list[Any]:
    """What is done after a step, before it is evaluated."""
    saving = None  # the first process does it for all
    if comm.is_main_process():
        saving = Saving(checkpointer, eval_period=recipe.eval_period, **recipe.checkpointer)
    schedule = hooks.LRScheduler(trainer.optimizer, recipe.lr_scheduler(trainer.optimizer))
    # The state is saved after the schedule's step and before an evaluation, which may be killed.
    return [hooks.IterationTimer(), schedule, saving]


def _writers(recipe: Recipe, start: int) -> list[EventWriter]:
    """What writes numbers down, after taking out those that will come again."""
    metrics = Path(recipe.output_dir) / "metrics.json"
    forget_after(metrics, start)
    return [
        Progress(recipe.max_iter, terminal=_on_terminal()),
        JSONWriter(str(metrics)),
        TensorboardXWriter(recipe.output_dir, purge_step=start),
    ]


def _on_terminal() -> bool:
    return sys.stderr.isatty() and comm.is_main_process()


def distributed(recipe: Recipe, model: nn.Module) -> nn.Module:
    """The model itself, or wrapped for gradients over several processes, on CPUs as well."""
    device_ids = None if recipe.device == "cpu" else [torch.cuda.current_device()]
    return create_ddp_model(model, **{**recipe.ddp, "device_ids": device_ids})


def evaluate(
    recipe: Recipe, model: nn.Module, *, wrap: Callable[[Any], Any] = lambda loader: loader
) -> dict[str, Any]:
    """Evaluate on every test set: ``{"bbox": {...}}``, or that by name if there are several.

    Args:
        recipe: names the test sets.
        model: what is evaluated.
        wrap: what is put around each test loader.

    Raises:
        DataError: a test image cannot be read.
    """
    results = {}
    for name, loader, evaluator in recipe.evaluations():
        images = wrap(_Readable(loader, name))
        results[name] = inference_on_dataset(recipe.evaluated(model), images, evaluator)
        if comm.is_main_process():
            _logger.info("Evaluation results for %s in csv format:", name)
            print_csv_format(results[name])
    return next(iter(results.values())) if len(results) == 1 else results


def load_weights(recipe: Recipe, model: nn.Module, *, resume: bool = False) -> None:
    """Load ``init_checkpoint``, or with ``resume`` the last one in the output folder.

    Raises:
        CheckpointError: there is neither, or some tensor of the model would stay random.
    """
    extras = _stored_with_weights(recipe, recipe.test_datasets)
    checkpointer = Checkpointer(model, recipe.output_dir, complete=True, extras=extras)
    found = resume and checkpointer.has_checkpoint()
    if not found and not recipe.init_checkpoint:
        raise CheckpointError(
            "there are no weights to evaluate: "
            + (f"no last_checkpoint in {recipe.output_dir}, and " if resume else "")
            + "no init_checkpoint is set; type train.init_checkpoint=FILE (yacs: MODEL.WEIGHTS "
            "FILE), or --resume with the output folder of a training"
        )
    checkpointer.resume_or_load(recipe.init_checkpoint, resume=resume)


def _stored_with_weights(recipe: Recipe, datasets: Sequence[str]) -> dict[str, Any]:
    """Class names, and the config as text, so that a checkpoint says what it is."""
    config = Path(recipe.output_dir) / "config.yaml"
    classes = MetadataCatalog.get(datasets[0]).get("thing_classes") or []
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    return {"classes": list(classes), "config": text}
