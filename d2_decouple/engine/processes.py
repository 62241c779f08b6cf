# SPDX-License-Identifier: Apache-2.0
"""Processes that a launcher started: how they meet, and what is said when one of them ends."""

from __future__ import annotations

import gc
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from traceback import clear_frames

import torch.distributed as dist
from detectron2.utils import comm
from torch import nn
from torch.distributed.rendezvous import rendezvous

from .errors import EXPECTED_ERRORS, TrainingError, TrainingStoppedError

__all__ = ["PATIENCE", "LostProcessError", "meeting", "take_buffers"]

PATIENCE = timedelta(minutes=10)
"""How long a process waits for another that does not answer, and does not end either.

One that ends closes its connections, so the others learn it at once. This is as long as the first
process may take for what it does alone: to check the data, to save, to compute an evaluation.
"""
_ENDED = "d2_decouple_ended"
_WORDS = 10.0  # seconds in which one that ends can say why


class LostProcessError(TrainingError):
    """Another process of the training has ended, or does not answer; the message has its error."""


@contextmanager
def meeting(backend: str) -> Iterator[None]:
    """A process group by torch's environment variables, for the block.

    Args:
        backend: ``nccl`` for GPUs, ``gloo`` for CPUs.

    Raises:
        LostProcessError: in the block, since another process has ended. That one's own error goes
            through the store in which the processes have met.
    """
    store, rank, processes = next(iter(rendezvous("env://", timeout=PATIENCE)))
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=PATIENCE)
    together = False
    try:
        yield
        together = True
    except TrainingStoppedError as stopped:
        together = True
        clear_frames(stopped.__traceback__)  # they hold the model, and it the group
        raise
    except EXPECTED_ERRORS as error:
        _leave_word(store, rank, str(error))
        raise
    except RuntimeError as error:
        if not _is_lost(error):
            _leave_word(store, rank, f"{type(error).__name__}: {error}")
            raise
        raise LostProcessError(
            f"process {rank} of {processes} cannot go on, since another one has ended: "
            f"{_last_words(store)}. What was saved is whole: mend that, and the same command "
            "with --resume goes on from the last checkpoint, with as many processes as you like"
        ) from error
    except Exception as error:
        _leave_word(store, rank, f"{type(error).__name__}: {error}")
        raise
    finally:
        _leave_groups(together)


def take_buffers(model: nn.Module) -> None:
    """Take the first process's buffers, which are the ones that are saved.

    Batch norms have statistics of their own in each process, so an evaluation that the processes
    share would otherwise be of no model that there is.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.broadcast(buffer, 0)


def _leave_groups(together: bool) -> None:
    """End all process groups; where all processes do, also the threads that work for them.

    Detectron2 keeps groups that it has used. One that is still referred to keeps its threads, and a
    thread that lets go of a tensor while the interpreter ends aborts the process, which has done
    all its work by then. Where one process ends alone, a thread may wait for the others, and they
    for this process: so it is not waited for.
    """
    if together:
        comm._get_global_gloo_group.cache_clear()
        comm._LOCAL_PROCESS_GROUP = None
    dist.destroy_process_group()
    if together:
        gc.collect()  # a distributed model refers to itself


def _is_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because of another process."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "connection closed by peer", "connection reset by peer")
    )


def _leave_word(store: dist.Store, rank: int, message: str) -> None:
    with suppress(RuntimeError, ValueError):  # the store may be gone with the process that had it
        if not store.check([_ENDED]):
            store.set(_ENDED, f"process {rank} on {socket.gethostname()}: {message}")


def _last_words(store: dist.Store) -> str:
    """The first error of another process; a killed one leaves none."""
    until = time.monotonic() + _WORDS
    with suppress(RuntimeError, ValueError):
        while not store.check([_ENDED]):
            if time.monotonic() > until:
                break
            time.sleep(0.1)
        else:
            return store.get(_ENDED).decode()
    address = os.environ.get("MASTER_ADDR", "?")
    return (
        "it left no message, so it was killed (often for its memory), or its machine is gone "
        f"(the processes met at {address}); look at its log"
    )
