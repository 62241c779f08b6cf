# SPDX-License-Identifier: Apache-2.0
"""A training that is killed goes on; and the harness that kills it can fail."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch
from helpers_of_faults import faults, tiny_runs


def test_three_kills_lose_nothing(tmp_path):
    """While it loads, in a step and while it saves; 20 kills are the tool's default."""
    options = ["train.eval_period=8", "train.checkpointer.period=2"]
    tiny = tiny_runs.TinyTraining(tmp_path, "fcos", iterations=16, options=options)
    kills = faults.broken_training(tiny, 3, seed=4)
    assert [kill.moment for kill in kills] == ["loading", "step", "saving"]
    assert kills[2].unfinished == 1
    faults.compare(tmp_path / "whole", tmp_path / "broken", [kill.saved for kill in kills])


def stored(folder, name="model_0000003.pth", **content):
    folder.mkdir(exist_ok=True)
    torch.save({"iteration": 3, "config": str(folder), "model": {}, **content}, folder / name)
    (folder / "last_checkpoint").write_text(name)


def test_a_checkpoint_cut_off_is_found(tmp_path):
    stored(tmp_path)
    assert faults.check_whole(tmp_path, 4) == 4  # iteration 3 is the fourth
    file = tmp_path / "model_0000001.pth"
    file.write_bytes((tmp_path / "model_0000003.pth").read_bytes()[:-30])
    with pytest.raises(faults.RunError, match=r"model_0000001\.pth is damaged"):
        faults.check_whole(tmp_path, 0)


def test_a_tag_without_its_file_and_lost_iterations_are_found(tmp_path):
    assert faults.check_whole(tmp_path / "nothing", 0) == 0
    stored(tmp_path)
    with pytest.raises(faults.RunError, match="4 iterations are saved, there were 5"):
        faults.check_whole(tmp_path, 5)
    (tmp_path / "last_checkpoint").write_text("model_0000005.pth")
    with pytest.raises(faults.RunError, match=r"names 'model_0000005\.pth'"):
        faults.check_whole(tmp_path, 0)


def test_a_start_elsewhere_than_at_the_last_checkpoint_is_found(tmp_path):
    console = tmp_path / "console.txt"
    console.write_text("Training from iteration 4 to 8\n")
    faults._went_on_from(4, console)
    with pytest.raises(faults.RunError, match="began at iteration 4, though 6 were saved"):
        faults._went_on_from(6, console)


def finished(folder, weight=1.0, losses=(2.0, 1.0)):
    for name in ("model_final.pth", "model_best.pth"):
        stored(folder, name, model={"weight": torch.tensor([weight])})
    rows = [{"iteration": i, "total_loss": loss} for i, loss in enumerate(losses)]
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_other_weights_or_iterations_are_found(tmp_path):
    whole = finished(tmp_path / "whole")
    faults.compare(whole, finished(tmp_path / "same"))
    with pytest.raises(faults.RunError, match="differ in /model/weight"):
        faults.compare(whole, finished(tmp_path / "weights", weight=1.0 + 2**-23))
    faults.compare(whole, finished(tmp_path / "medians", losses=(2.0, 1.5)))
    with pytest.raises(faults.RunError, match="have other iterations"):
        faults.compare(whole, finished(tmp_path / "more", losses=(2.0, 1.0, 0.5)), [3])
    fewer = finished(tmp_path / "fewer", losses=(2.0,))
    faults.compare(whole, fewer, [2])  # killed between saving and writing down its iteration 1
    with pytest.raises(faults.RunError, match=r"other iterations: \[1\]"):
        faults.compare(whole, fewer, [1])
    best = finished(tmp_path / "best")
    stored(best, "model_best.pth", model={"weight": torch.tensor([0.5])})
    with pytest.raises(faults.RunError, match=r"model_best\.pth of .* differ"):
        faults.compare(whole, best)


def test_differences_name_the_place():
    one = {"a": [torch.zeros(2), 1], "b": 2}
    assert not tiny_runs.differences(one, {"a": [torch.zeros(2), 1], "b": 2})
    other = {"a": [torch.zeros(2, dtype=torch.float64), 1, 3], "b": 3}
    assert sorted(tiny_runs.differences(one, other)) == ["/a", "/a/0", "/b"]
    assert tiny_runs.differences({"a": 1}, {"c": 1}) == [""]
    assert tiny_runs.differences(torch.zeros(1), torch.zeros(2)) == [""]


def test_an_unknown_method_is_named(capsys):
    assert faults.main(["--method", "pdnett"]) == 1
    assert "no method 'pdnett': did you mean 'pdnet'" in capsys.readouterr().err


def test_a_training_that_ends_before_its_kill_is_an_error(tmp_path):
    class Ended:
        exitcode = 0

        def is_alive(self):
            return False

    (tmp_path / "console.txt").write_text("last words")
    with pytest.raises(faults.RunError, match=r"ended \(status 0\) before(.|\n)*last words"):
        faults.wait_for(Ended(), lambda: False, tmp_path / "console.txt")


def test_a_node_that_does_not_end_is_killed_and_named(tmp_path, monkeypatch):
    did = []

    class Hanging:
        def __init__(self, words, **options):
            pass

        def wait(self, seconds=None):
            did.append("wait")
            if seconds is not None:
                raise subprocess.TimeoutExpired("torchrun", seconds)

        def kill(self):
            did.append("kill")

    tiny = tiny_runs.TinyTraining(tmp_path, "fcos", iterations=1)
    monkeypatch.setattr(faults.subprocess, "Popen", Hanging)
    with pytest.raises(faults.RunError, match=r"a node did not end in 600 s, see .*node_0\.txt"):
        faults.two_nodes(tiny, tmp_path / "out")
    assert did == ["wait", "kill", "wait", "kill", "wait"]


def test_every_method_has_a_tiny_training():
    assert tiny_runs.recipe_of("tscode") == "tscode_fcos_R_50_FPN_1x"
    assert tiny_runs.recipe_of("salt") == "salt_R_50_FPN_1x"
    names = {tiny_runs.recipe_of(method) for method in faults.METHODS}
    assert len(names) == len(faults.METHODS) == 8
