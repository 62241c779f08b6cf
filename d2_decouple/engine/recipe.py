# SPDX-License-Identifier: Apache-2.0
"""One view of both kinds of config, so that there is one training loop."""

import copy
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from omegaconf import DictConfig, ListConfig
from torch import nn

from ..config import ConfigError, door_recipe
from ..data import register_bccd
from ..data.augmentation import BoxAwareMapper
from ..data.loader import TrainLoader
from ..evaluation import BoxEvaluator
from ..modeling import (
    DecoupledROIHeads,
    DecoupledRPN,
    OneStageDetector,
    TestTimeAugmentation,
)
from .trainer import Loader, unwrapped
from .unread_keys import refuse_unread

__all__ = ["Recipe", "lazy_recipe", "yacs_recipe"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a training needs, as factories and numbers.

    Attributes:
        config: the config it came from (omegaconf or yacs), for the log and the backup.
        output_dir: where everything is written.
        device: where the model goes.
        max_iter: number of iterations.
        init_checkpoint: weights to start from, or "".
        precision: dtype of autocast in training; None for full precision.
        accumulate: batches of a training step.
        max_grad_norm: norm that gradients are scaled down to, or None.
        ema_decay: of the averaged weights, or None for no average.
        patience: evaluations without a better AP that end the training; 0 for none.
        seed: of weights, order and augmentation; negative for one that is drawn.
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
        evaluated: what is run of a model in evaluation: itself, or test-time augmentation of it.
    """

    config: Any
    output_dir: str
    device: str
    max_iter: int
    init_checkpoint: str
    precision: torch.dtype | None
    accumulate: int
    max_grad_norm: float | None
    ema_decay: float | None
    patience: int
    seed: int
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
    train_loader: Callable[[], Loader]
    evaluations: Callable[[], Iterable[tuple[str, Iterable[Any], DatasetEvaluator]]]
    evaluated: Callable[[nn.Module], nn.Module] = lambda model: model


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
    key, num_classes = _class_count(cfg.model)

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        cfg.optimizer.params.model = model
        return instantiate(cfg.optimizer)

    def train_loader() -> Loader:
        return _seeded(_resumable(instantiate(cfg.dataloader.train)), options.get("seed", -1))

    tta = dict(options.get("tta", {"enabled": False}))
    augmented = tta.pop("enabled")

    def evaluations() -> Iterable[tuple[str, Iterable[Any], DatasetEvaluator]]:
        test = copy.deepcopy(cfg.dataloader.test)
        if augmented:
            test.mapper.augmentations = []  # it resizes by itself, from the original
        yield test_set.names, instantiate(test), instantiate(cfg.dataloader.evaluator)

    return Recipe(
        config=cfg,
        output_dir=str(options.output_dir),
        device=str(options.device),
        max_iter=options.max_iter,
        init_checkpoint=options.init_checkpoint,
        **_training_options(options, options.amp.enabled),
        seed=options.get("seed", -1),
        ddp=dict(options.ddp),
        checkpointer=dict(options.checkpointer),
        eval_period=options.eval_period,
        log_period=options.log_period,
        train_datasets=_names(cfg.dataloader.train.dataset.names),
        test_datasets=(test_set.names,),
        num_classes=num_classes,
        type_num_classes=key + "={}",
        type_output_dir="train.output_dir={}",
        type_device="train.device={}",
        model=lambda: instantiate(cfg.model).to(options.device),
        optimizer=optimizer,
        lr_scheduler=lambda _: instantiate(cfg.lr_multiplier),
        train_loader=train_loader,
        evaluations=evaluations,
        evaluated=lambda model: _augmented(model, cfg, tta) if augmented else model,
    )


def _class_count(model: DictConfig) -> tuple[str, int | None]:
    """Where a lazy model says its number of classes, and the number, None if it does not."""
    if "num_classes" not in model and "num_classes" in model.get("roi_heads", {}):
        return "model.roi_heads.num_classes", model.roi_heads.num_classes
    return "model.num_classes", model.get("num_classes")


def _augmented(model: nn.Module, cfg: DictConfig, tta: Mapping[str, Any]) -> nn.Module:
    inner: Any = unwrapped(model)
    augmentations = instantiate(cfg.dataloader.test.mapper.augmentations)
    try:
        return TestTimeAugmentation.around(inner, augmentations, **tta)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"train.tta: {error}") from error


def yacs_recipe(cfg: CfgNode) -> Recipe:
    """The recipe of a yacs config whose model comes through ``MODEL.DECOUPLE``."""
    _refuse_ignored(cfg)
    register_bccd()
    ours = (
        OneStageDetector.__name__ == cfg.MODEL.META_ARCHITECTURE
        or DecoupledRPN.__name__ == cfg.MODEL.PROPOSAL_GENERATOR.NAME
        or DecoupledROIHeads.__name__ == cfg.MODEL.ROI_HEADS.NAME
    )
    door = door_recipe(cfg) if ours else None
    if door is not None:
        refuse_unread(cfg, door.model)
    num_classes = None if door is None else _class_count(door.model)[1]
    options = {} if door is None else door.train

    def evaluations() -> Iterable[tuple[str, Iterable[Any], DatasetEvaluator]]:
        for name in cfg.DATASETS.TEST:
            several = len(cfg.DATASETS.TEST) > 1
            folder = os.path.join(cfg.OUTPUT_DIR, name) if several else cfg.OUTPUT_DIR
            evaluator = BoxEvaluator(dataset_name=name, output_dir=folder)
            mapper = BoxAwareMapper(cfg, False)
            yield name, build_detection_test_loader(cfg, name, mapper=mapper), evaluator

    return Recipe(
        config=cfg,
        output_dir=cfg.OUTPUT_DIR,
        device=cfg.MODEL.DEVICE,
        max_iter=cfg.SOLVER.MAX_ITER,
        init_checkpoint=cfg.MODEL.WEIGHTS,
        **_training_options(options, cfg.SOLVER.AMP.ENABLED),
        seed=cfg.SEED,
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
        train_loader=lambda: _seeded(_yacs_loader(cfg), cfg.SEED),
        evaluations=evaluations,
    )


_DOOR = ("model.", "train.accumulate", "train.amp.dtype", "train.ema.", "train.max_grad_norm")


def _refuse_ignored(cfg: CfgNode) -> None:
    """Refuse what Detectron2's own launcher would do, and this one would leave out in silence."""
    for key in ("TEST.PRECISE_BN.ENABLED", "TEST.AUG.ENABLED", "SOLVER.REFERENCE_WORLD_SIZE"):
        value = functools.reduce(getattr, key.split("."), cfg)
        if value:
            raise ConfigError(f"{key} is {value}, not supported here: type {key} {type(value)()}")
    for override in cfg.MODEL.DECOUPLE.OVERRIDES:
        if not override.lstrip("+").startswith(_DOOR):
            raise ConfigError(
                f"MODEL.DECOUPLE.OVERRIDES has {override!r}, for which yacs has a key of its own "
                f"(SOLVER, INPUT, ...); wanted one of {', '.join(_DOOR)}"
            )


_PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def _training_options(options: Mapping[str, Any], amp: bool) -> dict[str, Any]:
    """What a ``train`` node says about a step; a node of Detectron2's own may lack all of it."""
    dtype = options.get("amp", {}).get("dtype", "float16")
    if amp and dtype not in _PRECISIONS:
        raise ConfigError(
            f"train.amp.dtype is {dtype!r}; type train.amp.dtype=bfloat16, or float16 on a GPU"
        )
    accumulate = options.get("accumulate", 1)
    if not isinstance(accumulate, int) or accumulate < 1:
        raise ConfigError(
            f"train.accumulate is {accumulate!r}, wanted how many batches make a step: a whole "
            "number from 1"
        )
    norm = options.get("max_grad_norm")
    if norm is not None and not norm > 0:
        raise ConfigError(f"train.max_grad_norm is {norm!r}, wanted a number above 0, or null")
    patience = options.get("early_stopping", {}).get("patience", 0)
    if type(patience) is not int or patience < 0 or (patience and not options.get("eval_period")):
        raise ConfigError(
            f"train.early_stopping.patience is {patience!r}, wanted a number of evaluations, or 0 "
            "to train to the end; it needs train.eval_period above 0"
        )
    ema = options.get("ema", {})
    if ema.get("enabled") and not 0 < ema.decay < 1:
        raise ConfigError(f"train.ema.decay is {ema.decay!r}, wanted a number between 0 and 1")
    return {
        "precision": _PRECISIONS[dtype] if amp else None,
        "accumulate": accumulate,
        "max_grad_norm": norm,
        "patience": patience,
        "ema_decay": ema.decay if ema.get("enabled") else None,
    }


def _seeded(loader: Loader, seed: int) -> Loader:
    if loader.seed is None and seed >= 0:
        loader.seed = seed
    return loader


def _resumable(loader: Any) -> Loader:
    if hasattr(loader, "batches"):
        return loader
    raise ConfigError(
        f"dataloader.train makes a {type(loader).__name__}, from which no training can be resumed "
        "exactly; write dataloader.train = L(TrainLoader)(dataset=..., mapper=..., "
        "total_batch_size=..., num_workers=...), from d2_decouple.data, as configs/common/data/"
        "coco.py does"
    )


def _yacs_loader(cfg: CfgNode) -> TrainLoader:
    options = cfg.DATALOADER
    records = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=options.FILTER_EMPTY_ANNOTATIONS
    )
    factors = None
    if options.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, options.REPEAT_THRESHOLD
        ).tolist()
    elif options.SAMPLER_TRAIN != "TrainingSampler":
        raise ConfigError(
            f"DATALOADER.SAMPLER_TRAIN is {options.SAMPLER_TRAIN!r}; type TrainingSampler or "
            "RepeatFactorTrainingSampler"
        )
    return TrainLoader(
        dataset=records,
        mapper=BoxAwareMapper(cfg, True),
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        num_workers=options.NUM_WORKERS,
        aspect_ratio_grouping=options.ASPECT_RATIO_GROUPING,
        repeat_factors=factors,
    )


def _require_keys(cfg: DictConfig, keys: Sequence[str]) -> None:
    missing = [key for key in keys if key not in cfg]
    if missing:
        raise ConfigError(
            f"this config has no {', '.join(missing)}: a recipe needs {', '.join(keys)}, as "
            "configs/baselines/fcos_R_50_FPN_1x.py has them"
        )


def _names(names: Any) -> tuple[str, ...]:
    return tuple(names) if isinstance(names, list | tuple | ListConfig) else (names,)
