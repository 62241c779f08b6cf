# SPDX-License-Identifier: Apache-2.0
"""Kill a training again and again, or divide it among two nodes, and see that nothing is lost.

    python tools/faults.py --kills 20 --seed 0
    python tools/faults.py --two-nodes --method all

A tiny detector learns from generated images, once without a break and once with kills (SIGKILL) at
random moments of loading, stepping, saving and evaluating. After each kill all checkpoints must be
whole, and the next start must go on from the last one; the weights at the end must be the same bit
for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tiny_runs import PATHS, RunError, TinyTraining, differences, free_port, start

from d2_decouple.config import ConfigError, nearest
from d2_decouple.engine.methods import METHODS

MOMENTS = ("loading", "step", "saving", "evaluating", "any")
_POLL = 0.001  # seconds
_LONGEST = 600.0  # seconds that a tiny training may take


class Kill(NamedTuple):
    """A kill, and what was there afterwards.

    Attributes:
        moment: what was waited for.
        seconds: after the start.
        saved: iterations in the last checkpoint, 0 before the first one.
        unfinished: files that were being written.
    """

    moment: str
    seconds: float
    saved: int
    unfinished: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--method", default="fcos", metavar="NAME|all")
    parser.add_argument("--kills", type=int, default=20, help="of each method (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    parser.add_argument("--two-nodes", action="store_true", help="two nodes instead of kills")
    parser.add_argument("--work", type=Path, help="a folder to keep; else a temporary one")
    args = parser.parse_args(arguments)
    methods = list(METHODS) if args.method == "all" else [args.method]
    try:
        for method in methods:
            if method not in METHODS:
                raise ConfigError(f"no method {method!r}: {nearest(method, METHODS)}")
        with tempfile.TemporaryDirectory() as scratch:
            for method in methods:
                work = (args.work or Path(scratch)) / method
                if args.two_nodes:
                    print(two_nodes_line(work, method), flush=True)
                else:
                    print(kills_table(work, method, args.kills, args.seed), flush=True)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def kills_table(folder: Path, method: str, kills: int, seed: int) -> str:
    """Kill a training so often, compare, and tell of each kill in a line of a Markdown table."""
    tiny = TinyTraining(
        folder,
        method,
        iterations=4 * kills + 4,
        options=["train.eval_period=4", "train.checkpointer.period=2"],
    )
    done = broken_training(tiny, kills, seed)
    compare(tiny.folder / "whole", tiny.folder / "broken", [each.saved for each in done])
    lines = [
        f"{method}: {len(done)} kills, nothing lost beyond the last checkpoint, all checkpoints "
        "whole, final and best weights bit-equal to the unbroken training's",
        "",
        "| kill | moment | seconds after the start | iterations saved | files cut off |",
        "| --- | --- | --- | --- | --- |",
    ]
    for number, kill in enumerate(done, 1):
        cells = number, kill.moment, f"{kill.seconds:.2f}", kill.saved, kill.unfinished
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def broken_training(tiny: TinyTraining, kills: int, seed: int) -> list[Kill]:
    """Train without a break into ``whole``, with kills into ``broken``; what each kill left.

    Raises:
        RunError: a checkpoint is damaged, a start does not go on from the last one, or the
            training ended before its last kill.
    """
    draw = random.Random(seed)
    whole, broken = tiny.folder / "whole", tiny.folder / "broken"
    console = tiny.folder / "whole.txt"
    run = start(tiny.arguments(whole), console)
    wait_for(run, lambda: bool(said(console)), console)
    began = time.monotonic()
    wait_for(run, lambda: "iteration 1/" in said(console), console)
    loading = time.monotonic() - began
    finish(run, console)
    done: list[Kill] = []
    saved = 0
    while len(done) < kills:
        moment = MOMENTS[len(done) % len(MOMENTS)]
        console = tiny.folder / f"broken_{len(done):02d}.txt"
        run = start(tiny.arguments(broken, resume=True), console)
        began = time.monotonic()
        try:
            come = _moment(moment, draw, loading, broken, console)
            wait_for(run, partial(_held_at, run, come) if moment == "saving" else come, console)
        finally:
            kill(run)
        _went_on_from(saved, console)
        saved = check_whole(broken, saved)
        unfinished = len([*broken.glob("*.tmp")]) if broken.is_dir() else 0
        done.append(Kill(moment, time.monotonic() - began, saved, unfinished))
    console = tiny.folder / "broken_last.txt"
    finish(start(tiny.arguments(broken, resume=True), console), console)
    _went_on_from(saved, console)
    check_whole(broken, saved)
    return done


def _moment(
    name: str, draw: random.Random, loading: float, output: Path, console: Path
) -> Callable[[], bool]:
    """Whether the moment has come: seen from outside, in what is written and said."""
    if name == "saving":
        return lambda: output.is_dir() and any(x.endswith(".tmp") for x in os.listdir(output))
    if name in ("loading", "any"):
        until = time.monotonic() + draw.uniform(0, loading if name == "loading" else 2 * loading)
        steps = 1 if name == "loading" else 4  # the clock may be late on a busy machine
        return lambda: time.monotonic() > until or _count(r"iteration \d+/", console) >= steps
    wait, seen = draw.uniform(0, 0.1), 0.0
    word, wanted = r"iteration \d+/", draw.randint(1, 3)
    if name == "evaluating":
        word, wanted = "Start inference", 1

    def reached() -> bool:
        nonlocal seen
        if not seen and _count(word, console) >= wanted:
            seen = time.monotonic()
        return bool(seen) and time.monotonic() - seen > wait

    return reached


def _held_at(run: BaseProcess, come: Callable[[], bool]) -> bool:
    """Whether a moment that may pass at once has come; if so, the training is held there."""
    if not come():
        return False
    with suppress(ProcessLookupError):
        os.killpg(run.pid or 0, signal.SIGSTOP)
        if not come():
            os.killpg(run.pid or 0, signal.SIGCONT)
            return False
    return come()


def _count(pattern: str, console: Path) -> int:
    return len(re.findall(pattern, said(console)))


def wait_for(run: BaseProcess, reached: Callable[[], bool], console: Path) -> None:
    """Wait until something is reached.

    Raises:
        RunError: the training ended before, or it takes too long.
    """
    until = time.monotonic() + _LONGEST
    while not reached():
        if not run.is_alive() and not reached():
            raise RunError(
                f"the training ended (status {run.exitcode}) before that was reached, see "
                f"{console}:\n{said(console)[-2000:]}"
            )
        if time.monotonic() > until:
            raise RunError(f"nothing came in {_LONGEST:.0f} s, see {console}")
        time.sleep(_POLL)


def kill(run: BaseProcess) -> None:
    """SIGKILL to a training and its workers."""
    with suppress(ProcessLookupError):
        os.killpg(run.pid or 0, signal.SIGKILL)
    run.kill()  # it may not have its group yet
    run.join()


def finish(run: BaseProcess, console: Path, status: int = 0) -> None:
    """Wait for the end.

    Raises:
        RunError: it ends otherwise than with ``status``.
    """
    run.join(_LONGEST)
    if run.exitcode != status:
        kill(run)
        raise RunError(
            f"the training ended with status {run.exitcode}, wanted {status}, see {console}:\n"
            + said(console)[-3000:]
        )


def said(console: Path) -> str:
    """What a training has said so far."""
    return console.read_text(errors="replace") if console.is_file() else ""


def check_whole(output: Path, before: int) -> int:
    """Read all checkpoints; the iterations of the one that ``last_checkpoint`` names.

    Raises:
        RunError: one cannot be read, or less is saved than before.
    """
    if not output.is_dir():
        return 0
    saved = {}
    for file in output.glob("model_*.pth"):
        try:
            saved[file.name] = torch.load(file, weights_only=True)["iteration"] + 1
        except Exception as error:  # a damaged file raises nearly anything
            raise RunError(f"{file} is damaged: {error}") from error
    tag = output / "last_checkpoint"
    if not tag.is_file():
        return 0
    if tag.read_text() not in saved:
        raise RunError(f"{tag} names {tag.read_text()!r}; there are {sorted(saved)}")
    if saved[tag.read_text()] < before:
        raise RunError(f"{saved[tag.read_text()]} iterations are saved, there were {before}")
    return saved[tag.read_text()]


def _went_on_from(saved: int, console: Path) -> None:
    begun = re.search(r"Training from iteration (\d+)", said(console))
    # A file may be complete that `last_checkpoint` does not name yet: then the older one is taken.
    if begun and int(begun[1]) != saved:
        raise RunError(f"it began at iteration {begun[1]}, though {saved} were saved: {console}")


def compare(whole: Path, broken: Path, saved: Sequence[int] = ()) -> None:
    """Weights, optimizer, averages, and which iterations were written down.

    Args:
        whole: output of the unbroken training.
        broken: output of the other one.
        saved: iterations of the checkpoints that it went on from. An iteration is written down
            after it is saved and evaluated, so a kill between the two loses the last one's line.

    Raises:
        RunError: something differs.
    """
    for name in ("model_final.pth", "model_best.pth"):
        one, two = (torch.load(folder / name, weights_only=True) for folder in (whole, broken))
        del one["config"], two["config"]  # they name the folder
        differ = differences(one, two)
        if differ:
            raise RunError(f"{name} of {whole} and {broken} differ in {', '.join(differ[:5])}")
    # Detectron2 writes medians of 20 losses, which begin anew: the iterations must be the same.
    written = set(losses(whole))
    others = sorted(written ^ set(losses(broken)))
    if not (written & {iterations - 1 for iterations in saved}).issuperset(others):
        raise RunError(f"metrics.json of {whole} and {broken} have other iterations: {others}")


def losses(output: Path) -> dict[int, float]:
    """Total loss by iteration, of ``metrics.json``."""
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (output / "metrics.json").read_text().splitlines()
    ]
    return {row["iteration"]: row["total_loss"] for row in rows if "total_loss" in row}


def two_nodes_line(folder: Path, method: str) -> str:
    """Train with one process, and with two nodes of one process each; how far they differ."""
    tiny = TinyTraining(folder, method, iterations=3, options=["train.eval_period=0"])
    console = folder / "one.txt"
    finish(start(tiny.arguments(folder / "one"), console), console)
    two_nodes(tiny, folder / "two")
    one, two = losses(folder / "one"), losses(folder / "two")
    if one.keys() != two.keys():
        raise RunError(f"{method}: iterations {sorted(one)} and {sorted(two)}")
    largest = max(abs(two[i] - one[i]) / abs(one[i]) for i in one)
    return f"{method}: two nodes trained and evaluated; losses differ by {largest:.1e} at most"


def two_nodes(tiny: TinyTraining, output: Path, *options: str) -> None:
    """The same training as two nodes on this machine, one process each, by torchrun.

    Raises:
        RunError: one of them ended with an error.
    """
    path = os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    port, nodes = free_port(), []
    for rank in (0, 1):
        words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        words += ["--node-rank", str(rank), "--nproc-per-node", "1"]
        words += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        words += ["-m", "d2_decouple.train", *tiny.arguments(output, *options)]
        console = tiny.folder / f"node_{rank}.txt"
        with open(console, "w") as file:
            process = subprocess.Popen(
                words, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=tiny.folder
            )
        nodes.append((process, console))
    try:
        for process, console in nodes:
            if process.wait(_LONGEST) != 0:
                raise RunError(f"a node failed, see {console}:\n{said(console)[-3000:]}")
    except subprocess.TimeoutExpired as error:
        raise RunError(f"a node did not end in {_LONGEST:.0f} s, see {console}") from error
    finally:
        for process, _ in nodes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
