# SPDX-License-Identifier: Apache-2.0
"""Saving and evaluating: what is kept, and what a training that was killed makes up for."""

import os

import pytest
import torch
from test_trainer import make

from d2_decouple.checkpoint import Checkpointer
from d2_decouple.engine import TrainingError
from d2_decouple.engine.hooks import Evaluating, Saving


class KilledError(Exception):
    """Stands for `kill -9`: nothing is saved any more."""


class Scores:
    """An evaluation: answers with the next number, or is killed where that is None."""

    def __init__(self, *values):
        self.values, self.seen = list(values), []

    def __call__(self):
        value = self.values.pop(0)
        if value is None:
            raise KilledError
        self.seen.append(value)
        return {"bbox": {"AP": value}}


def run(folder, scores, max_iter, *, period=2, killed_at=None):
    """Train up to ``max_iter`` from the last checkpoint, perhaps killed before a step."""
    trainer = make()
    checkpointer = Checkpointer(trainer.model, str(folder), trainer=trainer)
    evaluating = Evaluating(scores, period=period, checkpointer=checkpointer)
    saving = Saving(checkpointer, period=0, max_to_keep=2, eval_period=period)
    trainer.register_hooks([saving, evaluating])
    going_on = checkpointer.has_checkpoint()
    checkpointer.resume_or_load("", resume=True)
    start = trainer.iter + 1 if going_on else 0
    step = trainer.run_step

    def run_step():
        if trainer.iter == killed_at:
            raise KilledError
        step()

    trainer.run_step = run_step
    trainer.train(start, max_iter)
    return trainer, evaluating


def best(folder):
    stored = torch.load(folder / "model_best.pth", weights_only=True)
    return stored["iteration"], stored["best"]["bbox/AP"]


def test_the_best_is_not_forgotten_when_the_training_is_killed(tmp_path):
    with pytest.raises(KilledError):
        run(tmp_path, Scores(20.0, 40.0), 6, killed_at=5)
    assert best(tmp_path) == (3, 40.0)
    run(tmp_path, Scores(40.0, 30.0), 6)  # the checkpoint of step 3 does not know its score
    assert best(tmp_path) == (3, 40.0)


def test_an_evaluation_that_was_killed_is_made_up_for(tmp_path):
    with pytest.raises(KilledError):
        run(tmp_path, Scores(20.0, None), 6)
    scores = Scores(40.0, 30.0)
    trainer, evaluating = run(tmp_path, scores, 6)
    assert scores.seen == [40.0, 30.0]
    assert evaluating.state_dict() == {"best": 40.0, "evaluated": 6}
    values = trainer.storage.history("bbox/AP").values()
    assert values == [(40.0, 3), (30.0, 5)]
    assert best(tmp_path) == (3, 40.0)


def test_an_evaluation_that_is_known_to_be_done_is_not_repeated(tmp_path):
    """A training that stops at another step than an evaluation's, and the first of all."""
    scores = Scores(20.0, 30.0)
    with pytest.raises(KilledError):
        run(tmp_path, Scores(10.0), 6, killed_at=2)
    last = torch.load(tmp_path / "model_0000001.pth", weights_only=True)
    last["trainer"]["hooks"]["Evaluating"]["evaluated"] = 2
    torch.save(last, tmp_path / "model_0000001.pth")
    run(tmp_path, scores, 6)
    assert scores.seen == [20.0, 30.0]


def test_a_finished_training_keeps_its_best(tmp_path):
    with pytest.raises(KilledError):
        run(tmp_path, Scores(20.0, None), 4)
    trainer = make()
    checkpointer = Checkpointer(trainer.model, str(tmp_path), trainer=trainer)
    evaluating = Evaluating(Scores(50.0), period=2, checkpointer=checkpointer)
    trainer.register_hooks([evaluating])
    checkpointer.resume_or_load("", resume=True)
    assert evaluating.finished() == {"bbox": {"AP": 50.0}}
    assert best(tmp_path) == (3, 50.0)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer, _ = run(tmp_path, Scores(1.0, 2.0), 4)
    good = (tmp_path / "model_final.pth").read_bytes()
    checkpointer = Checkpointer(trainer.model, str(tmp_path), trainer=trainer)
    saving = Saving(checkpointer, period=1, max_to_keep=2, eval_period=0)
    trainer.register_hooks([saving])
    trainer.model.linear.bias.data[1] = float("nan")
    for trainer.iter, trainer.max_iter in ((4, 9), (8, 9)):
        with pytest.raises(TrainingError) as error:
            saving.after_step()
        for part in ("linear.bias", f"iteration {trainer.iter}", "optimizer.lr", "--resume"):
            assert part in str(error.value)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert (tmp_path / "model_final.pth").read_bytes() == good


def test_the_newest_are_kept_whatever_an_earlier_training_left(tmp_path):
    for number in (89999, 79999):
        file = tmp_path / f"model_{number:07d}.pth"
        file.write_bytes(b"of an earlier training")
        os.utime(file, (number, number))
    (tmp_path / "model_0000007.pth.tmp").write_bytes(b"half")
    trainer = make()
    saving = Saving(
        Checkpointer(trainer.model, str(tmp_path), trainer=trainer),
        period=1,
        max_to_keep=2,
        eval_period=0,
    )
    trainer.register_hooks([saving])
    trainer.train(0, 4)
    names = {path.name for path in tmp_path.iterdir()}
    kept = {"model_0000001.pth", "model_0000002.pth", "model_final.pth", "last_checkpoint"}
    assert names == kept
