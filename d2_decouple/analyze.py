# SPDX-License-Identifier: Apache-2.0
"""``python -m d2_decouple.analyze``: several models compared in one self-contained report."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog

from .analysis import (
    Observed,
    Summary,
    compare_models,
    first_images,
    observe,
    read_kept,
    render_report,
    summarise,
)
from .config import ConfigError
from .data import DataError, register_bccd, register_folder, require_dataset
from .data.foreign import read_json
from .data.images import ImageError, read_rgb
from .engine import run_command
from .engine.predictor import Predictor
from .evaluation import EvaluationError, GroundTruth, read_ground_truth
from .evaluation.files import write_text

__all__ = ["main"]

_EPILOG = """
examples:
  python -m d2_decouple.analyze --dataset bccd_test --output report.html --json report.json \\
      --model FCOS fcos_R_18_FPN_bccd output/fcos/model_final.pth \\
      --model TSCODE output/tscode/config.yaml output/tscode/model_final.pth
  python -m d2_decouple.analyze --dataset FOLDER --output report.html --limit 50 \\
      --model A CONFIG WEIGHTS --model B CONFIG WEIGHTS --model C CONFIG WEIGHTS --compare C:A
  python -m d2_decouple.analyze --dataset bccd_test --output report.html \\
      --detections FCOS results/bccd/fcos_R_18_FPN_bccd_seed1.json

For each model: parameters, multiply-adds, time and memory of each slot; kinds of errors after
TIDE, and what each costs; and how far score and IoU are apart, of detections and, for one-stage
detectors of this package, of all dense predictions of an object. Without --compare every model
is compared with the first. Of a folder the test set is taken that a training would take.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 1 if it could not be done.
    """
    args = _parser().parse_args(arguments)
    return run_command(lambda: _analyze(args), ImageError, ValueError, OSError)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d2_decouple.analyze",
        description=str(__doc__).splitlines()[0],
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    triple: dict[str, Any] = {"nargs": 3, "metavar": ("NAME", "CONFIG", "WEIGHTS")}
    pair: dict[str, Any] = {"nargs": 2, "metavar": ("NAME", "FILE")}
    add("--model", action="append", default=[], help="a model to run; again for others", **triple)
    add(
        "--detections",
        action="append",
        default=[],
        help="detections that were kept of a training (results/*/*.json) instead of a model",
        **pair,
    )
    add("--dataset", required=True, metavar="NAME|FOLDER", help="images and their objects")
    add("--output", required=True, metavar="FILE.html", help="the report")
    add("--json", metavar="FILE", help="write all numbers, too")
    add("--limit", type=_positive, metavar="N", help="only the first N images")
    add(
        "--compare",
        action="append",
        metavar="NAME:HOST",
        help="a pair of models whose difference is taken; again for others",
    )
    add("--draws", type=_positive, default=1000, help="of the images, for intervals (%(default)s)")
    add("--repeats", type=_positive, default=5, help="runs that times are of (%(default)s)")
    add("--title", default="Detectors compared", help="of the report")
    add("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number from 1, got {text}")
    return int(text)


def _analyze(args: argparse.Namespace) -> None:
    names = [name for name, *_ in (*args.model, *args.detections)]
    _check_names(names)
    pairs = _pairs(args.compare, names)
    output = Path(args.output)
    for file in (output, *([Path(args.json)] if args.json else [])):
        if not file.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {file.parent} to write {file.name} into")
    dataset = _dataset(args.dataset)
    truth = first_images(read_ground_truth(dataset), args.limit)
    summaries = [summarise(x, truth, draws=args.draws) for x in _observed(args, dataset, truth)]
    compared = compare_models(summaries, pairs)
    files = {record["image_id"]: record["file_name"] for record in DatasetCatalog.get(dataset)}
    places = list(truth.images)

    def read(place: int) -> np.ndarray:
        return read_rgb(files[places[place]])

    page = render_report(
        summaries,
        compared,
        truth,
        read,
        title=f"{args.title}: {args.dataset}",
        draws=args.draws,
        where=_where(args.device),
    )
    write_text(output, page)
    print(f"report: {output}")
    if args.json:
        record = {
            "dataset": args.dataset,
            "images": len(truth.images),
            "draws": args.draws,
            "device": _where(args.device),
            "models": [summary.as_record(truth.class_names) for summary in summaries],
            "differences": [item.as_record() for item in compared],
        }
        write_text(Path(args.json), json.dumps(record, indent=1, allow_nan=False) + "\n")
        print(f"numbers: {args.json}")
    _print_summary(summaries)


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise ConfigError(
            "nothing to analyze: give --model NAME CONFIG WEIGHTS, or --detections NAME FILE"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two models are called {twice[0]!r}; give each a name of its own")


def _pairs(given: Sequence[str] | None, names: Sequence[str]) -> list[tuple[str, str]]:
    if given is None:
        return [(name, names[0]) for name in names[1:]]
    pairs = []
    for text in given:
        # A name may hold a colon itself.
        found = [(a, b) for a in names for b in names if f"{a}:{b}" == text and a != b]
        if not found:
            raise ConfigError(
                f"--compare {text}: wanted NAME:HOST, two different names among {', '.join(names)}"
            )
        pairs.append(found[0])
    return pairs


def _dataset(name: str) -> str:
    register_bccd()
    if name not in DatasetCatalog and Path(name).is_dir():
        folder = register_folder(name)
        print(*folder.notes, sep="\n")
        return folder.test
    require_dataset(name)
    return name


def _observed(args: argparse.Namespace, dataset: str, truth: GroundTruth) -> list[Observed]:
    seen = []
    for name, config, weights in args.model:
        predictor = Predictor.from_config(config, weights, device=args.device)
        source = f"{config}, {weights}"
        seen.append(
            observe(
                name,
                predictor,
                dataset,
                truth,
                source=source,
                repeats=args.repeats,
                progress=_progress,
            )
        )
        print(f"{name}: {len(truth.images)} images", flush=True)
    for name, file in args.detections:
        seen.append(read_kept(name, _json(Path(file)), truth, source=file))
    return seen


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text}", end="\r", file=sys.stderr, flush=True)


def _json(file: Path) -> Any:
    try:
        return read_json(file)
    except DataError as error:
        raise EvaluationError(f"{file} is not JSON that is read here: {error}") from error


def _where(device: str | None) -> str:
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):
        return torch.cuda.get_device_name(name)
    threads = torch.get_num_threads()
    return f"a CPU with {threads} thread{'s' * (threads > 1)}"


def _print_summary(summaries: Sequence[Summary]) -> None:
    for summary in summaries:
        known = summary.estimates()
        shown = [f"AP {summary.average_precision:.1f}"]
        shown += [
            f"{label} {known[name].value:.3f}"
            for name, label in (
                ("score_iou", "rank correlation of detections"),
                ("rank_correlation", "within objects"),
                ("iou_gap", "IoU gap"),
            )
            if name in known
        ]
        print(f"{summary.name}: {', '.join(shown)}")


if __name__ == "__main__":
    sys.exit(main())
