# SPDX-License-Identifier: Apache-2.0
"""The small-data experiment: 800 iterations of 4 images, from scratch."""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from .default import optimizer, train

train.max_iter = 800
train.eval_period = 200
train.checkpointer.period = 200
train.log_period = 10
train.seed = 1

# In thousandths of the length: a shorter or longer run keeps the shape of the schedule.
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[800, 1000]),
    warmup_length=0.1,
    warmup_method="linear",
    warmup_factor=0.01,
)
