# SPDX-License-Identifier: Apache-2.0
"""Schedules that count in epochs; a rate of 0.02 belongs to 16 images a batch, 0.01 to 8."""

from collections.abc import Sequence

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import DictConfig

_COCO = 117266  # images of train2017 that have objects
_WARMUP = 500  # iterations


def iterations(epochs: int, *, images: int = _COCO, batch: int = 16) -> int:
    """How many batches see every image so many times."""
    return round(epochs * images / batch)


def multiplier(
    epochs: int, drops: Sequence[int], *, images: int = _COCO, batch: int = 16
) -> DictConfig:
    """The learning rate's factor: a warm-up from a thousandth, a tenth after each of ``drops``."""
    milestones = [iterations(x, images=images, batch=batch) for x in (*drops, epochs)]
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(
            values=[10.0**-drop for drop in range(len(milestones))], milestones=milestones
        ),
        warmup_length=_WARMUP / milestones[-1],
        warmup_method="linear",
        warmup_factor=0.001,
    )
