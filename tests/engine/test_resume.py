# SPDX-License-Identifier: Apache-2.0
"""A training that is stopped, killed or fails, and goes on: real images, bit for bit."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from util import environment

from d2_decouple.engine.trainer import Trainer
from d2_decouple.train import main

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

differences = importlib.import_module("tiny_runs").differences

DATA = [
    "dataloader.train.dataset.names=bccd_mini_train",
    "dataloader.test.dataset.names=bccd_mini_val",
    "dataloader.test.num_workers=0",
    "dataloader.train.total_batch_size=2",
    "dataloader.test.mapper.augmentations.0.short_edge_length=96",
]
# 48 images: an epoch has 12 steps of two batches of two, so all of this happens in its middle.
EVERYTHING = [
    *DATA,
    "dataloader.train.num_workers=2",
    "dataloader.train.mapper.augmentations.0.short_edge_length=[64,80,96]",
    "dataloader.train.mapper.augmentations.0.sample_style=choice",
    "train.accumulate=2",
    "train.max_grad_norm=5",
    "train.ema.enabled=true",
    "train.max_iter=5",
    "train.eval_period=0",
    "train.checkpointer.period=0",
    "train.log_period=1",
]
YACS = [
    *("DATASETS.TRAIN", "('bccd_mini_train',)", "DATASETS.TEST", "('bccd_mini_val',)"),
    *("DATALOADER.NUM_WORKERS", "2", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "5"),
    *("SOLVER.STEPS", "(2,)", "SOLVER.WARMUP_ITERS", "3", "SOLVER.CHECKPOINT_PERIOD", "100"),
    *("INPUT.MIN_SIZE_TRAIN", "(64, 96)", "INPUT.MIN_SIZE_TEST", "96", "TEST.EVAL_PERIOD", "0"),
    *("MODEL.DECOUPLE.OVERRIDES", "['train.ema.enabled=true', 'train.accumulate=2']"),
]
# The second draws proposals, of both densities.
LAZY = {"lazy": "fcos_R_18_FPN_bccd", "two stages": "decoupled_rcnn_R_18_FPN_bccd"}


def command(kind, folder):
    if kind in LAZY:
        return ["--config-file", LAZY[kind], *EVERYTHING, f"train.output_dir={folder}"]
    # By this door a method that computes on its own predictions: the operator, two label sets.
    return ["--config-file", "pdnet_R_18_FPN_bccd.yaml", *YACS, "OUTPUT_DIR", str(folder)]


def checkpoint(folder, name="model_final.pth"):
    stored = torch.load(folder / name, weights_only=True)
    del stored["config"]  # it names the folder
    return stored


@pytest.mark.parametrize("kind", [*LAZY, "yacs"])
def test_a_stopped_and_resumed_training_equals_the_unbroken_one(
    kind, tmp_path, monkeypatch, capsys
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(command(kind, whole)) == 0

    forward, calls = Trainer._losses, []

    def stop_in_the_middle(self, batch):
        calls.append(batch)
        if len(calls) == 5:  # the first of the two batches of the third step
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_losses", stop_in_the_middle)
        assert main(command(kind, broken)) == 128 + signal.SIGTERM
    message = capsys.readouterr().err
    for part in ("stopped by SIGTERM after 3 of 5", "--resume"):
        assert part in message
    assert len(calls) == 6
    assert not (broken / "model_final.pth").exists()

    arguments = command(kind, broken)
    assert main([*arguments[:2], "--resume", *arguments[2:]]) == 0
    one, two = checkpoint(whole), checkpoint(broken)
    assert {"model", "trainer", "ema"} <= one.keys()
    assert one["trainer"]["optimizer"]["state"]
    assert not differences(one, two)
    rows = [
        [json.loads(x) for x in (f / "metrics.json").read_text().splitlines()]
        for f in (whole, broken)
    ]
    steps = [[row["iteration"] for row in side if "total_loss" in row] for side in rows]
    assert steps[0][-1] == steps[1][-1] == 4
    assert kind == "yacs" or steps[0] == steps[1] == [0, 1, 2, 3, 4]


def test_an_average_that_is_switched_on_later_begins_with_the_weights(tmp_path, monkeypatch):
    arguments = [*command("lazy", tmp_path), "train.ema.enabled=false"]
    evaluated = []
    monkeypatch.setattr(
        sys.modules["d2_decouple.engine.train"],
        "evaluate",
        lambda recipe, model, wrap: evaluated.append(model.state_dict()) or {},
    )
    assert main(arguments) == 0
    assert main([*arguments[:2], "--resume", *arguments[2:-1]]) == 0
    once, again = evaluated
    assert once.keys() == again.keys()
    assert all(torch.equal(once[name], again[name]) for name in once)


def started(arguments, folder):
    """A training in a session of its own, once it has done some steps."""
    folder.mkdir()
    with open(folder / "console.txt", "w") as console:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=console,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    deadline = time.monotonic() + 120
    while "iteration 3/" not in (folder / "console.txt").read_text():
        assert process.poll() is None, (folder / "console.txt").read_text()[-3000:]
        assert time.monotonic() < deadline, (folder / "console.txt").read_text()[-3000:]
        time.sleep(0.05)
    return process


def endless(folder):
    return [
        *("--config-file", "fcos_R_18_FPN_bccd", *DATA, "dataloader.train.num_workers=2"),
        "dataloader.train.mapper.augmentations.0.short_edge_length=64",
        *("train.max_iter=100000", "train.log_period=1", f"train.output_dir={folder}"),
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_saves_and_says_how_to_go_on(number, tmp_path):
    """As Ctrl-C on a terminal does, and a cluster that ends a job."""
    folder = tmp_path / "run"
    process = started(["d2_decouple.train", *endless(folder)], folder)
    os.killpg(process.pid, number)
    assert process.wait(60) == 128 + number
    console = (folder / "console.txt").read_text()
    assert "Traceback" not in console
    assert f"stopped by {number.name}" in console
    assert "--resume goes on" in console
    last = (folder / "last_checkpoint").read_text()
    stored = checkpoint(folder, last)
    assert f"after {stored['iteration'] + 1} of 100000" in console


def test_a_signal_to_one_process_of_several_stops_them_all(tmp_path):
    folder = tmp_path / "run"
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", "localhost:0", "-m", "d2_decouple.train", *endless(folder)]
    process = started(torchrun, folder)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(90) != 0
    last = (folder / "last_checkpoint").read_text()
    assert checkpoint(folder, last)["iteration"] >= 2
    assert "stopped by SIGTERM" in (folder / "console.txt").read_text()


def test_a_worker_that_is_killed_ends_the_training_with_all_steps_saved(tmp_path):
    folder = tmp_path / "run"
    process = started(["d2_decouple.train", *endless(folder)], folder)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert process.wait(60) == 1
    console = (folder / "console.txt").read_text()
    assert "Traceback" not in console
    for part in ("a process that loads images died", "num_workers=0", "are saved: --resume"):
        assert part in console
    stored = checkpoint(folder, (folder / "last_checkpoint").read_text())
    assert f"{stored['iteration'] + 1} iterations are saved" in console


def test_processes_that_do_not_see_the_same_checkpoints_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("detectron2.utils.comm.all_gather", lambda start: [start, 5])
    assert main(command("lazy", tmp_path)) == 1
    message = capsys.readouterr().err
    for part in ("different iterations (0, 5)", str(tmp_path), "train.output_dir="):
        assert part in message


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe"])
def test_an_earlier_training_is_not_overwritten(damage, tmp_path, capsys):
    (tmp_path / "last_checkpoint").write_bytes(b"model_0000099.pth" + damage)
    assert main(command("lazy", tmp_path)) == 1
    message = capsys.readouterr().err
    for part in (str(tmp_path), "model_0000099.pth", "--resume", "train.output_dir="):
        assert part in message


def test_the_newest_two_and_the_best_are_kept(tmp_path):
    options = [*command("lazy", tmp_path), "train.checkpointer.period=1", "train.eval_period=2"]
    assert main(options) == 0
    names = {path.name for path in tmp_path.glob("*.pth")}
    expected = {"model_0000002.pth", "model_0000003.pth", "model_best.pth", "model_final.pth"}
    assert names - {"instances_predictions.pth"} == expected
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.amp.dtype=float64", ["float64", "bfloat16"]),
        ("train.accumulate=0", ["train.accumulate", "0"]),
        ("train.max_grad_norm=-1", ["train.max_grad_norm", "-1"]),
        ("train.ema.decay=1.5", ["train.ema.decay", "1.5"]),
    ],
)
def test_options_of_a_step_are_checked(override, named, tmp_path, capsys):
    arguments = command("lazy", tmp_path / "new")
    assert main([*arguments, "train.amp.enabled=true", override]) == 1
    message = capsys.readouterr().err
    for part in named:
        assert part in message
