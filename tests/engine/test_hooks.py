# SPDX-License-Identifier: Apache-2.0
"""Saving and evaluating: what is kept, and what a training that was killed makes up for."""

import os

import pytest
import torch
from test_trainer import make

from d2_decouple.checkpoint import Checkpointer
from d2_decouple.engine import TrainingError
from d2_decouple.engine.hooks import EarlyStop, Evaluating, Saving


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


def run(folder, scores, max_iter, *, period=2, killed_at=None, patience=0):
    """Train up to ``max_iter`` from the last checkpoint, perhaps killed before a step."""
    trainer = make()
    checkpointer = Checkpointer(trainer.model, str(folder), trainer=trainer)
    evaluating = Evaluating(scores, period=period, checkpointer=checkpointer, patience=patience)
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
    assert evaluating.state_dict() == {"best": 40.0, "evaluated": 6, "without_better": 1}
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


def stop(folder, scores, max_iter=20, **options):
    """Train until it is stopped early; what it says."""
    with pytest.raises(EarlyStop) as stopped:
        run(folder, scores, max_iter, **options)
    return str(stopped.value)


def test_a_training_that_gets_no_better_stops(tmp_path):
    scores = Scores(10.0, 30.0, 30.0, 20.0, 29.0, 99.0)
    said = stop(tmp_path, scores, patience=3)
    assert scores.seen == [10.0, 30.0, 30.0, 20.0, 29.0]
    for part in ("after 10 of 20", "last 3 evaluations", "than 30.00", "model_best.pth"):
        assert part in said
    assert best(tmp_path) == (3, 30.0)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000009.pth"


def test_a_better_ap_begins_the_waiting_anew(tmp_path):
    scores = Scores(10.0, 9.0, 11.0, 9.0, 12.0, 9.0)
    run(tmp_path, scores, 12, patience=2)
    assert len(scores.seen) == 6


def test_nothing_learned_yet_is_no_reason_to_stop(tmp_path):
    scores = Scores(0.0, 0.0, float("nan"), 0.0, 5.0, 4.0, 3.0, 99.0)
    stop(tmp_path, scores, patience=2)
    assert scores.seen[-1] == 3.0


def test_the_last_evaluation_is_the_end_anyway(tmp_path):
    run(tmp_path, Scores(10.0, 9.0, 8.0), 6, patience=2)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_without_patience_it_goes_on(tmp_path):
    scores = Scores(10.0, *[9.0] * 9)
    run(tmp_path, scores, 20)
    assert len(scores.seen) == 10


def test_a_resumed_training_stops_where_the_unbroken_one_does(tmp_path):
    """Killed between two evaluations, and in the one that would have stopped it."""
    values = (10.0, 30.0, 20.0, 25.0, 29.0, 99.0)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    said = stop(whole, Scores(*values), patience=3)
    with pytest.raises(KilledError):
        run(broken, Scores(*values[:3]), 20, patience=3, killed_at=7)
    with pytest.raises(KilledError):
        run(broken, Scores(20.0, 25.0, None), 20, patience=3)
    scores = Scores(29.0, 99.0)
    assert stop(broken, scores, patience=3) == said
    assert scores.seen == [29.0]


def test_a_training_that_stopped_stays_so_unless_it_shall_wait_longer(tmp_path):
    stop(tmp_path, Scores(30.0, 20.0, 25.0), patience=2)
    trainer = make()  # what train() does then
    checkpointer = Checkpointer(trainer.model, str(tmp_path), trainer=trainer)
    evaluating = Evaluating(Scores(), period=2, checkpointer=checkpointer, patience=2)
    trainer.register_hooks([evaluating])
    checkpointer.resume_or_load("", resume=True)
    evaluating.load_state_dict({"best": 30.0, "evaluated": 6, "without_better": 2})
    checkpointer.save("model_final", iteration=5)
    for _ in range(2):  # counts no evaluation twice
        scores = Scores(25.0)
        assert "after 6 of 20" in stop(tmp_path, scores, patience=2)
        assert scores.seen == [25.0]
    scores = Scores(24.0, 99.0)
    stop(tmp_path, scores, patience=3)
    assert scores.seen == [24.0]


def test_all_processes_stop_when_the_first_does(tmp_path, monkeypatch):
    """Only the first one knows the AP; the others answer with nothing."""
    monkeypatch.setattr("detectron2.utils.comm.all_gather", lambda x: [x, x is False])
    trainer = make()
    checkpointer = Checkpointer(trainer.model, str(tmp_path), trainer=trainer)
    evaluating = Evaluating(dict, period=2, checkpointer=checkpointer, patience=2)
    trainer.register_hooks([evaluating])
    with pytest.raises(EarlyStop):
        trainer.train(0, 6)
    assert trainer.iter == 1
