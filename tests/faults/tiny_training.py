# SPDX-License-Identifier: Apache-2.0
"""A recipe of a real method on a tiny network: a step takes a twentieth of a second.

What a recipe says about slots, losses and assignment stays as it is. Nothing is drawn or counted
that depends on the number of processes: batch norms are frozen, as in the recipes for COCO.
"""

from typing import Any

from util import tiny

from d2_decouple.config import get_config

SIDE, LONG_SIDE = 64, 96  # pixels of an image


def tiny_training(name: str) -> tuple[Any, Any, Any, Any, Any]:
    """``dataloader, lr_multiplier, model, optimizer, train`` of a recipe of COCO's, made small."""
    cfg = tiny(get_config(name))
    data, train = cfg.dataloader, cfg.train
    for mapper in (data.train.mapper, data.test.mapper):
        size = mapper.augmentations[0]
        size.short_edge_length, size.max_size = SIDE, LONG_SIDE
    data.train.total_batch_size, data.train.num_workers, data.test.num_workers = 2, 1, 0
    train.init_checkpoint, train.seed, train.log_period, train.device = "", 1, 1, "cpu"
    train.ema.enabled = True
    # SAPD's towers have no norm: from random weights its loss would be infinite in five steps.
    train.max_grad_norm = 10.0
    cfg.optimizer.lr = 0.002
    return data, cfg.lr_multiplier, cfg.model, cfg.optimizer, train
