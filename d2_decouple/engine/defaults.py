# SPDX-License-Identifier: Apache-2.0
"""A recipe's numbers chosen from the data and the machine, each with its reason."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import DictConfig, ListConfig, OmegaConf

from ..config import ConfigError, apply_overrides
from ..data.box_sizes import collect_objects
from ..data.records import Source
from .methods import Size, train_from_scratch, use_finer_levels

__all__ = ["memory_limit", "use_defaults"]

_RESIZE = "dataloader.{}.mapper.augmentations.0.{}"
_BATCH = "dataloader.train.total_batch_size"
_SMALL = 0.1  # share of the boxes that an image size is chosen for
_CELLS = 16  # pixels: two cells of P3, within which a box is found by its features
_TINY = 8  # pixels: one cell of P3
_STEP = 16  # pixels: sides are multiples of it
_MAX_EPOCHS = 100
_WARMUP = 500  # iterations
_EVALUATIONS = 10
_PATIENCE = 5
_CPU_BATCH = 2  # of the larger networks, which compute seconds for an image there
_GIB = 2**30
_CGROUP = Path("/sys/fs/cgroup")


class _Choices:
    """Values for a config, of which those that were typed win; and a line on each."""

    def __init__(self, cfg: DictConfig, overrides: Sequence[str]) -> None:
        self.cfg = cfg
        self._typed = apply_overrides(copy.deepcopy(cfg), overrides)
        self._keys = {override.partition("=")[0].lstrip("+") for override in overrides}
        self.lines: list[str] = []

    def typed(self, key: str) -> bool:
        """Whether the key, or one below it, was typed."""
        return any(known == key or known.startswith(f"{key}.") for known in self._keys)

    def get(self, key: str) -> Any:
        """The value that was typed, or the config's."""
        return OmegaConf.select(self._typed if self.typed(key) else self.cfg, key)

    def count(self, key: str) -> int:
        """A typed or chosen whole number from 1; the largest, where there are several."""
        value = self.get(key)
        values = list(value) if isinstance(value, ListConfig) else [value]
        if not values or not all(type(x) is int and x > 0 for x in values):
            usual = OmegaConf.select(self.cfg, key)
            raise ConfigError(
                f"{key} is {value!r}, wanted a whole number from 1: type {key}={usual}, or leave "
                "it out"
            )
        return max(values)

    def set(self, name: str, key: str, value: Any, reason: str, unit: str = "") -> Any:
        """Choose a value, unless it was typed; the one that holds."""
        if self.typed(key):
            value, reason = self.get(key), "typed"
        else:
            OmegaConf.update(self.cfg, key, value)
        shown = f"{value:.4g}" if isinstance(value, float) else value
        self.say(name, f"{shown}{unit}", f"{reason} ({key})")
        return value

    def say(self, name: str, value: Any, reason: str) -> None:
        """Add a line."""
        self.lines.append(f"  {name}: {value}; {reason}")


def use_defaults(
    cfg: DictConfig,
    train_set: str,
    size: Size,
    overrides: Sequence[str] = (),
    *,
    processes: int = 1,
    memory: tuple[int, str] | None = None,
) -> list[str]:
    """Choose what depends on data and machine, in place; the same for the same data and machine.

    Args:
        cfg: a LazyConfig that trains on ``train_set`` already.
        train_set: name of the registered training set.
        size: of the network.
        overrides: ``key=value`` strings that will be applied later, and win.
        processes: that train together.
        memory: bytes that one of them may use, and of what; by default :func:`memory_limit`'s.

    Returns:
        Lines for the user: each choice, its reason, and the key that changes it.

    Raises:
        ConfigError: an unknown key among the overrides.
        DataError: the training set cannot be read.
    """
    choices = _Choices(cfg, overrides)
    records = _records(train_set)
    _choose_image_size(choices, records, size)
    _choose_levels(choices, records)
    device = str(choices.get("train.device"))
    _choose_batch(choices, records, size, processes, memory or memory_limit(device, processes))
    _choose_schedule(choices, records, size)
    _choose_weights(choices, size)
    return [
        "chosen for these data; what you type as key=value behind the command wins:",
        *choices.lines,
    ]


def memory_limit(device: str, processes: int) -> tuple[int, str]:
    """Bytes that one of several processes may use on a device, and where they come from.

    What is there in all, not what is free now: the same training gets the same batch each time.
    """
    if device.startswith("cuda") and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        return int(0.85 * total), f"of the GPU's {total / _GIB:.0f} GiB"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container
        file = _CGROUP / limit
        if file.is_file() and (text := file.read_text().strip()).isdecimal():
            total = min(total, int(text))
    return total // 2 // processes, f"of this machine's {total / _GIB:.0f} GiB"


def _records(train_set: str) -> list[dict[str, Any]]:
    source = DatasetCatalog[train_set]
    # As annotated: cutting boxes would be said now, and once more when the training reads them.
    return source.read() if isinstance(source, Source) else source()


def _choose_image_size(choices: _Choices, records: list[dict[str, Any]], size: Size) -> None:
    """The size's own, and more of it where a tenth of the boxes would hardly be seen."""
    sides = _sides(records)
    shape = np.quantile(sides.max(axis=1) / sides.min(axis=1), 0.95)
    ratio = float(np.clip(shape, 5 / 3, 3))
    own = size.short_side
    small = _small_side(records, own, _rounded(ratio * own))
    wanted = own if small is None else own * _CELLS / small
    short = min(_rounded(max(wanted, own)), 2 * own)
    if small is None:
        reason = f"the network's own, there are no boxes to look at; --size asks for {own}"
    elif short == own:
        reason = f"the network's own; nine tenths of the boxes measure {small:.0f} pixels and more"
    else:
        reason = (
            f"a tenth of the boxes measure less than {small:.0f} pixels at the network's own {own},"
            f" and two cells of P3 are {_CELLS}"
        )
    keys = [_RESIZE.format(role, "short_edge_length") for role in ("train", "test")]
    choices.set("short side of the images", keys[0], short, reason, " pixels")
    limit = _rounded(ratio * choices.count(keys[0]))
    reason = f"19 of 20 images are at most {shape:.3g} times as long as high, or high as long"
    long_keys = [_RESIZE.format(role, "max_size") for role in ("train", "test")]
    choices.set("long side at most", long_keys[0], limit, reason, " pixels")
    for trained, tested in (keys, long_keys):  # as in training; what was typed is applied later
        OmegaConf.update(choices.cfg, tested, choices.count(trained))


def _rounded(value: float) -> int:
    return max(_STEP, math.ceil(value / _STEP - 1e-6) * _STEP)


def _small_side(records: list[dict[str, Any]], short_side: int, max_size: int) -> float | None:
    """Root of the area, in pixels of the network's input, that a tenth of the boxes falls below."""
    objects = collect_objects(records, short_side=short_side, max_size=max_size)
    roots = np.sqrt(objects.resized[~objects.crowd].prod(axis=1))
    return float(np.quantile(roots, _SMALL)) if len(roots) else None


def _input_size(choices: _Choices) -> tuple[int, int]:
    """Short side and limit of the long one; the largest where several were typed."""
    short, limit = (_RESIZE.format("train", x) for x in ("short_edge_length", "max_size"))
    return choices.count(short), choices.count(limit)


def _choose_levels(choices: _Choices, records: list[dict[str, Any]]) -> None:
    """Levels from P2 on for tiny boxes, where the model can."""
    small = _small_side(records, *_input_size(choices))
    key = "model.head.strides"
    if small is None or small >= _TINY or choices.typed(key):
        return
    reason = f"a tenth of the boxes measure less than {small:.1f} pixels, and a cell of P3 is 8"
    if use_finer_levels(choices.cfg):
        choices.say("levels", "P2 to P6", f"{reason}; four times the memory and time of the head")
    elif "head_in_features" in choices.cfg.model:
        choices.say(
            "levels",
            "P3 to P7",
            f"{reason}, but this model cannot use P2: --method fcos, atss, gfl, pdnet and salt "
            "can; or cut the images into tiles",
        )


def _choose_batch(
    choices: _Choices,
    records: list[dict[str, Any]],
    size: Size,
    processes: int,
    memory: tuple[int, str],
) -> None:
    """A power of two for each process, and the learning rate in proportion."""
    each = _image_memory(choices, records, size)
    limit, where = memory
    fitting = int((limit - size.memory) // each)
    slow = size.depth > 18 and not str(choices.get("train.device")).startswith("cuda")
    wanted = _CPU_BATCH if slow else size.batch
    count = 2 ** int(math.log2(max(1, min(wanted, fitting, len(records) // processes))))
    need = f"an image takes up to {each / _GIB:.2f} GiB, and {limit / _GIB:.1f} {where} may be used"
    if fitting < 1:
        reason = f"{need}: if it fails, type a smaller --size or short side"
    elif count < wanted:
        reason = need if fitting < wanted else f"there are {len(records)} training images"
    elif slow:
        reason = "without a GPU an iteration takes many seconds; --size s is made for that"
    else:
        per_process = f", in each of {processes} processes" if processes > 1 else ""
        reason = f"the network's own{per_process}; {need}"
    node = choices.cfg
    usual, rate = node.dataloader.train.total_batch_size, node.optimizer.lr
    choices.set("batch", _BATCH, count * processes, reason, " images")
    choices.set(
        "learning rate",
        "optimizer.lr",
        rate * choices.count(_BATCH) / usual,
        f"the recipe's is {rate:g} for {usual} images, and it grows with the batch",
    )


def _image_memory(choices: _Choices, records: list[dict[str, Any]], size: Size) -> float:
    """Bytes that a step needs for the largest image."""
    short, limit = _input_size(choices)
    sides = _sides(records)
    scale = np.minimum(short / sides.min(axis=1), limit / sides.max(axis=1))
    pixels = float((sides.prod(axis=1) * scale**2).max())
    finer = choices.cfg.model.get("head_in_features", [""])[0] == "p2"
    return pixels * size.memory_per_pixel * (2 if finer else 1)


def _sides(records: list[dict[str, Any]]) -> np.ndarray:
    return np.array([(record["height"], record["width"]) for record in records], dtype=float)


def _choose_schedule(choices: _Choices, records: list[dict[str, Any]], size: Size) -> None:
    """Length, warm-up, evaluations and early stopping."""
    images, batch = len(records), choices.count(_BATCH)
    epoch = math.ceil(images / batch)
    full, most = size.epochs * epoch, _MAX_EPOCHS * epoch
    length = min(max(full, size.min_iterations), most)
    objects = sum(len(record["annotations"]) for record in records)
    data = f"{images} images with {objects} objects"
    if length == full:
        reason = f"{data}, each {size.epochs} times"
    elif length == most:
        reason = f"{data}, each {_MAX_EPOCHS} times and no oftener"
    else:
        reason = f"{data}; the least that this network learns from, {length / epoch:.0f} epochs"
    choices.set("iterations", "train.max_iter", length, reason)
    length = choices.count("train.max_iter")
    warmup = max(1, min(_WARMUP, length // 10))
    if choices.typed("lr_multiplier"):
        choices.say("schedule", "the recipe's", "typed in part (lr_multiplier)")
    else:
        choices.cfg.lr_multiplier = L(WarmupParamScheduler)(
            scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[80, 100]),
            warmup_length=warmup / length,
            warmup_method="linear",
            warmup_factor=0.01,
        )
        choices.say(
            "warm-up",
            f"{warmup} iterations",
            f"a tenth of the training, {_WARMUP} at most; the rate falls to a tenth after four "
            "fifths (lr_multiplier.warmup_length)",
        )
    period = min(max(1, epoch, length // _EVALUATIONS), length)
    period = choices.set(
        "evaluation",
        "train.eval_period",
        period,
        f"{_EVALUATIONS} times in all, or after each epoch where that is rarer",
        " iterations apart",
    )
    if not choices.typed("train.checkpointer.period"):
        choices.cfg.train.checkpointer.period = period
    choices.set(
        "early stopping",
        "train.early_stopping.patience",
        _PATIENCE if period else 0,
        "without a better AP on the test images it ends; 0 turns it off",
        " evaluations",
    )
    if not choices.typed("train.seed"):
        choices.cfg.train.seed = 1  # the same command, the same result


def _choose_weights(choices: _Choices, size: Size) -> None:
    """Say what will be fetched; without weights nothing may stay frozen."""
    key = "train.init_checkpoint"
    weights = choices.get(key)
    if weights and not choices.typed(key):
        choices.say(
            "weights",
            weights,
            "trained on ImageNet; fetched once, 100 to 180 MB, if this machine does not have them "
            f"yet ({key}=FILE for a file, {key}= for none)",
        )
    elif size.depth > 18 and not weights:
        train_from_scratch(choices.cfg)
        choices.say("weights", "none", f"typed; all layers learn, which takes far longer ({key})")
    else:
        reason = "typed" if choices.typed(key) else "this network learns from scratch"
        choices.say("weights", weights or "none", f"{reason} ({key})")
