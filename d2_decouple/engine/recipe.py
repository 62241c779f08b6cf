# SPDX-License-Identifier: Apache-2.0
"""One view of both kinds of config, so that there is one training loop."""

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from omegaconf import DictConfig, ListConfig
from torch import nn

from ..config import ConfigError, door_model
from ..data import coco_evaluator, register_bccd, require_dataset
from ..modeling import OneStageDetector

__all__ = ["Recipe", "check_recipe", "lazy_recipe", "yacs_recipe"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a training needs, as factories and numbers.

    Attributes:
        config: the config it came from (omegaconf or yacs), for the log and the backup.
        output_dir: where everything is written.
        device: where the model goes.
        max_iter: number of iterations.
        init_checkpoint: weights to start from, or "".
        amp: mixed precision.
        ddp: options of DistributedDataParallel.
        checkpointer: options of the periodic checkpointer.
        eval_period: iterations between evaluations; 0 for one at the end.
        log_period: iterations between lines in the log.
        train_datasets: names of the training sets.
        test_datasets: names of the test sets.
        num_classes: how many classes the model predicts, None if the config does not say.
        type_num_classes: what to type to change that, with ``{}`` for the value.
        type_output_dir: likewise for the output folder.
        type_device: likewise for the device.
        model: builds the model on ``device``.
        optimizer: builds the optimizer of a model.
        lr_scheduler: builds, for an optimizer, what Detectron2's ``LRScheduler`` hook takes.
        train_loader: builds the training loader.
        evaluations: builds, for each test set, its name, loader and evaluator.
    """

    config: Any
    output_dir: str
    device: str
    max_iter: int
    init_checkpoint: str
    amp: bool
    ddp: dict[str, Any]
    checkpointer: dict[str, Any]
    eval_period: int
    log_period: int
    train_datasets: tuple[str, ...]
    test_datasets: tuple[str, ...]
    num_classes: int | None
    type_num_classes: str
    type_output_dir: str
    type_device: str
    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    lr_scheduler: Callable[[torch.optim.Optimizer], Any]
    train_loader: Callable[[], Iterable[Any]]
    evaluations: Callable[[], Iterable[tuple[str, Iterable[Any], DatasetEvaluator]]]


def lazy_recipe(cfg: DictConfig) -> Recipe:
    """The recipe of a LazyConfig with ``model``, ``dataloader``, ``optimizer``, ``train``, ..."""
    _require_keys(cfg, ("model", "dataloader", "optimizer", "lr_multiplier", "train"))
    options, test_set = cfg.train, cfg.dataloader.test.dataset
    if len(_names(test_set.names)) != 1:
        raise ConfigError(
            f"dataloader.test.dataset.names is {list(test_set.names)}: one test set is evaluated "
            "at a time; name one, or use a yacs config with several DATASETS.TEST"
        )
    (test_set.names,) = _names(test_set.names)

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        cfg.optimizer.params.model = model
        return instantiate(cfg.optimizer)

    def evaluations() -> Iterable[tuple[str, Iterable[Any], DatasetEvaluator]]:
        yield (
            test_set.names,
            instantiate(cfg.dataloader.test),
            instantiate(cfg.dataloader.evaluator),
        )

    return Recipe(
        config=cfg,
        output_dir=str(options.output_dir),
        device=str(options.device),
        max_iter=options.max_iter,
        init_checkpoint=options.init_checkpoint,
        amp=options.amp.enabled,
        ddp=dict(options.ddp),
        checkpointer=dict(options.checkpointer),
        eval_period=options.eval_period,
        log_period=options.log_period,
        train_datasets=_names(cfg.dataloader.train.dataset.names),
        test_datasets=(test_set.names,),
        num_classes=cfg.model.get("num_classes"),
        type_num_classes="model.num_classes={}",
        type_output_dir="train.output_dir={}",
        type_device="train.device={}",
        model=lambda: instantiate(cfg.model).to(options.device),
        optimizer=optimizer,
        lr_scheduler=lambda _: instantiate(cfg.lr_multiplier),
        train_loader=lambda: instantiate(cfg.dataloader.train),
        evaluations=evaluations,
    )


def yacs_recipe(cfg: CfgNode) -> Recipe:
    """The recipe of a yacs config whose model comes through ``MODEL.DECOUPLE``."""
    if cfg.TEST.PRECISE_BN.ENABLED:
        raise ConfigError("TEST.PRECISE_BN.ENABLED is not supported here: set it to False")
    register_bccd()
    ours = OneStageDetector.__name__ == cfg.MODEL.META_ARCHITECTURE
    num_classes = door_model(cfg).num_classes if ours else None

    def evaluations() -> Iterable[tuple[str, Iterable[Any], DatasetEvaluator]]:
        for name in cfg.DATASETS.TEST:
            evaluator = coco_evaluator(dataset_name=name, output_dir=cfg.OUTPUT_DIR)
            yield name, build_detection_test_loader(cfg, name), evaluator

    return Recipe(
        config=cfg,
        output_dir=cfg.OUTPUT_DIR,
        device=cfg.MODEL.DEVICE,
        max_iter=cfg.SOLVER.MAX_ITER,
        init_checkpoint=cfg.MODEL.WEIGHTS,
        amp=cfg.SOLVER.AMP.ENABLED,
        ddp={"broadcast_buffers": False},
        checkpointer={"period": cfg.SOLVER.CHECKPOINT_PERIOD, "max_to_keep": 2},
        eval_period=cfg.TEST.EVAL_PERIOD,
        log_period=20,
        train_datasets=tuple(cfg.DATASETS.TRAIN),
        test_datasets=tuple(cfg.DATASETS.TEST),
        num_classes=num_classes,
        type_num_classes="MODEL.DECOUPLE.NUM_CLASSES {}",
        type_output_dir="OUTPUT_DIR {}",
        type_device="MODEL.DEVICE {}",
        model=lambda: build_model(cfg),
        optimizer=lambda model: build_optimizer(cfg, model),
        lr_scheduler=lambda optimizer: build_lr_scheduler(cfg, optimizer),
        train_loader=lambda: build_detection_train_loader(cfg),
        evaluations=evaluations,
    )


def check_recipe(recipe: Recipe, *, training: bool = True) -> None:
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
    _check_writable(recipe.output_dir, recipe.type_output_dir.format("FOLDER"))


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


def _require_keys(cfg: DictConfig, keys: Sequence[str]) -> None:
    missing = [key for key in keys if key not in cfg]
    if missing:
        raise ConfigError(
            f"this config has no {', '.join(missing)}: a recipe needs {', '.join(keys)}, as "
            "configs/baselines/fcos_R_50_FPN_1x.py has them"
        )


def _names(names: Any) -> tuple[str, ...]:
    return tuple(names) if isinstance(names, list | tuple | ListConfig) else (names,)
