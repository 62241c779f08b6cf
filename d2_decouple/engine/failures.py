# SPDX-License-Identifier: Apache-2.0
"""What a training says when it cannot go on: a loss, the memory, the disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from torch import Tensor

from .errors import TrainingError

__all__ = ["LOWER", "enough_disk", "enough_memory", "not_finite"]

LOWER = (
    "lower the rate: type optimizer.lr=0.001 (yacs: SOLVER.BASE_LR 0.001), or clip gradients: "
    "train.max_grad_norm=10 (yacs: SOLVER.CLIP_GRADIENTS.ENABLED True); with --resume it goes on "
    "from the last checkpoint"
)
"""What to type when a loss, a gradient or a weight is not finite."""

# EFBIG is the limit of a file's size, which some clusters set for a user.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


def not_finite(
    losses: dict[str, float],
    batch: list[dict[str, Any]],
    iteration: int,
    rate: float,
    folder: Path,
) -> str:
    """What to say of a loss that is not finite, once its batch is saved."""
    terms = [name for name, value in losses.items() if not np.isfinite(value)]
    if not terms:
        return f"a loss became infinite or NaN in another process at iteration {iteration}"
    images = [str(item.get("image_id", item.get("file_name"))) for item in batch]
    file = folder / f"not_finite_{iteration:07d}_rank{comm.get_rank()}.pth"
    kept = f"the batch is in {file}"
    try:
        torch.save({"iteration": iteration, "losses": losses, "batch": _plain(batch)}, file)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into the latter
        kept = f"the batch could not be saved in {file} ({error})"
    listed = ", ".join(f"{name} = {value:g}" for name, value in losses.items())
    return (
        f"{' and '.join(terms)} became infinite or NaN at iteration {iteration} ({listed}), "
        f"learning rate {rate:g}, images {', '.join(images)}. The weights were not updated with "
        f"it; {kept}. Look at these images' annotations, or {LOWER}"
    )


def _plain(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A batch as tensors and plain values, which can be loaded without running code."""
    plain = []
    for item in batch:
        kept = {k: v for k, v in item.items() if isinstance(v, Tensor | str | int | float)}
        if "instances" in item:
            truth = item["instances"]
            kept["gt_boxes"] = truth.gt_boxes.tensor
            kept["gt_classes"] = truth.gt_classes
        plain.append(kept)
    return plain


@contextmanager
def enough_memory(images: int, accumulate: int) -> Iterator[None]:
    """Say which batch is worth trying when the memory does not hold a step's.

    Args:
        images: of a batch of this process.
        accumulate: batches of a step.

    Raises:
        TrainingError: the block ran out of memory, on a GPU or, where the system says so, on the
            CPU; the message has a batch of half the images, with as many of them as make the same
            step.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.cuda.OutOfMemoryError) and "DefaultCPUAllocator" not in str(
            error
        ):
            raise
        reason = str(error).split("\n", 1)[0].split(". ", 1)[0]
        raise TrainingError(_too_large(reason, images, accumulate)) from error


def _too_large(reason: str, images: int, accumulate: int) -> str:
    processes = comm.get_world_size()
    where = f"{images} image{'s' * (images > 1)} of a batch in each of {processes} process"
    text = f"the memory does not hold a training step with {where}{'es' * (processes > 1)} "
    text += f"({reason}). "
    parts = 2 if images % 2 == 0 else images
    if parts > 1:
        total, batches = images // parts * processes, accumulate * parts
        text += (
            f"Half as much is needed for batches of half the size, and {batches} of them make the "
            "same step: "
            if parts == 2
            else f"With one image at a time {batches} batches make the same step: "
        ) + (
            f"type dataloader.train.total_batch_size={total} train.accumulate={batches} (yacs: "
            f"SOLVER.IMS_PER_BATCH {total} MODEL.DECOUPLE.OVERRIDES "
            f"\"['train.accumulate={batches}']\")"
        )
    else:
        text += (
            "A batch cannot be smaller: type train.amp.enabled=true (yacs: SOLVER.AMP.ENABLED "
            "True), or make the images smaller, with "
            "dataloader.train.mapper.augmentations.0.max_size=800 (yacs: INPUT.MAX_SIZE_TRAIN 800)"
        )
    return f"{text}. With --resume it goes on from the last checkpoint"


@contextmanager
def enough_disk(folder: str | os.PathLike[str], remedy: str) -> Iterator[None]:
    """Say what to do when a log, a table of numbers or a result cannot be written.

    Args:
        folder: the output folder.
        remedy: how to name another one.

    Raises:
        TrainingError: the disk is full, or the folder cannot be written any more.
    """
    try:
        yield
    except OSError as error:
        output = Path(os.path.abspath(folder))
        named = _named(error) or output
        place = output if named.is_relative_to(output) else named.parent
        if not output.is_dir() or (error.errno in _NOT_WRITABLE and place == output):
            place, what = output, "the folder cannot be written"
            cure = f"make it so, or type {remedy}"
        elif error.errno in _NO_ROOM:  # perhaps of the folder for temporary files
            what, cure = _room(place), "make room"
        else:
            raise
        raise TrainingError(
            f"a file in {place} could not be written ({error.strerror}: {what}). "
            f"Checkpoints written before are whole: {cure} and go on with --resume"
        ) from error


def _named(error: OSError) -> Path | None:
    """The file that an error names, if it does; it may name a number of one that is open."""
    name = error.filename
    return (
        None if name is None or isinstance(name, int) else Path(os.path.abspath(os.fsdecode(name)))
    )


def _room(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB are free there"
