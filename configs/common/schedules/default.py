# SPDX-License-Identifier: Apache-2.0
"""What every recipe shares: the ``train`` node and the optimizer of the papers."""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params

train = dict(
    output_dir="./output",
    init_checkpoint="",
    max_iter=90000,
    # On a CPU, Detectron2's launcher refuses mixed precision and needs to be told the device.
    device="cuda" if torch.cuda.is_available() else "cpu",
    amp=dict(enabled=False, dtype="bfloat16"),  # or float16, whose loss is scaled
    accumulate=1,  # batches of a step
    max_grad_norm=None,
    ema=dict(enabled=False, decay=0.9998),  # averaged weights, which are then evaluated
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    checkpointer=dict(period=5000, max_to_keep=2),
    eval_period=5000,
    early_stopping=dict(patience=0),  # evaluations without a better AP that end a training
    # Test-time augmentation; without sizes, three around the one of the test images.
    tta=dict(enabled=False, short_edge_lengths=None, max_size=None, flip=True),
    log_period=20,
    seed=-1,
)

optimizer = L(torch.optim.SGD)(
    params=L(get_default_optimizer_params)(),
    lr=0.01,
    momentum=0.9,
    weight_decay=1e-4,
)
