# SPDX-License-Identifier: Apache-2.0
"""Long trainings of tiny detectors: does the memory grow, do file handles or threads?

    python tools/soak.py --iterations 5000 --method all
    python tools/soak.py --loader

The training is watched from outside, with its workers. ``--loader`` measures instead how many
images of COCO's size a number of worker processes loads in a second.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from tiny_runs import ROOT, RunError, TinyTraining, start

from d2_decouple.config import ConfigError, nearest
from d2_decouple.engine.methods import METHODS

GROWTH = 1.0  # MiB in 1,000 iterations that count as flat: a restart a week apart would not matter
_WARM = 0.3  # share of the training in which caches fill and the allocator finds its size
_PAUSE = 0.2  # seconds between two looks
_SILENCE = 600.0  # seconds without an iteration that end the watch


class Look(NamedTuple):
    """What a training holds.

    Attributes:
        iteration: done by then.
        mebibytes: resident, the training and its workers together.
        files: open handles, likewise.
        threads: likewise.
    """

    iteration: int
    mebibytes: float
    files: int
    threads: int


class Verdict(NamedTuple):
    """How what was seen goes on: by line of least squares, without the beginning.

    Attributes:
        growth: MiB in 1,000 iterations.
        first: MiB at the beginning of the line.
        last: MiB at its end.
        files: the fewest and the most handles.
        threads: likewise.
        faults: what is not flat, in words.
    """

    growth: float
    first: float
    last: float
    files: tuple[int, int]
    threads: tuple[int, int]
    faults: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 if something grows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--method", default="fcos", metavar="NAME|all")
    parser.add_argument("--iterations", type=int, default=5000, help="(%(default)s)")
    parser.add_argument("--work", type=Path, help="a folder to keep; else a temporary one")
    parser.add_argument("--loader", action="store_true", help="measure the loader instead")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0, 1, 2, 4], help="of --loader (%(default)s)"
    )
    parser.add_argument("--images", type=int, default=96, help="of --loader (%(default)s)")
    args = parser.parse_args(arguments)
    try:
        if args.loader:
            print(loader_table(args.workers, args.images))
            return 0
        return soak(args)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def soak(args: argparse.Namespace) -> int:
    """A line of a Markdown table for each method."""
    methods = list(METHODS) if args.method == "all" else [args.method]
    for method in methods:
        if method not in METHODS:
            raise ConfigError(f"no method {method!r}: {nearest(method, METHODS)}")
    if args.iterations < 100:
        raise ConfigError(f"--iterations is {args.iterations}; wanted 100 or more, to see a slope")
    if not Path("/proc/self/statm").is_file():
        raise RunError("this system has no /proc, in which the training is watched; take Linux")
    print(
        "| method | iterations | minutes | MiB, first | last | per 1,000 iterations | handles "
        "| threads | flat |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        flush=True,
    )
    faults = []
    with tempfile.TemporaryDirectory() as scratch:
        for method in methods:
            began = time.monotonic()
            looks = watched((args.work or Path(scratch)) / method, method, args.iterations)
            verdict = judge(looks)
            minutes = (time.monotonic() - began) / 60
            print(row(method, args.iterations, minutes, verdict), flush=True)
            faults += [f"{method}: {fault}" for fault in verdict.faults]
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return 1 if faults else 0


def row(method: str, iterations: int, minutes: float, verdict: Verdict) -> str:
    """A line of the table."""
    cells = [method, str(iterations), f"{minutes:.1f}", f"{verdict.first:.0f}"]
    cells += [f"{verdict.last:.0f}", f"{verdict.growth:+.2f}"]
    cells += [f"{low} to {high}" for low, high in (verdict.files, verdict.threads)]
    return "| " + " | ".join([*cells, "**no**" if verdict.faults else "yes"]) + " |"


def watched(folder: Path, method: str, iterations: int) -> list[Look]:
    """Train a tiny detector so long, and look at it again and again.

    Raises:
        RunError: it ends with an error, or stands still.
    """
    options = ["train.eval_period=0", "train.checkpointer.period=500", "train.log_period=5"]
    tiny = TinyTraining(folder, method, iterations=iterations, options=options)
    console = folder / "soak.txt"
    run = start(tiny.arguments(folder / "soak"), console)
    looks: list[Look] = []
    heard = time.monotonic()
    while run.is_alive():
        time.sleep(_PAUSE)
        done = _iteration(console)
        if not done or (looks and done == looks[-1].iteration):
            if time.monotonic() - heard > _SILENCE:
                run.kill()
                raise RunError(f"no iteration in {_SILENCE:.0f} s, see {console}")
            continue
        heard = time.monotonic()
        seen = look(run, done)
        if seen is not None and done < iterations:  # what the evaluation takes is not the loop's
            looks.append(seen)
    run.join()
    if run.exitcode != 0:
        tail = console.read_text(errors="replace")[-2000:] if console.is_file() else ""
        raise RunError(f"the training ended with status {run.exitcode}, see {console}:\n{tail}")
    return looks


def _iteration(console: Path) -> int:
    """The last iteration that the log names, 0 before the first."""
    if not console.is_file():
        return 0
    with open(console, "rb") as file:
        file.seek(max(0, console.stat().st_size - 2**14))
        named = re.findall(rb"iteration (\d+)/", file.read())
    return int(named[-1]) if named else 0


def look(run: BaseProcess, iteration: int) -> Look | None:
    """What a process and its children hold now; None if it ended meanwhile."""
    try:
        family = _family(run.pid or 0)
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in family)
        files = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in family)
        threads = sum(len(os.listdir(f"/proc/{pid}/task")) for pid in family)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Look(iteration, pages * os.sysconf("SC_PAGE_SIZE") / 2**20, files, threads)


def _family(pid: int) -> list[int]:
    children = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        children += [int(child) for child in (task / "children").read_text().split()]
    return [pid, *(member for child in children for member in _family(child))]


def judge(looks: Sequence[Look]) -> Verdict:
    """Whether memory, handles and threads stay as they are.

    Raises:
        RunError: too few looks to say so.
    """
    last = looks[-1].iteration if looks else 0
    later = [each for each in looks if each.iteration >= _WARM * last]
    if len(later) < 8:
        raise RunError(f"only {len(later)} looks at the training; wanted 8: more --iterations")
    mean_x = sum(each.iteration for each in later) / len(later)
    mean_y = sum(each.mebibytes for each in later) / len(later)
    square = sum((each.iteration - mean_x) ** 2 for each in later)
    slope = sum((x.iteration - mean_x) * (x.mebibytes - mean_y) for x in later) / square
    begin, end = (mean_y + slope * (x.iteration - mean_x) for x in (later[0], later[-1]))
    faults = []
    # A short run cannot tell a slope from the allocator's pages: then the sum counts.
    if 1000 * slope > GROWTH and end - begin > 2 * GROWTH:
        faults.append(f"the memory grows by {1000 * slope:.2f} MiB in 1,000 iterations")
    counts = []
    for name in ("files", "threads"):
        values = [getattr(each, name) for each in later]
        half = len(values) // 2
        # More at all times of the second half than ever in the first: not a matter of a moment.
        if min(values[half:]) > max(values[:half]):
            faults.append(f"{name} grow from {values[0]} to {values[-1]}")
        counts.append((min(values), max(values)))
    return Verdict(1000 * slope, begin, end, counts[0], counts[1], tuple(faults))


def loader_table(workers: Sequence[int], images: int) -> str:
    """Images in a second by number of worker processes, as COCO's recipes load them."""
    lines = ["| workers | images/s |", "| --- | --- |"]
    for count in workers:
        lines.append(f"| {count} | {loader_rate(count, images):.1f} |")
    return "\n".join(lines)


def loader_rate(workers: int, images: int) -> float:
    """Images in a second; 640x480 JPEGs, made 800x1067 and flipped, in batches of 4."""
    from detectron2.config import instantiate

    from d2_decouple.config import get_config
    from d2_decouple.data import register_bccd

    os.environ.setdefault("DETECTRON2_DATASETS", str(ROOT / "tests" / "data"))
    register_bccd()
    data = get_config("fcos_R_50_FPN_1x").dataloader.train
    data.dataset.names, data.total_batch_size, data.num_workers = "bccd_mini_train", 4, workers
    data.seed = 0
    batches = iter(instantiate(data))
    warm = 2 * max(1, workers)  # so many lie ready when the clock starts
    list(islice(batches, warm))
    began = time.monotonic()
    count = sum(len(batch) for batch in islice(batches, images // 4))
    return count / (time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main())
