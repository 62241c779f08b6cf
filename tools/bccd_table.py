# SPDX-License-Identifier: Apache-2.0
"""The small-data experiment: train every row on BCCD with several seeds, and make the table.

    python tools/bccd_table.py --data datasets/BCCD

Each training has a folder of its own below output/bccd_table and goes on where it was stopped.
A finished one is kept as a small JSON file in results/bccd; the table is made of those.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from d2_decouple.config import ConfigError, nearest, text_override
from d2_decouple.data import register_bccd
from d2_decouple.evaluation import EvaluationError, GroundTruth, read_ground_truth
from d2_decouple.evaluation.evaluator import DETECTIONS_FILE, SUMMARY_FILE
from d2_decouple.evaluation.files import put_between, write_json, write_text
from d2_decouple.evaluation.runs import (
    check_packed,
    commit_of,
    config_changes,
    config_hash,
    config_text,
    machine,
    pack_detections,
)
from d2_decouple.evaluation.small_data import ROWS, Run, table

ROOT = Path(__file__).resolve().parents[1]
SPLITS = {"trainval": 292, "test": 72}
START, END = "<!-- bccd table -->", "<!-- end -->"


class TableError(RuntimeError):
    """Something that stops the table; the message says what, and what to type."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parse_arguments(arguments)
    if args.list:
        for row in ROWS:
            hosts = f"  against {', '.join(row.hosts)}" if row.hosts else ""
            print(f"{row.recipe:32} seeds {', '.join(map(str, row.seeds))}{hosts}")
        return 0
    try:
        make_table(args)
    except (ConfigError, EvaluationError, FileNotFoundError, TableError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, help="folder of BCCD, which holds Annotations")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--only", metavar="ROW,...", help="train these rows alone")
    parser.add_argument("--seeds", metavar="N,...", help="train these seeds alone")
    parser.add_argument("--no-training", action="store_true", help="table of what is there")
    parser.add_argument("--no-table", action="store_true", help="train only")
    parser.add_argument("--rerun", action="store_true", help="replace results of other configs")
    parser.add_argument("--threads", type=int, default=_cores(), help="CPU threads of a training")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "bccd")
    parser.add_argument("--work", type=Path, default=ROOT / "output" / "bccd_table")
    parser.add_argument("--write-readme", nargs="?", type=Path, const=ROOT / "README.md")
    parser.add_argument(
        "--iterations", type=int, help="try it out with another length; results are not kept"
    )
    args = parser.parse_args(arguments)
    if args.data is None and not args.list:
        parser.error("--data DIR is missing: the folder of BCCD, which holds Annotations")
    return args


def make_table(args: argparse.Namespace) -> None:
    """Train what is missing, keep it, and print or write the table."""
    check_data(args.data)
    use_data(args.data, args.work)
    runs = [] if args.no_training else chosen_runs(args)
    configs = {run: config_text(run.config()) for run in runs}
    stale = [] if args.rerun else [run for run in runs if is_stale(run, configs[run], args)]
    if stale:
        raise TableError(
            "made with another config than today's: "
            + ", ".join(str(result_file(run, args)) for run in stale)
            + "; type --rerun to train these again"
        )
    truth = read_ground_truth("bccd_test")
    for number, run in enumerate(runs, start=1):
        heading = f"[{number}/{len(runs)}] {run.name}"
        if result_file(run, args).is_file() and not is_stale(run, configs[run], args):
            print(f"{heading}: kept from before", flush=True)
            continue
        result = train(run, configs[run], truth, heading, args)
        print(f"{heading}: AP {result['metrics']['AP']:.1f}", flush=True)
        if run.iterations is None:
            args.results.mkdir(parents=True, exist_ok=True)
            write_json(result_file(run, args), result)
    if args.iterations is not None:
        print("No table: these trainings are not of the experiment's length")
        return
    if args.no_table:
        return
    text = table(kept_results(args), truth)
    if args.write_readme:
        put_between_markers(args.write_readme, text)
        print(f"written into {args.write_readme}")
    else:
        print(text)


def check_data(folder: Path) -> None:
    """Raise TableError unless the folder has BCCD's own splits, so that numbers compare."""
    counts = {}
    for split in SPLITS:
        file = folder / "ImageSets" / "Main" / f"{split}.txt"
        if not file.is_file():
            raise TableError(
                f"{file} is missing; --data wants the folder of BCCD that holds Annotations, "
                "ImageSets and JPEGImages"
            )
        counts[split] = len(file.read_text(encoding="utf-8").split())
    if counts != SPLITS:
        raise TableError(
            f"{folder} has {counts['trainval']} images in trainval and {counts['test']} in test; "
            f"BCCD has {SPLITS['trainval']} and {SPLITS['test']}, and only with these do the "
            "numbers compare"
        )


def use_data(folder: Path, work: Path) -> None:
    """Let the recipes find the folder, here and in the trainings, under the name they know."""
    folder = folder.resolve()
    if folder.name != "BCCD":
        link = work / "datasets" / "BCCD"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(folder, target_is_directory=True)
        folder = link.absolute()
    os.environ["DETECTRON2_DATASETS"] = str(folder.parent)
    register_bccd()  # the recipes do it as well, but none may be loaded


def chosen_runs(args: argparse.Namespace) -> list[Run]:
    """Runs of the rows and seeds that were asked for: one seed of all rows, then the next."""
    rows = {row.recipe: row for row in ROWS}
    names = args.only.split(",") if args.only else list(rows)
    for name in names:
        if name not in rows:
            raise TableError(f"no row {name!r}; {nearest(name, rows)}")
    known = sorted({seed for name in names for seed in rows[name].seeds})
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")] if args.seeds else known
    except ValueError:
        raise TableError(f"--seeds {args.seeds!r}: wanted numbers, as in 1,2,3") from None
    unknown = sorted(set(seeds) - set(known))
    if unknown:
        raise TableError(f"these rows have the seeds {known}, not {unknown}")
    return [
        Run(name, seed, args.iterations)
        for seed in seeds
        for name in names
        if seed in rows[name].seeds
    ]


def result_file(run: Run, args: argparse.Namespace) -> Path:
    """Where a finished run is kept."""
    return Path(args.results) / f"{run.name}.json"


def is_stale(run: Run, text: str, args: argparse.Namespace) -> bool:
    """Whether there is a result, but of another config."""
    file = result_file(run, args)
    return file.is_file() and bool(config_changes(read_result(file)["config"], text))


def read_result(file: Path) -> dict[str, Any]:
    """A kept result."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise TableError(f"{file} is damaged ({error}); delete it to train again") from error


def train(
    run: Run, text: str, truth: GroundTruth, heading: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Train in a process of its own, or go on with it, and take what it left."""
    # The config is in the folder's name: a training never goes on with another one's weights.
    folder = (args.work / f"{run.name}_{config_hash(text)}").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    resumed = (folder / "last_checkpoint").is_file()
    weights = trained_weights(run, text, args)
    command = test_command(run, folder, weights) if weights else train_command(run, folder)
    what = "testing" if weights else "going on" if resumed else "training"
    log = folder / "console.txt"
    print(f"{heading}: {what}, log: {log}", flush=True)
    start = time.monotonic()
    status = run_training(command, log, args.threads)
    if status:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise TableError(f"{run.name} ended with status {status}; the end of {log}:\n{last}")
    summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    found = json.loads((folder / DETECTIONS_FILE).read_text(encoding="utf-8"))
    images = pack_detections(found)
    check_packed(run.name, images, truth, summary["metrics"]["AP"])
    return {
        "recipe": run.recipe,
        "seed": run.seed,
        "config_hash": config_hash(text),
        "overrides": run.overrides(),
        "commit": commit_of(ROOT, ("d2_decouple", "configs", "tools")),
        "machine": machine(args.threads),
        "seconds": None if resumed or weights else round(time.monotonic() - start),
        "metrics": summary["metrics"],
        "classes": summary["classes"],
        "config": text,
        "images": images,
    }


def trained_weights(run: Run, text: str, args: argparse.Namespace) -> Path | None:
    """What the training of another row left, for a run that is only tested; None for others."""
    (name,) = {row.weights for row in ROWS if row.recipe == run.recipe}
    if not name:
        return None
    source = Run(name, run.seed, run.iterations)
    trained = config_text(source.config())
    others = [key for key in config_changes(trained, text) if not key.startswith("model.selection")]
    if others:
        raise TableError(f"{run.name} tests what {source.name} trained, but differs in {others}")
    file = args.work / f"{source.name}_{config_hash(trained)}" / "model_final.pth"
    if not file.is_file():
        raise TableError(
            f"{run.name} tests what {source.name} trained, and there is no {file}; delete "
            f"{result_file(source, args)}, if it is there, and type --only {name},{run.recipe}"
        )
    return file.absolute()


def test_command(run: Run, folder: Path, weights: Path) -> list[str]:
    """What tests a run with the weights of another one."""
    command = [sys.executable, "-m", "d2_decouple.train", "--config-file", run.recipe]
    command += ["--eval-only", text_override("train.init_checkpoint", weights)]
    return [*command, *run.overrides(), text_override("train.output_dir", folder)]


def train_command(run: Run, folder: Path) -> list[str]:
    """What trains a run; it can be typed by hand as well."""
    command = [sys.executable, "-m", "d2_decouple.train", "--config-file", run.recipe, "--resume"]
    return [*command, *run.overrides(), text_override("train.output_dir", folder)]


def run_training(command: Sequence[str], log: Path, threads: int) -> int:
    """Run a command with its output in a file; its exit status.

    Whatever stops this process stops the training first, and lets it save.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    with log.open("a", encoding="utf-8") as output:
        child = subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes once, from here, and not while it saves
        )
        try:
            return child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()


def kept_results(args: argparse.Namespace) -> dict[Run, dict[str, Any]]:
    """All results that belong to today's configs; others are named and left out."""
    results = {}
    for run in (Run(row.recipe, seed) for row in ROWS for seed in row.seeds):
        file = result_file(run, args)
        if not file.is_file():
            continue
        if is_stale(run, config_text(run.config()), args):
            print(f"left out, made with another config: {file}", file=sys.stderr)
            continue
        results[run] = read_result(file)
    if not results:
        raise TableError(f"nothing is finished in {args.results}; run it without --no-training")
    return results


def put_between_markers(file: Path, text: str) -> None:
    """Replace what stands between the two marker lines of a document."""
    content = put_between(file.read_text(encoding="utf-8"), START, END, f"\n{text}\n")
    if content is None:
        raise TableError(
            f"{file} has no place for the table: put the lines {START} and {END} into it"
        )
    write_text(file, content)


def _cores() -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return usable or 1


def _stopped(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stopped)
    sys.exit(main())
