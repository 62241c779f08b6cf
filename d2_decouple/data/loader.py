# SPDX-License-Identifier: Apache-2.0
"""Training batches that depend on nothing but the data, a seed and their number.

Batch i of a run is the same whether the run began at batch 0 or was resumed at i, with any number
of worker processes: the order of the images comes from the seed and the epoch, and each image is
augmented under random numbers seeded by its position in that order. So a checkpoint needs to hold
only how many batches were used.
"""

import logging
import os
import random
import signal
import struct
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetFromList
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..config import ConfigError

__all__ = ["DataError", "TrainLoader"]

_logger = logging.getLogger(__name__)
_ATTEMPTS = 10  # images tried in place of one that the mapper refuses
_GRACE = 10.0  # seconds
# What Pillow and Detectron2 raise for files that are missing, cut off, no images, far too large,
# or of another size than annotated.
_UNREADABLE = (
    EOFError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    struct.error,
)


class DataError(ValueError):
    """Training data that cannot be loaded; the message names the image and what to type."""


class TrainLoader:
    """Infinite training batches, lists of what ``mapper`` makes of Detectron2's dataset dicts.

    Takes the place of Detectron2's ``build_detection_train_loader`` in a LazyConfig, and can be
    iterated by any trainer. Each process of a distributed training gets its share of the images.

    Attributes:
        batch_size: images of a batch of this process.
        step_batches: batches of a step. Grouped by shape are the images of a step, so that half
            the batch and twice the batches have the same images in every step.
        images: how many there are.
        seed: of order and augmentation.
    """

    def __init__(
        self,
        *,
        dataset: Sequence[Mapping[str, Any]],
        mapper: Callable[[dict[str, Any]], Any],
        total_batch_size: int,
        num_workers: int = 0,
        aspect_ratio_grouping: bool = True,
        repeat_factors: Sequence[float] | None = None,
        seed: int | None = None,
    ) -> None:
        """
        Args:
            dataset: dataset dicts with ``file_name``, ``width`` and ``height``.
            mapper: makes a training example of a copy of such a dict, such as ``DatasetMapper``.
            total_batch_size: images of a batch, all processes together.
            num_workers: processes that load images, for each training process.
            aspect_ratio_grouping: wide images and tall ones in batches of their own, so that less
                is padded.
            repeat_factors: how often each image occurs in an epoch, on average; None for once.
            seed: of order and augmentation; None draws one when it is first needed.

        Raises:
            DataError: no images, or a batch that the processes cannot share evenly.
        """
        processes = comm.get_world_size()
        if not len(dataset):
            raise DataError("the training set has no images; name another, or fill its split")
        if total_batch_size < 1 or total_batch_size % processes:
            raise DataError(
                f"total_batch_size is {total_batch_size}, and {processes} processes share it; "
                f"wanted a multiple of {processes}: type dataloader.train.total_batch_size="
                f"{processes * max(1, round(total_batch_size / processes))} (yacs: "
                "SOLVER.IMS_PER_BATCH)"
            )
        if repeat_factors is not None and len(repeat_factors) != len(dataset):
            raise DataError(f"{len(repeat_factors)} repeat factors for {len(dataset)} images")
        self.batch_size = total_batch_size // processes
        self.step_batches = 1
        self.images = len(dataset)
        self.seed = seed
        self._wide = np.array([item["width"] > item["height"] for item in dataset])
        if not aspect_ratio_grouping:
            self._wide[:] = False
        self._repeats = None if repeat_factors is None else np.asarray(repeat_factors, float)
        # One serialised block: worker processes would copy a list of dicts as they read it.
        self._records = DatasetFromList(list(dataset), copy=False, serialize=True)
        self._mapper, self._num_workers = mapper, num_workers

    def __iter__(self) -> Iterator[list[Any]]:
        return self.batches()

    def batches(self, start: int = 0) -> Generator[list[Any], None, None]:
        """Batch number ``start`` of this process, and all that follow it.

        Raises:
            DataError: while iterating, an image that cannot be loaded, or a worker that died.
        """
        if self.seed is None:
            self.seed = comm.shared_random_seed()
        loader = DataLoader(
            _Examples(self._records, self._mapper, self.seed),
            batch_sampler=islice(self._keys(), start, None),
            num_workers=self._num_workers,
            collate_fn=list,
            worker_init_fn=_outlive_signals,
            generator=torch.Generator(),  # else it would draw from torch's global one
        )
        batches = _started(loader)
        while True:
            try:
                batch = next(batches)
            # One that is killed while it hands a batch over closes the connection.
            except (RuntimeError, ConnectionError, EOFError) as error:
                named = str(error).startswith("DataLoader worker")
                if not named and (isinstance(error, RuntimeError) or not self._num_workers):
                    raise
                raise DataError(
                    f"a process that loads images died: {error}. Often the memory was full "
                    "(/dev/shm in a container: start it with more shared memory). Type "
                    "dataloader.train.num_workers=0 (yacs: DATALOADER.NUM_WORKERS 0) to load "
                    "images without such processes"
                ) from error
            for example in batch:
                if isinstance(example, DataError):
                    raise example
            yield batch

    def _keys(self) -> Iterator[list[tuple[int, int]]]:
        """This process's batches as lists of (position in the order, index of the image).

        All processes together have the same images in a step, however many they are.
        """
        processes, rank = comm.get_world_size(), comm.get_rank()
        total = self.batch_size * processes
        buckets: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        for position, index in enumerate(self._order()):
            bucket = buckets[bool(self._wide[index])]
            bucket.append((position, index))
            if len(bucket) == total * self.step_batches:
                for start in range(0, len(bucket), total):
                    yield bucket[start : start + total][rank::processes]
                bucket.clear()

    def _order(self) -> Iterator[int]:
        for epoch in count():
            generator = np.random.default_rng((self.seed or 0, epoch))
            indices = np.arange(len(self._wide))
            if self._repeats is not None:
                # The fraction of a factor is the chance of one more occurrence in this epoch.
                extra = generator.random(len(indices)) < self._repeats % 1
                indices = np.repeat(indices, self._repeats.astype(int) + extra)
            yield from generator.permutation(indices).tolist()


class _Examples(Dataset):
    """(position, index) -> the mapped example, or the DataError that the training shall raise.

    The error is handed over as a value, since torch would wrap it into a worker's traceback.
    """

    def __init__(self, records: Any, mapper: Callable[[dict[str, Any]], Any], seed: int) -> None:
        self._records, self._mapper, self._seed = records, mapper, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        position, index = key
        with _seeded(self._seed, position):
            for _ in range(_ATTEMPTS):
                record = dict(self._records[index])
                name = record.get("file_name")
                try:
                    example = self._mapper(record)
                except ConfigError:
                    raise
                except _UNREADABLE as error:
                    return DataError(
                        f"image {name} cannot be used for training: {error}. Mend it, or take it "
                        "out of its split; `python -m d2_decouple.data.checks DIR` lists all "
                        "faults of a folder"
                    )
                if example is not None:
                    return example
                index = int(np.random.randint(len(self._records)))
            return DataError(
                f"the mapper refused {_ATTEMPTS} images in a row, the last was {name}; look at "
                "dataloader.train.mapper"
            )


def _outlive_signals(worker: int) -> None:
    """A signal to all processes is for the training, which ends its workers when it is done.

    A worker that is told to terminate waits for that, but not for ever: Python ends what is left
    of a process's children by the same signal, and waits for them. So a thread listens to it,
    since a handler would not run while the worker hangs in a library.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where terminating cannot be put off
        return

    def leave_later() -> None:
        number = signal.sigwait({signal.SIGTERM})
        time.sleep(_GRACE)
        os._exit(128 + number)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for the thread, too
    threading.Thread(target=leave_later, daemon=True).start()


def _started(loader: DataLoader) -> Iterator[list[Any]]:
    """The loader's iterator, which tells of a dead worker when it is asked for a batch.

    torch's handler would raise at any moment, in the middle of an update of the weights, too.
    """
    child = getattr(signal, "SIGCHLD", None)  # not on Windows
    if child is None or threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(child)
    batches = iter(loader)
    signal.signal(child, before)
    return batches


@contextmanager
def _seeded(seed: int, position: int) -> Iterator[None]:
    """Python's, NumPy's and torch's global random numbers as this position has them."""
    alone = get_worker_info() is None  # in the training process, whose own numbers must go on
    if alone:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    drawn = int(np.random.SeedSequence((seed, position)).generate_state(1)[0])
    random.seed(drawn)
    np.random.seed(drawn)
    torch.default_generator.manual_seed(drawn)
    try:
        yield
    finally:
        if alone:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
