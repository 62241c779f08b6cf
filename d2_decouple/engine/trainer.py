# SPDX-License-Identifier: Apache-2.0
"""The training loop: one optimizer step at a time, from any step on.

What a step does is a function of the weights, the optimizer, the average and the step's number:
batches and random numbers are drawn from a seed and that number. So a resumed training equals the
unbroken one.
"""

import logging
import random
import signal
import time
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from detectron2.engine import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from fvcore.common.history_buffer import HistoryBuffer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from ..checkpoint import CheckpointError
from ..data.loader import DataError
from .errors import TrainingError, TrainingStoppedError
from .failures import LOWER, enough_memory, not_finite
from .signals import StopRequest

__all__ = ["Average", "BatchError", "Loader", "Trainer", "unwrapped"]

_logger = logging.getLogger(__name__)
_KEPT = 1000  # numbers of a kind, as many as the longest median that is written down


class BatchError(DataError):
    """The next step's data cannot be loaded: the state is that of the step before."""


class Loader(Protocol):
    """Batches that can be had from any number on (:class:`d2_decouple.data.loader.TrainLoader`)."""

    seed: int | None

    def batches(self, start: int = 0) -> Generator[list[dict[str, Any]], None, None]:
        """Batch number ``start``, and all that follow it."""


class Average:
    """Exponential moving average of a model's parameters and buffers (torch's ``AveragedModel``).

    Early on the decay is (1 + t) / (10 + t) after t updates, so that a short training is not
    dominated by its first weights. Counters are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """
        Args:
            model: what is averaged, without a wrapper for distributed training.
            decay: share of the average that an update keeps, below 1.

        Raises:
            TrainingError: a decay that is none.
        """
        if not 0 < decay < 1:
            raise TrainingError(f"the decay of an average lies between 0 and 1, got {decay}")
        self._decay = decay
        self._averaged = AveragedModel(model, multi_avg_fn=self._mix, use_buffers=True)

    @property
    def model(self) -> nn.Module:
        """The averaged model."""
        return self._averaged.module

    def update(self, model: nn.Module) -> None:
        """Mix the model's present weights in."""
        self._averaged.update_parameters(model)

    def state_dict(self) -> dict[str, Any]:
        """Averaged weights under the model's own names, so that anybody can load them."""
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take weights that :meth:`state_dict` gave."""
        self.model.load_state_dict(state)

    @property
    def updates(self) -> int:
        """How often the average was updated."""
        return int(self._averaged.n_averaged)

    @updates.setter
    def updates(self, value: int) -> None:
        self._averaged.n_averaged.fill_(value)

    @torch.no_grad()
    def _mix(self, averaged: Sequence[Tensor], new: Sequence[Tensor], updates: Any) -> None:
        count = self.updates  # the argument may be on a GPU, which would have to be waited for
        kept = min(self._decay, (1 + count) / (10 + count))
        for mean, value in zip(averaged, new, strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, 1 - kept)
            else:
                mean.copy_(value)


class _Storage(EventStorage):
    """Detectron2's, which would keep every number of a training: here the last thousands."""

    def __init__(self, start_iter: int) -> None:
        super().__init__(start_iter)
        self._history: dict[str, HistoryBuffer] = defaultdict(
            partial(HistoryBuffer, max_length=_KEPT)
        )


class Trainer(TrainerBase):
    """Detectron2's trainer base with accumulation, clipping, averaging and mixed precision.

    It stops between two steps when SIGTERM or SIGINT comes; a hook can see that in ``stopping``.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        loader: Loader,
        optimizer: torch.optim.Optimizer,
        precision: torch.dtype | None = None,
        accumulate: int = 1,
        max_grad_norm: float | None = None,
        average: Average | None = None,
        failures: str | Path = ".",
    ) -> None:
        """
        Args:
            model: gives a dict of losses; perhaps wrapped for distributed training.
            loader: training batches.
            optimizer: of the model's parameters.
            precision: dtype of autocast; None for full precision. float16 scales the loss.
            accumulate: batches of a step; their gradients are averaged.
            max_grad_norm: gradients are scaled down to this norm, all parameters together.
            average: updated after every step.
            failures: folder where a batch with a loss that is not finite is saved.
        """
        super().__init__()
        self.model, self.optimizer, self.average = model, optimizer, average
        self._loader, self._accumulate, self._max_grad_norm = loader, accumulate, max_grad_norm
        if hasattr(loader, "step_batches"):
            loader.step_batches = accumulate
        self._device = next(model.parameters()).device
        self._precision, self._failures = precision, Path(failures)
        half = precision is torch.float16
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=half)
        self._batches: Generator[list[dict[str, Any]], None, None] | None = None
        self._request = StopRequest()
        self.stopping = False

    def train(self, start_iter: int, max_iter: int) -> None:
        """Run the steps ``start_iter`` to ``max_iter - 1`` with all hooks.

        Raises:
            TrainingStoppedError: a signal came.
            TrainingError: a loss or a gradient is not finite, or the memory is full.
            BatchError: a batch cannot be loaded, in whichever process.
        """
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        with _Storage(start_iter) as self.storage, self._request.listening():
            try:
                self.before_train()
                for self.iter in range(start_iter, max_iter):
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    if self.stopping:
                        raise self.stopped()
                self.iter += 1
            finally:
                self.after_train()
                if self._batches is not None:
                    self._batches.close()  # ends its worker processes
                    self._batches = None
                if self.stopping:
                    comm.synchronize()  # launchers kill the one that saves when another has ended

    def run_step(self) -> None:
        """Average the gradients of the step's batches, and update the weights."""
        start = time.perf_counter()
        # All of them before the first forward, which changes batch norm's statistics: if one
        # cannot be loaded, the state is still that of the step before.
        batches = self._load()
        data_time = time.perf_counter() - start
        _seed_step(self._loader.seed or 0, self.iter)
        self.model.train()
        self.optimizer.zero_grad()
        mean: dict[str, float] = {}
        for batch in batches:
            enough = enough_memory(len(batch), self._accumulate)
            with enough, _synchronized(self.model, batch is batches[-1]):
                losses = self._losses(batch)
                for name, value in self._finite(losses, batch).items():
                    mean[name] = mean.get(name, 0.0) + value / len(batches)
                total = torch.stack(list(losses.values())).sum() / len(batches)
                self._scaler.scale(total).backward()
        self._update()
        self._record(mean, data_time)

    def stopped(self) -> TrainingStoppedError:
        """The exception that ends a training which a signal stopped, once its state is saved."""
        number = self._request.number or signal.SIGTERM
        return TrainingStoppedError(
            f"stopped by {signal.Signals(number).name} after {self.iter + 1} of {self.max_iter} "
            "iterations; everything is saved. The same command with --resume goes on exactly here",
            128 + number,
        )

    @property
    def signalled(self) -> bool:
        """Whether this process got a signal, which ``stopping`` says for all of them."""
        return self._request.number is not None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs beside the weights."""
        state = super().state_dict()
        state["optimizer"] = self.optimizer.state_dict()
        state["scaler"] = self._scaler.state_dict()
        state["seed"] = self._loader.seed
        state["accumulate"] = self._accumulate
        state["images"] = self._step_images()
        state["dataset"] = getattr(self._loader, "images", None)
        state["average_updates"] = self.average.updates if self.average else 0
        # Detectron2's dense heads keep a moving average of their positives beside their buffers.
        state["loss_normalizer"] = getattr(unwrapped(self.model), "loss_normalizer", None)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, but at the learning rate of this optimizer.

        Raises:
            CheckpointError: the state is another trainer's, or other parameters are trained.
        """
        super().load_state_dict(state)
        schedules = [getattr(hook, "_scheduler", None) for hook in self._hooks]
        _restore(self.optimizer, state.get("optimizer", {}), schedules)
        self._compare_steps(state)
        if state.get("scaler"):
            self._scaler.load_state_dict(state["scaler"])
        if state.get("seed") is not None:
            self._loader.seed = state["seed"]
        if self.average:
            self.average.updates = state.get("average_updates", 0)
        if state.get("loss_normalizer") is not None:
            unwrapped(self.model).loss_normalizer = state["loss_normalizer"]

    def _step_images(self) -> int | None:
        """Images of a step, all processes together; None if the loader does not say."""
        batch_size = getattr(self._loader, "batch_size", None)
        if batch_size is None:
            return None
        return batch_size * comm.get_world_size() * self._accumulate

    def _compare_steps(self, state: Mapping[str, Any]) -> None:
        """A step's number says which images were seen, if all steps had as many."""
        unit, before, now = "images", state.get("images"), self._step_images()
        if before is None or now is None:
            unit, now = "batches", self._accumulate
            before = state.get("accumulate", now)
        if before != now:
            _logger.warning(
                "The checkpoint's steps had %d %s each, these have %d: some images come again, or "
                "are left out, in this epoch",
                before,
                unit,
                now,
            )
        size = getattr(self._loader, "images", None)
        if size is not None and state.get("dataset", size) not in (size, None):
            _logger.warning(
                "The training set had %d images and has %d now: some come again, or are left out, "
                "in this epoch",
                state["dataset"],
                size,
            )

    def _load(self) -> list[list[dict[str, Any]]]:
        """The batches of a step; processes agree on whether all have theirs."""
        if self._batches is None:
            self._batches = self._loader.batches(self.iter * self._accumulate)
        batches, failure = [], ""
        try:
            batches = [next(self._batches) for _ in range(self._accumulate)]
        except DataError as error:
            failure = str(error)
        failures = [text for text in comm.all_gather(failure) if text]
        if failures:
            raise BatchError(failures[0])
        return batches

    def _losses(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        if self._precision is None:
            return self.model(batch)
        with torch.autocast(self._device.type, dtype=self._precision):
            return self.model(batch)

    def _finite(
        self, losses: Mapping[str, Tensor], batch: list[dict[str, Any]]
    ) -> dict[str, float]:
        """The losses' values, averaged over all processes; they decide together what they do."""
        own = torch.stack([loss.detach().float() for loss in losses.values()])
        asked = own.new_tensor([float(self.signalled)])
        shared = torch.cat((own, asked))
        if comm.get_world_size() > 1:
            dist.all_reduce(shared)
            self.stopping = self.stopping or bool(shared[-1] > 0)
        values = (shared[:-1] / comm.get_world_size()).tolist()
        mean = dict(zip(losses, values, strict=True))
        if not np.isfinite(values).all():
            own_values = dict(zip(losses, own.tolist(), strict=True))
            rate = self.optimizer.param_groups[0]["lr"]
            raise TrainingError(not_finite(own_values, batch, self.iter, rate, self._failures))
        return mean

    def _update(self) -> None:
        if self._max_grad_norm is not None:
            self._scaler.unscale_(self.optimizer)
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            norm = nn.utils.clip_grad_norm_(trained, self._max_grad_norm).item()
            if np.isfinite(norm):
                self.storage.put_scalar("grad_norm", norm)
            elif not self._scaler.is_enabled():  # which leaves such a step out
                raise TrainingError(
                    f"the gradients became infinite or NaN at iteration {self.iter}, though the "
                    f"losses are finite. The weights were not updated with them; {LOWER}"
                )
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self.average is not None:
            self.average.update(unwrapped(self.model))
        if comm.get_world_size() == 1:  # else all processes learn it from the next losses
            self.stopping = self.signalled

    def _record(self, losses: Mapping[str, float], data_time: float) -> None:
        self.storage.put_scalar("data_time", data_time)
        self.storage.put_scalar("total_loss", sum(losses.values()))
        if len(losses) > 1:
            self.storage.put_scalars(**losses)


def _synchronized(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Processes exchange gradients once a step, with its last batch."""
    if last or not isinstance(model, DistributedDataParallel):
        return nullcontext()
    return model.no_sync()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without what distributed training puts around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _seed_step(seed: int, iteration: int) -> None:
    """Draws of the model (dropout, sampled proposals) depend on the step and the process alone."""
    sequence = np.random.SeedSequence((seed, iteration, comm.get_rank(), 1))
    drawn = int(sequence.generate_state(1)[0])
    random.seed(drawn)
    np.random.seed(drawn)
    torch.manual_seed(drawn)


def _restore(optimizer: torch.optim.Optimizer, state: Any, schedules: Sequence[Any] = ()) -> None:
    """Load an optimizer's state; the learning rate stays what it was made with."""
    groups = [dict(group) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the optimizer's state in the checkpoint does not fit this training ({error}): other "
            "layers are trained, by another optimizer or another program. Give the config that "
            "the checkpoint was trained with, or begin anew from its weights: type "
            "train.init_checkpoint=FILE train.output_dir=FOLDER without --resume"
        ) from error
    rates = [group.get("initial_lr", group["lr"]) for group in groups]
    stored = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    if rates == stored:
        return
    for group, new, old in zip(optimizer.param_groups, rates, stored, strict=True):
        group["lr"], group["initial_lr"] = group["lr"] * (new / old if old else 1), new
    for schedule in schedules:
        if isinstance(schedule, LRScheduler):
            schedule.base_lrs = list(rates)
    _logger.info("The learning rate is now %g; the checkpoint's was %g", rates[0], stored[0])
