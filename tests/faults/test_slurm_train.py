# SPDX-License-Identifier: Apache-2.0
"""Slurm jobs: the script, and a job that is stopped, queued again and finished on this machine."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers_of_faults import faults, slurm_train, tiny_runs

RECIPE = ["--config-file", "fcos_R_50_FPN_1x"]


def test_the_script_asks_for_what_was_typed(tmp_path, capsys):
    pytest.importorskip("submitit")
    options = ["--dry-run", "--partition", "gpu", "--nodes", "2", "--gpus-per-node", "4"]
    options += ["--time", "600", "--folder", str(tmp_path), "--cpus-per-process", "5"]
    options += ["--sbatch", "account=vision", "--sbatch", "mem_per_gpu=40G", "--name", "coco"]
    assert slurm_train.main([*options, *RECIPE, "train.max_iter=9"]) == 0
    script = capsys.readouterr().out
    for line in (
        "--partition=gpu",
        "--nodes=2",
        "--gpus-per-node=4",
        "--ntasks-per-node=4",
        "--cpus-per-task=5",
        "--time=600",
        "--requeue",
        "--signal=USR2@120",
        "--account=vision",
        "--mem-per-gpu=40G",
        "--job-name=coco",
    ):
        assert f"#SBATCH {line}\n" in script, script
    assert "srun" in script
    assert f"submitit.core._submit {tmp_path}" in script


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config-file", "fcos_R_50_FPN_1"], ["did you mean", "fcos_R_50_FPN_1x"]),
        ([], ["--config-file NAME_OR_FILE"]),
        ([*RECIPE, "--processes-per-node", "3"], ["has one GPU", "--gpus-per-node 0"]),
        ([*RECIPE, "--dry-run", "--sbatch", "account"], ["'account' has no value", "KEY=VALUE"]),
        ([*RECIPE, "--executor", "local", "--nodes", "2"], ["one machine", "--nodes 2"]),
    ],
)
def test_mistakes_are_named_where_the_job_is_sent_off(arguments, named, tmp_path, capsys):
    pytest.importorskip("submitit")
    assert slurm_train.main(["--folder", str(tmp_path), *arguments]) == 1
    message = capsys.readouterr().err
    for part in named:
        assert part in message


def test_without_a_cluster_the_message_says_how_to_try_it(tmp_path, capsys, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))  # no srun
    assert slurm_train.main(["--folder", str(tmp_path), *RECIPE]) == 1
    message = capsys.readouterr().err
    for part in ("srun", "--dry-run", "--executor local"):
        assert part in message


def test_without_submitit_the_message_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert slurm_train.main(["--folder", str(tmp_path), *RECIPE]) == 1
    assert 'pip install "submitit>=1.5"' in capsys.readouterr().err


def test_the_warning_stops_a_training_and_queues_what_is_not_one():
    queued, told = [], []
    before = signal.getsignal(signal.SIGTERM)
    handle = slurm_train._stop_first(lambda number, frame: queued.append(number), told)
    handle(signal.SIGUSR2, None)
    assert (queued, told) == ([signal.SIGUSR2], [])
    noted = []
    signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
    try:
        handle(signal.SIGUSR2, None)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (len(queued), told, noted) == (1, [signal.SIGUSR2], [signal.SIGTERM])


def test_a_worker_does_nothing_at_the_warning(monkeypatch):
    queued = []
    handle = slurm_train._stop_first(lambda number, frame: queued.append(number), queued)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    handle(signal.SIGUSR2, None)
    assert queued == []


def test_what_is_queued_again_resumes():
    submitit = pytest.importorskip("submitit")
    delayed = slurm_train.Training(["--config-file", "x"]).checkpoint()
    assert isinstance(delayed, submitit.helpers.DelayedSubmission)
    assert delayed.function.arguments == ["--resume", "--config-file", "x"]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the job's processes in /proc")
def test_a_job_here_that_fails_says_why_and_names_its_log(tmp_path, monkeypatch, capsys):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(tiny_runs.PATHS))
    jobs = tmp_path / "jobs"
    words = ["--executor", "local", "--gpus-per-node", "0", "--folder", str(jobs)]
    nowhere = tmp_path / "nothing"
    assert slurm_train.main([*words, "--dataset", str(nowhere), "--method", "fcos"]) == 1
    (log,) = jobs.glob("*_0_log.out")
    message = "error: process 0: the training ended with status 1; its log: "
    assert message + str(log) in capsys.readouterr().err
    assert str(nowhere) in log.read_text()

    def fail() -> int:
        raise ValueError("first line\nlast line")

    monkeypatch.setattr(slurm_train, "Training", lambda arguments: fail)
    again = [*words[:-1], str(tmp_path / "others"), "--processes-per-node", "2"]
    assert slurm_train.main([*again, *RECIPE]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: process 0: last line; its log: ")
    assert second.startswith("error: process 1: last line; its log: ")


@pytest.mark.skipif(sys.platform != "linux", reason="finds the job's processes in /proc")
def test_a_job_that_is_warned_is_queued_again_and_goes_on(tmp_path, monkeypatch):
    """submitit's executor for one machine, two processes: as Slurm does two minutes before."""
    pytest.importorskip("submitit")
    options = ["train.eval_period=0", "train.checkpointer.period=1000"]
    tiny = tiny_runs.TinyTraining(tmp_path, "fcos", iterations=40, options=options)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(tiny_runs.PATHS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "out"
    words = ["--executor", "local", "--gpus-per-node", "0", "--processes-per-node", "2"]
    words += ["--time", "30", "--folder", str(tmp_path / "jobs"), *tiny.arguments(output)]
    statuses = []
    job = threading.Thread(target=lambda: statuses.append(slurm_train.main(words)))
    job.start()
    until = time.monotonic() + 300
    while not any('"iteration": 1,' in x for x in lines(output / "metrics.json")):
        assert time.monotonic() < until
        time.sleep(0.05)
    for process in processes_of(tmp_path / "jobs"):
        os.kill(process, signal.SIGUSR2)
    job.join(300)
    assert statuses == [0]
    (log,) = (tmp_path / "jobs").glob("*_0_log.out")
    said = log.read_text()
    assert "stopped by SIGTERM after" in said
    assert "Requeued job" in said
    assert said.count("Training from iteration") == 2
    assert "Training from iteration 0 to" in said
    assert faults.check_whole(output, 40) == 40
    rows = [json.loads(line) for line in lines(output / "metrics.json")]
    assert [row["iteration"] for row in rows if "total_loss" in row] == list(range(40))


def lines(file):
    return file.read_text().splitlines() if file.is_file() else []


def processes_of(folder):
    """Those of submitit's job and their workers: Slurm, too, signals all."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().decode().split("\0")
        except OSError:  # it has ended
            continue
        if "submitit.core._submit" in words and str(folder) in words:
            found.append(int(place.name))
    assert len(found) >= 2
    return found
