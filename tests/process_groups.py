# SPDX-License-Identifier: Apache-2.0
"""Processes of a test that learn together, on one thread each."""

from datetime import timedelta

import torch
import torch.distributed as dist

PROCESSES = 2


def join(rank: int, folder: str) -> None:
    """Meet the other process of the same folder."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=60),
    )
