# SPDX-License-Identifier: Apache-2.0
"""COCO schedules for 16 images a batch: 1x is 90,000 iterations, the rate drops at 2/3 and 8/9."""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import DictConfig


def multiplier(times: int, warmup_iters: int, warmup_factor: float) -> DictConfig:
    """The learning rate's factor over a training of ``times`` x 90,000 iterations."""
    max_iter = times * 90000
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(
            values=[1.0, 0.1, 0.01],
            milestones=[max_iter * 2 // 3, max_iter * 8 // 9, max_iter],
        ),
        warmup_length=warmup_iters / max_iter,
        warmup_method="linear",
        warmup_factor=warmup_factor,
    )
