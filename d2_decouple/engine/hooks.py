# SPDX-License-Identifier: Apache-2.0
"""Hooks of the training loop: saving, evaluating, and the line that says how far it is."""

import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage
from tqdm import tqdm

from ..checkpoint.checkpointer import BEST, Checkpointer
from .errors import TrainingError

__all__ = ["EarlyStop", "Evaluating", "Progress", "Saving", "forget_after"]

_logger = logging.getLogger(__name__)
_NUMBERED = re.compile(r"model_\d{7,}\.pth")


class Saving(HookBase):
    """Saves periodically, before every evaluation, at the end, and when a signal stops the run.

    The newest checkpoints are kept, and the best one, which :class:`Evaluating` writes.
    """

    def __init__(
        self, checkpointer: Checkpointer, *, period: int, max_to_keep: int, eval_period: int
    ) -> None:
        """
        Args:
            checkpointer: what writes.
            period: iterations between checkpoints; 0 for none but the last.
            max_to_keep: how many numbered ones stay.
            eval_period: iterations between evaluations.
        """
        self._checkpointer, self._keep = checkpointer, max_to_keep
        self._periods = [number for number in (period, eval_period) if number > 0]

    def after_step(self) -> None:
        """Save if it is time to.

        Raises:
            TrainingError: a weight is not finite; what was saved before stays the last checkpoint.
            CheckpointError: it could not be written.
        """
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter:
            self._check_weights()
            self._checkpointer.save("model_final", iteration=self.trainer.iter)
        elif self.trainer.stopping or any(done % period == 0 for period in self._periods):
            self._check_weights()
            self._checkpointer.save(f"model_{self.trainer.iter:07d}", iteration=self.trainer.iter)
            self._prune()

    def _check_weights(self) -> None:
        for name, parameter in self._checkpointer.model.named_parameters():
            if not parameter.isfinite().all():
                raise TrainingError(
                    f"{name} became infinite or NaN by iteration {self.trainer.iter}, though the "
                    "losses were finite; this state is not saved. Lower the rate: type "
                    "optimizer.lr=0.001 (yacs: SOLVER.BASE_LR 0.001), or clip gradients: "
                    "train.max_grad_norm=10 (yacs: SOLVER.CLIP_GRADIENTS.ENABLED True); with "
                    "--resume it goes on from the last checkpoint"
                )

    def _prune(self) -> None:
        """Delete the older checkpoints, and what a process left that was killed while it saved."""
        folder = Path(self._checkpointer.save_dir)
        for unfinished in folder.glob("model_*.pth.tmp"):
            unfinished.unlink(missing_ok=True)
        numbered = [path for path in folder.iterdir() if _NUMBERED.fullmatch(path.name)]
        # By age: higher numbers may be those of an earlier training.
        numbered.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
        for path in numbered[: -self._keep]:
            path.unlink(missing_ok=True)


class EarlyStop(Exception):  # noqa: N818 - it ends a training well
    """Ends a training whose AP does not rise any more; the message says since when."""


class Evaluating(HookBase):
    """Evaluates periodically and at the end, and keeps the checkpoint with the best ``bbox/AP``.

    Stops a training early if it is told how long to wait. Evaluations count from the first one
    with an AP above 0 on: before, nothing has been learned that could get worse.
    """

    def __init__(
        self,
        evaluate: Callable[[], dict[str, Any]],
        *,
        period: int,
        checkpointer: Checkpointer,
        patience: int = 0,
    ) -> None:
        """
        Args:
            evaluate: evaluates, and answers with a nested dict of numbers.
            period: iterations between evaluations; 0 for the one at the end alone.
            checkpointer: saves the best.
            patience: evaluations without a better AP that end the training; 0 for none.
        """
        self._evaluate, self._period, self._checkpointer = evaluate, period, checkpointer
        self._patience = patience
        self._best = -math.inf
        self._evaluated = 0  # iterations done at the last evaluation
        self._without_better = 0  # evaluations since the best one

    def before_train(self) -> None:
        """Evaluate what a resumed training begins with, unless that is known to be done.

        Its checkpoint was saved before the evaluation, which may not have come to its end, and
        does not know what came out: the best one would be forgotten. One that was stopped early
        is evaluated again, since that is all that is left to do.

        Raises:
            EarlyStop: it has waited long enough for a better AP.
        """
        trainer, done = self.trainer, self.trainer.start_iter
        known = self._evaluated == done and not self._exhausted()
        if not (done and self._period > 0 and done % self._period == 0) or known:
            return
        trainer.iter = trainer.storage.iter = done - 1
        self._run()
        trainer.iter = trainer.storage.iter = done

    def after_step(self) -> None:
        """Evaluate if it is time to.

        Raises:
            EarlyStop: it has waited long enough for a better AP.
        """
        done = self.trainer.iter + 1
        last = done == self.trainer.max_iter
        if last or (self._period > 0 and done % self._period == 0 and not self.trainer.stopping):
            self._run()

    def finished(self) -> dict[str, Any]:
        """Evaluate a training with no step left; it may have been stopped in its evaluation."""
        results = self._evaluate()
        if results:
            self._keep_best({key: float(x) for key, x in flatten_results_dict(results).items()})
        return results

    def _run(self) -> None:
        results = self._evaluate()
        done = self.trainer.iter + 1
        repeated, self._evaluated = self._evaluated == done, done
        if results:  # on the first process
            flat = {key: float(x) for key, x in flatten_results_dict(results).items()}
            self.trainer.storage.put_scalars(**flat, smoothing_hint=False)
            better = self._keep_best(flat)
            if better or self._best <= 0:
                self._without_better = 0
            elif not repeated:
                self._without_better += 1
        # Evaluation may take the processes different times; the first one alone knows its result.
        if any(comm.all_gather(self._exhausted())) and done < self.trainer.max_iter:
            raise EarlyStop(
                f"stopped early after {done} of {self.trainer.max_iter} iterations: the last "
                f"{self._patience} evaluations gave no better AP than {self._best:.2f}, whose "
                f"weights are in {BEST}.pth (train.early_stopping.patience=0 goes on)"
            )

    def _exhausted(self) -> bool:
        return 0 < self._patience <= self._without_better

    def _keep_best(self, flat: dict[str, float]) -> bool:
        """Save the model if it is the best so far; whether it is."""
        found = [value for key, value in flat.items() if key.endswith("bbox/AP")]
        if not found or not found[0] > self._best:
            return False
        self._best = found[0]
        _logger.info("Best AP so far: %.2f; saving %s", self._best, BEST)
        self._checkpointer.save(
            BEST, last=False, iteration=self.trainer.iter, best={"bbox/AP": self._best}
        )
        return True

    def state_dict(self) -> dict[str, Any]:
        """The best AP so far, when it was looked for last, and how often in vain since then."""
        return {
            "best": self._best,
            "evaluated": self._evaluated,
            "without_better": self._without_better,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As it was stored."""
        self._best, self._evaluated = state["best"], state.get("evaluated", 0)
        self._without_better = state.get("without_better", 0)


class Progress(EventWriter):
    """One line that says how far the training is: a bar on a terminal, lines in the log."""

    def __init__(self, max_iter: int, *, terminal: bool) -> None:
        """
        Args:
            max_iter: iterations of the whole training.
            terminal: draw a bar on the standard error stream.
        """
        self._max_iter, self._terminal = max_iter, terminal
        self._bar: tqdm | None = None

    def write(self) -> None:
        """Say it; called periodically by Detectron2's ``PeriodicWriter``."""
        storage = get_event_storage()
        latest = storage.latest()
        if not {"total_loss", "lr"} <= latest.keys() or storage.iter >= self._max_iter:
            return
        done = storage.iter + 1
        smooth = {
            name: storage.history(name).median(20)
            for name in latest
            if name == "total_loss" or name.startswith("loss")
        }
        total = smooth.pop("total_loss")
        terms = ", ".join(f"{name.removeprefix('loss_')} {x:.3g}" for name, x in smooth.items())
        parts = [f"loss {total:.4g}" + (f" ({terms})" if terms else "")]
        parts.append(f"lr {latest['lr'][0]:.3g}")
        if "time" in latest:  # Detectron2 leaves the first iterations out
            seconds = storage.history("time").median(1000)
            eta = timedelta(seconds=int(seconds * (self._max_iter - done)))
            storage.put_scalar("eta_seconds", eta.total_seconds(), smoothing_hint=False)
            data = storage.history("data_time").avg(20)
            parts.append(f"{seconds:.3f} s each, {data:.3f} of it for data")
            parts.append(f"eta {eta}")
        if torch.cuda.is_available():
            parts.append(f"GPU {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
        text = " | ".join(parts)
        _logger.info("iteration %d/%d | %s", done, self._max_iter, text, extra={"progress": True})
        if self._terminal:
            if self._bar is None:
                self._bar = tqdm(total=self._max_iter, initial=done, file=sys.stderr, unit="it")
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
            self._bar.refresh()  # update() leaves the first and quick ones out

    @staticmethod
    def make_room(record: logging.LogRecord) -> bool:
        """As a filter of a log's handler: lines begin where the bar was, till it is drawn again."""
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.clear()
        return True

    def close(self) -> None:
        """Leave the bar as it is, on a line of its own."""
        if self._bar is not None:
            self._bar.close()


def forget_after(metrics_file: str | os.PathLike[str], iteration: int) -> None:
    """Take out of metrics.json what a resumed training will write again, and half a last line.

    Args:
        metrics_file: JSON lines, each with an ``iteration``; may be missing.
        iteration: the first one that will be run again.
    """
    file = Path(metrics_file)
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the line that a killed process was writing
            continue
        if isinstance(row, dict) and row.get("iteration", 0) < iteration:
            kept.append(line + "\n")
    new = file.with_name(file.name + ".tmp")
    new.write_text("".join(kept), encoding="utf-8")
    os.replace(new, file)
