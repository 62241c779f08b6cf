# SPDX-License-Identifier: Apache-2.0
"""AdamW as transformers and ConvNeXts are fine-tuned with: norms and tables of positions stay."""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params

optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(
        base_lr="${..lr}",
        weight_decay_norm=0.0,
        overrides={
            name: dict(weight_decay=0.0)
            for name in ("pos_embed", "rel_pos_h", "rel_pos_w", "relative_position_bias_table")
        },
    ),
    lr=1e-4,
    betas=(0.9, 0.999),
    weight_decay=0.05,
)
