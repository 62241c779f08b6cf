# SPDX-License-Identifier: Apache-2.0
"""Several machines and processes: two nodes, another number after a break, one that dies."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import re
import signal
import sys
import time
from itertools import chain, islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel

from d2_decouple.data.loader import TrainLoader
from d2_decouple.engine import TrainingError, TrainingStoppedError
from d2_decouple.engine.processes import LostProcessError, meeting, take_buffers

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

faults = importlib.import_module("faults")
tiny_runs = importlib.import_module("tiny_runs")

NEAR = 1e-4  # of a number: float32 sums in another order, over some steps


def close(one: dict[int, float], two: dict[int, float]) -> bool:
    return one.keys() == two.keys() and all(abs(two[i] / one[i] - 1) < NEAR for i in one)


def momentum(output):
    """The sums of the gradients of the last ten steps or so, which tell of their images."""
    stored = torch.load(output / "model_final.pth", weights_only=True)
    states = stored["trainer"]["optimizer"]["state"].values()
    return torch.cat([state["momentum_buffer"].flatten() for state in states])


@pytest.mark.skipif(sys.platform != "linux", reason="two agents of torchrun; tried on Linux alone")
@pytest.mark.parametrize("method", ["pdnet", "decoupled_rcnn"])
def test_two_nodes_learn_what_one_process_learns(method, tmp_path):
    """The two-stage method draws its proposals in each process: its losses are others."""
    tiny = tiny_runs.TinyTraining(tmp_path, method, iterations=2, options=["train.eval_period=0"])
    faults.two_nodes(tiny, tmp_path / "two")
    assert (tmp_path / "two" / "evaluation.json").is_file()
    for node in (0, 1):
        lines = (tmp_path / f"node_{node}.txt").read_text().splitlines()
        # torchrun's own agent reports that the first one was gone before it, all being done.
        ours = [line for line in lines if "torch/distributed/elastic/agent" not in line]
        assert not any("Traceback" in line for line in ours)
    assert "World size: 2" in (tmp_path / "node_0.txt").read_text()
    two = faults.losses(tmp_path / "two")
    assert sorted(two) == [0, 1]
    if method == "pdnet":
        faults.finish(
            tiny_runs.start(tiny.arguments(tmp_path / "one"), tmp_path / "1.txt"), tmp_path
        )
        assert close(faults.losses(tmp_path / "one"), two)


def started(tiny, output, processes, *, resume):
    """A training on this machine, as torchrun would start its processes, and their consoles."""
    port, runs = faults.free_port(), []
    arguments = tiny.arguments(output, resume=resume)
    for rank in range(processes):
        console = tiny.folder / f"{output.name}_{processes}_{port}_{rank}.txt"
        environment = tiny_runs.rank_of(rank, processes, port)
        runs.append((tiny_runs.start(arguments, console, environment), console))
    return runs


def run_until(tiny, output, processes, iteration, *, resume):
    """Train until an iteration is in the log, then ask one of the processes to stop."""
    runs = started(tiny, output, processes, resume=resume)
    process, console = runs[0]
    try:
        faults.wait_for(process, lambda: f"iteration {iteration}/" in faults.said(console), console)
        os.kill(process.pid, signal.SIGTERM)
        for each, its_console in runs:
            faults.finish(each, its_console, status=128 + signal.SIGTERM)
    finally:
        for each, _ in runs:
            faults.kill(each)
    return faults.check_whole(output, iteration)


def test_another_number_of_processes_goes_on_with_the_same_steps(tmp_path):
    """2, then 1, then 2 processes: the gradients are those of 2 in one piece."""
    options = ["train.eval_period=0", "train.checkpointer.period=100"]
    tiny = tiny_runs.TinyTraining(tmp_path, "fcos", iterations=14, options=options)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for each, console in started(tiny, whole, 2, resume=False):
        faults.finish(each, console)
    first = run_until(tiny, broken, 2, 2, resume=False)
    second = run_until(tiny, broken, 1, first + 2, resume=True)
    assert first < second < 14
    consoles = []
    for each, console in started(tiny, broken, 2, resume=True):
        faults.finish(each, console)
        consoles.append(faults.said(console))
    assert f"Training from iteration {second} to 14" in consoles[0]
    assert "come again" not in "".join(consoles)
    one, two = momentum(whole), momentum(broken)
    assert (one - two).norm() < NEAR * one.norm()
    assert sorted(faults.losses(broken)) == list(range(14))


def test_a_killed_process_ends_the_others_with_its_last_words(tmp_path):
    options = ["train.eval_period=0", "train.checkpointer.period=2"]
    tiny = tiny_runs.TinyTraining(tmp_path, "fcos", iterations=1000, options=options)
    (first, console), (second, _) = started(tiny, tmp_path / "out", 2, resume=False)
    try:
        faults.wait_for(first, lambda: "iteration 3/" in faults.said(console), console)
        os.kill(second.pid, signal.SIGKILL)
        killed = time.monotonic()
        first.join(60)
        assert first.exitcode == 1, faults.said(console)[-2000:]
        assert time.monotonic() - killed < 60
    finally:
        for run in (first, second):
            faults.kill(run)
    message = faults.said(console)
    for part in ("process 0 of 2 cannot go on", "it left no message", "with --resume goes on"):
        assert part in message
    assert "Traceback" not in message
    assert faults.check_whole(tmp_path / "out", 2) >= 2


def said_by_two(target, folder, *args, start="spawn"):
    """What two processes, each ``target(rank, port, folder, ...)``, write into their files."""
    context, port = multiprocessing.get_context(start), faults.free_port()
    runs = [context.Process(target=target, args=(rank, port, folder, *args)) for rank in (0, 1)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(120)
        run.kill()
    return [(folder / f"{rank}.txt").read_text() for rank in (0, 1)]


def in_one_of_two(rank, port, folder, failure):
    os.environ.update(tiny_runs.rank_of(rank, 2, port))
    torch.set_num_threads(1)
    said = "nothing"
    try:
        with meeting("gloo"):
            dist.all_reduce(torch.ones(1))
            if rank == 1:
                raise failure
            dist.all_reduce(torch.ones(1))
    except (RuntimeError, KeyError) as error:
        said = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.txt").write_text(said)


def distributed_step(rank, stopped):
    """What Detectron2 and a distributed model do with a group, and how many threads work then."""
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    model.hooks = [model]  # as a trainer and its hooks know each other
    model(torch.ones(1, 2)).sum().backward()
    assert len(comm.all_gather({"rank": rank})) == 2
    inside = len(os.listdir("/proc/self/task"))
    if stopped:
        raise TrainingStoppedError(str(inside), 143)
    return inside


def threads_of_the_group(rank, port, folder, stopped):
    """The threads before, in and after a meeting that ends well, or as when it is stopped."""
    os.environ.update(tiny_runs.rank_of(rank, 2, port))
    torch.set_num_threads(1)
    before = len(os.listdir("/proc/self/task"))
    try:
        with meeting("gloo"):
            inside = distributed_step(rank, stopped)
    except TrainingStoppedError as error:
        inside = str(error)
    after = len(os.listdir("/proc/self/task"))
    (folder / f"{rank}.txt").write_text(f"{before} {inside} {after}")


def buffers_of_one_of_two(rank, port, folder):
    os.environ.update(tiny_runs.rank_of(rank, 2, port))
    torch.set_num_threads(1)
    model = torch.nn.BatchNorm2d(3)
    model.running_mean += rank + 1
    with meeting("gloo"):
        take_buffers(model)
    (folder / f"{rank}.txt").write_text(str(model.running_mean.tolist()))


def test_what_is_evaluated_has_the_statistics_that_are_saved(tmp_path):
    assert said_by_two(buffers_of_one_of_two, tmp_path) == ["[1.0, 1.0, 1.0]"] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("stopped", [False, True])
def test_threads_of_the_group_end_with_it(stopped, tmp_path):
    """One that outlives it may abort the process when the interpreter ends."""
    for said in said_by_two(threads_of_the_group, tmp_path, stopped):
        before, inside, after = map(int, said.split())
        assert before <= after < inside


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (TrainingError("the memory was full"), "process 1 on .*: the memory was full"),
        (RuntimeError("shapes do not fit"), "process 1 on .*: RuntimeError: shapes do not fit"),
        (KeyError("loss"), "process 1 on .*: KeyError: 'loss'"),
    ],
)
def test_what_one_process_dies_of_is_what_the_others_say(failure, words, tmp_path):
    first, second = said_by_two(in_one_of_two, tmp_path, failure, start="fork")
    assert first.startswith(LostProcessError.__name__)
    assert re.search(words, first)
    assert second == f"{type(failure).__name__}: {failure}"


@pytest.mark.parametrize("sizes", [[(20, 10)], [(20, 10), (10, 20), (30, 10)]])
def test_the_images_of_a_step_are_the_same_for_any_number_of_processes(sizes, monkeypatch):
    """Wide and tall images alike: each batch of all processes has one kind, as of one process."""
    dataset = [
        {"file_name": str(i), "width": sizes[i % len(sizes)][0], "height": sizes[i % len(sizes)][1]}
        for i in range(22)
    ]

    def steps(processes):
        shares = []
        for rank in range(processes):
            monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: processes)
            monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
            loader = TrainLoader(
                dataset=dataset, mapper=lambda x: x["file_name"], total_batch_size=4, seed=3
            )
            shares.append(list(islice(loader, 9)))
            assert all(len(batch) == 4 // processes for batch in shares[-1])
        return [sorted(chain.from_iterable(parts)) for parts in zip(*shares, strict=True)]

    assert steps(1) == steps(2) == steps(4)

    def accumulated(batch, batches):
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 1)
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: 0)
        loader = TrainLoader(
            dataset=dataset, mapper=lambda x: x["file_name"], total_batch_size=batch, seed=3
        )
        loader.step_batches = batches
        found = list(islice(loader, 9 * batches))
        return [sorted(chain.from_iterable(found[i : i + batches])) for i in range(0, 9, batches)]

    assert accumulated(2, 2) == accumulated(4, 1)[: len(accumulated(2, 2))]
