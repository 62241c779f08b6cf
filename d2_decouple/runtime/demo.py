# SPDX-License-Identifier: Apache-2.0
"""``python -m d2_decouple.demo --model x.onnx``: detections of an exported model on images."""

import argparse
import glob
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from .drawing import draw_detections
from .images import ImageFileError, read_image
from .model import ExportedDetector, ExportedModelError
from .selection import Detections

__all__ = ["is_meant", "main"]

_SUFFIXES = {*(".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")}
_SIDES = (640, 2000)  # pixels: the longer side of a drawn picture
_QUALITY = 92
_DETECTIONS = "detections.json"


def is_meant(arguments: Sequence[str] | None = None) -> bool:
    """Whether arguments of the demo, by default the command line's, name an exported model."""
    given = sys.argv[1:] if arguments is None else arguments
    return any(word.partition("=")[0] == "--model" for word in given)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 1 if nothing could be done, or some file could not be read.
    """
    args = _parser().parse_args(arguments)
    try:
        return _demo(args)
    except (ExportedModelError, ImageFileError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d2_decouple.demo",
        description=f"{str(__doc__).splitlines()[0]} Needs numpy, OpenCV and onnxruntime alone; "
        "videos, --show-... and --tta need the model in PyTorch (--config-file, --weights).",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="FILE", help="what python -m d2_decouple.export wrote")
    add("--input", required=True, nargs="+", help="images, folders or patterns")
    add("--output", required=True, metavar="DIR", help="folder of the results")
    add("--score-thresh", type=_share, default=0.3, help="show detections above it (%(default)s)")
    add("--json", action="store_true", help="write the detections as JSON, too")
    add("--threads", type=int, metavar="N", help="of the CPU (onnxruntime decides)")
    return parser


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"wanted a number from 0 to 1, got {text}")
    return value


def _demo(args: argparse.Namespace) -> int:
    sources = _sources(args.input)
    output = Path(args.output)
    targets = _targets(sources, output)
    detector = ExportedDetector(args.model, threads=args.threads)
    output.mkdir(parents=True, exist_ok=True)
    about = detector.description
    print(
        f"{args.model} ({about['recipe']}): {len(detector.classes)} classes, suppression "
        f"{'inside' if about['selection']['inside'] else 'outside'}, score above "
        f"{args.score_thresh:g}"
    )
    records, faults = [], []
    for number, (source, target) in enumerate(zip(sources, targets, strict=True), start=1):
        start = time.perf_counter()
        try:
            image = read_image(source)
            found = detector(image)
        except (ImageFileError, ExportedModelError) as error:
            reason = str(error) if str(source) in str(error) else f"{source}: {error}"
            faults.append({"file_name": str(source), "error": reason})
            print(f"[{number}/{len(sources)}] skipped: {reason}", file=sys.stderr, flush=True)
            continue
        found = found.where(found.scores > args.score_thresh)
        names = [_class_name(label, detector.classes) for label in found.classes.tolist()]
        milliseconds = 1000 * (time.perf_counter() - start)
        _save(target, _drawn(image, found, names))
        records.append(_record(source, target, image, found, names))
        print(
            f"[{number}/{len(sources)}] {source}: {len(names)} "
            f"object{'s' * (len(names) != 1)}, {milliseconds:.0f} ms -> {target}",
            flush=True,
        )
    if args.json:
        content = {
            "classes": list(detector.classes),
            "score_thresh": args.score_thresh,
            "images": records,
            "skipped": faults,
        }
        text = json.dumps(content, indent=1) + "\n"
        (output / _DETECTIONS).write_text(text, encoding="utf-8")
    return 1 if faults else 0


def _sources(inputs: Sequence[str]) -> list[Path]:
    """The images that the inputs mean, each once, in their order."""
    found: dict[Path, Path] = {}
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            inside = (x for x in path.iterdir() if not x.name.startswith("."))
            files = sorted(x for x in inside if x.suffix.lower() in _SUFFIXES)
        else:
            matches = sorted(Path(x) for x in glob.glob(text, recursive=True))
            files = [path] if path.is_file() else matches
        if not files:
            raise ExportedModelError(
                f"--input {text}: no such image, and no image lies directly in such a folder "
                f"(looked for {', '.join(sorted(_SUFFIXES))})"
            )
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _targets(sources: Sequence[Path], output: Path) -> list[Path]:
    """The picture of each image; none of them is an input, and no two are the same."""
    if output.exists() and not output.is_dir():
        raise ExportedModelError(f"--output {output} is a file; type the name of a folder")
    taken: set[str] = set()
    targets = []
    for source in sources:
        name, number = source.stem, 1
        while name.lower() in taken:  # some file systems do not tell A from a
            number += 1
            name = f"{source.stem}-{number}"
        taken.add(name.lower())
        targets.append(output / f"{name}.jpg")
    if output.resolve() in {source.parent.resolve() for source in sources}:
        raise ExportedModelError(
            f"--output {output} is a folder of inputs, where pictures could replace them; type "
            "another folder"
        )
    return targets


def _class_name(label: int, classes: Sequence[str]) -> str:
    return classes[label] if label < len(classes) else f"class {label}"


def _drawn(image: np.ndarray, found: Detections, names: Sequence[str]) -> np.ndarray:
    longest = max(image.shape[:2])
    scale = min(max(longest, _SIDES[0]), _SIDES[1]) / longest
    return draw_detections(image, found, names, scale=scale)


def _save(target: Path, picture: np.ndarray) -> None:
    done, content = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    if not done:
        raise ExportedModelError(f"OpenCV cannot write {target} as a JPEG file")
    target.write_bytes(content.tobytes())


def _record(
    source: Path, target: Path, image: np.ndarray, found: Detections, names: Sequence[str]
) -> dict[str, Any]:
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.classes.tolist(), strict=True)
    return {
        "file_name": str(source),
        "width": image.shape[1],
        "height": image.shape[0],
        "picture": target.name,
        "detections": [
            {
                "class": name,
                "class_id": label,
                "score": round(score, 4),
                "bbox": [round(value, 2) for value in box],
            }
            for name, (box, score, label) in zip(names, rows, strict=True)
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
