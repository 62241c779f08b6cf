# SPDX-License-Identifier: Apache-2.0
"""``python -m d2_decouple.demo``: detections drawn on images and videos of your own."""

import argparse
import glob
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from detectron2.structures import Instances
from PIL import Image

from .config import ConfigError
from .data.images import ImageError, read_rgb
from .data.records import visible
from .data.videos import VideoError, VideoReader, VideoWriter
from .engine import EXPECTED_ERRORS
from .engine.predictor import Predictor
from .visualization import class_colors, draw_boxes

__all__ = ["main"]

_IMAGES = {*(".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")}
_VIDEOS = {*(".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")}
_SIDES = (640, 2000)  # pixels: the longer side of a drawn picture; lines and text keep their size
_QUALITY = 92
_DETECTIONS = "detections.json"
_EPILOG = f"""
examples:
  python -m d2_decouple.demo --config-file fcos_R_18_FPN_bccd --weights output/model_final.pth \\
      --input photo.jpg "more/*.png" --output detections
  python -m d2_decouple.demo --config-file output/config.yaml --weights output/model_final.pth \\
      --input FOLDER --output detections --json --score-thresh 0.5 --precision bfloat16
  python -m d2_decouple.demo --config-file fcos_R_50_FPN_1x --weights FILE \\
      --input film.mp4 --output detections --every 5 --max-frames 100 --json

Of a folder the images and videos that lie directly in it are taken; name others by a pattern, as
in "FOLDER/**/*.jpg". The output folder gets NAME.jpg for an image (its longer side {_SIDES[0]} to
{_SIDES[1]} pixels) and NAME.mp4 for a video; with --json also {_DETECTIONS} for all images and
NAME.jsonl for each video, one line a frame, with boxes [x1, y1, x2, y2] in pixels of the original.
Files that cannot be read are reported and skipped, and make the exit status 1.
"""

_Item = TypeVar("_Item")


@dataclass(kw_only=True)
class _Run:
    """What a call of the command has done so far."""

    predictor: Predictor
    args: argparse.Namespace
    total: int
    images: list[dict[str, Any]] = field(default_factory=list)
    faults: list[dict[str, str]] = field(default_factory=list)
    done: int = 0

    def say(self, source: Path, message: str) -> None:
        self.done += 1
        print(f"[{self.done}/{self.total}] {source}: {message}", flush=True)

    def report(self, source: Path, error: Exception) -> None:
        self.done += 1
        self.faults.append({"file_name": str(source), "error": str(error)})
        print(f"[{self.done}/{self.total}] skipped: {error}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 1 if nothing could be done, or some file could not be read.
    """
    args = _parser().parse_args(arguments)
    try:
        return _demo(args)
    except (*EXPECTED_ERRORS, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d2_decouple.demo",
        description=str(__doc__).splitlines()[0],
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="NAME", help="a recipe's name, or a config file")
    add("--weights", required=True, metavar="FILE", help="the checkpoint of a training")
    add("--input", required=True, nargs="+", help="images, videos, folders or patterns")
    add("--output", required=True, metavar="DIR", help="folder of the results")
    add("--score-thresh", type=_share, default=0.3, help="show detections above it (%(default)s)")
    add("--json", action="store_true", help="write the detections as JSON, too")
    add("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    add("--precision", default="float32", help="float32, bfloat16, or on a GPU float16")
    add("--batch-size", type=_positive, default=1, help="images computed together (%(default)s)")
    add("--tta", action="store_true", help="look at each image in three sizes and mirrored")
    add("--every", type=_positive, default=1, metavar="N", help="take each Nth frame of a video")
    add("--max-frames", type=_positive, metavar="N", help="stop a video after N taken frames")
    add("overrides", nargs="*", metavar="key=value", help="overrides of the config, last")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number from 1, got {text}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"wanted a number from 0 to 1, got {text}")
    return value


def _demo(args: argparse.Namespace) -> int:
    sources = _sources(args.input)
    output = Path(args.output)
    targets = _targets(sources, output, with_json=args.json)
    predictor = Predictor.from_config(
        args.config_file,
        args.weights,
        args.overrides,
        score_thresh=args.score_thresh,
        channels="RGB",
        device=args.device,
        precision=args.precision,
        batch_size=args.batch_size,
        tta=args.tta,
    )
    output.mkdir(parents=True, exist_ok=True)
    print(
        f"{args.config_file} with {args.weights}: {len(predictor.classes)} classes, "
        f"{predictor.precision} on {predictor.device}, score above {args.score_thresh:g}"
    )
    run = _Run(predictor=predictor, args=args, total=len(sources))
    start = time.perf_counter()
    try:
        _images([pair for pair in targets if not _is_video(pair[0])], run)
        for source, target in targets:
            if _is_video(source):
                _video(source, target, run)
    finally:  # also of a run that was interrupted
        if args.json:
            _write_json(output / _DETECTIONS, run)
    print(
        f"{run.total - len(run.faults)} of {run.total} files in {time.perf_counter() - start:.1f} "
        f"s; results in {output}" + (f"; {len(run.faults)} skipped" if run.faults else "")
    )
    return 1 if run.faults else 0


def _sources(inputs: Sequence[str]) -> list[Path]:
    """The files that the inputs mean, each once, in their order.

    Raises:
        ConfigError: one of them means no file.
    """
    found: dict[Path, Path] = {}
    for text in inputs:
        path = Path(text)
        files = [path] if path.is_file() else [Path(x) for x in glob.glob(text, recursive=True)]
        if path.is_dir():
            files = visible(x for x in path.iterdir() if x.suffix.lower() in _IMAGES | _VIDEOS)
        # A link that leads nowhere stays: it is reported like any other file that cannot be read.
        files = sorted(file for file in files if file.is_file() or not file.exists())
        if not files:
            kinds = ", ".join(sorted(_IMAGES | _VIDEOS))
            raise ConfigError(
                f"--input {text}: "
                + (
                    f"no image or video lies directly in this folder (looked for {kinds})"
                    if path.is_dir()
                    else "there is no such file or folder, and no file fits it as a pattern"
                )
            )
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _targets(sources: Sequence[Path], output: Path, *, with_json: bool) -> list[tuple[Path, Path]]:
    """For each source the file it is drawn to, without its suffix; no two are the same.

    Raises:
        ConfigError: the folder is a file, or pictures beside an input could replace others.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output} is a file; type the name of a folder")
    taken: set[str] = set()
    targets = []
    for source in sources:
        name, number = source.stem, 1
        while name.lower() in taken:  # some file systems do not tell A from a
            number += 1
            name = f"{source.stem}-{number}"
        taken.add(name.lower())
        targets.append((source, output / name))
    inputs = {source.resolve() for source in sources}
    written = [output / _DETECTIONS] if with_json else []
    for source, target in targets:
        suffixes = [".mp4", ".avi"] if _is_video(source) else [".jpg"]
        suffixes += [".jsonl"] if with_json and _is_video(source) else []
        written += [_suffixed(target, suffix) for suffix in suffixes]
    for file in written:
        if file.resolve() in inputs:
            raise ConfigError(
                f"the result {file} would replace an input; type --output with another folder"
            )
    old = [file.name for file in written if file.is_file()]
    listed = ", ".join(old[:5]) + (", ..." if old[5:] else "")
    if old and output.resolve() in {source.parent.resolve() for source in sources}:
        raise ConfigError(
            f"{output} is a folder of inputs, and {listed} there would be replaced; type --output "
            "with another folder"
        )
    if old:
        print(f"to be replaced in {output}: {listed}")
    return targets


def _suffixed(target: Path, suffix: str) -> Path:
    return target.with_name(target.name + suffix)  # the name may have dots of its own


def _is_video(source: Path) -> bool:
    return source.suffix.lower() in _VIDEOS


def _images(pairs: Sequence[tuple[Path, Path]], run: _Run) -> None:
    for batch in _batches(iter(pairs), run.args.batch_size):
        start = time.perf_counter()
        read = []
        for source, target in batch:
            try:
                read.append((source, target, read_rgb(source)))
            except ImageError as error:
                run.report(source, error)
        results = run.predictor([image for *_, image in read])
        milliseconds = 1000 * (time.perf_counter() - start) / len(batch)
        for (source, target, image), found in zip(read, results, strict=True):
            low, high = _SIDES
            longest = max(image.shape[:2])
            scale = min(max(longest, low), high) / longest
            picture = _suffixed(target, ".jpg")
            drawn = _drawn(image, found, run.predictor, scale)
            Image.fromarray(drawn).save(picture, quality=_QUALITY)
            run.images.append(
                {
                    "file_name": str(source),
                    "width": image.shape[1],
                    "height": image.shape[0],
                    "picture": picture.name,
                    "detections": _as_json(found, run.predictor),
                }
            )
            summary = _summary(found, run.predictor)
            run.say(source, f"{summary}, {milliseconds:.0f} ms -> {picture}")


def _video(source: Path, target: Path, run: _Run) -> None:
    start, frames, objects = time.perf_counter(), 0, 0
    lines = _suffixed(target, ".jsonl") if run.args.json else None
    try:
        with (
            VideoReader(source, every=run.args.every) as video,
            VideoWriter(target, fps=video.fps / run.args.every) as drawn,
            open(lines or os.devnull, "w", encoding="utf-8") as log,
        ):
            for batch in _batches(islice(video, run.args.max_frames), run.args.batch_size):
                results = run.predictor([frame for _, frame in batch])
                for (index, frame), found in zip(batch, results, strict=True):
                    drawn.write(_drawn(frame, found, run.predictor, 1.0))
                    detections = _as_json(found, run.predictor)
                    line = {"frame": index, "time": round(index / video.fps, 3)}
                    log.write(json.dumps({**line, "detections": detections}) + "\n")
                    frames, objects = frames + 1, objects + len(found)
    except VideoError as error:
        run.report(source, error)
        if lines and lines.is_file() and not lines.stat().st_size:
            lines.unlink()
        return
    milliseconds = 1000 * (time.perf_counter() - start) / max(frames, 1)
    run.say(
        source, f"{frames} frames, {objects} objects, {milliseconds:.0f} ms a frame -> {drawn.path}"
    )


def _batches(items: Iterator[_Item], size: int) -> Iterator[list[_Item]]:
    while batch := list(islice(items, size)):
        yield batch


def _class_name(index: int, predictor: Predictor) -> str:
    return predictor.classes[index] if index < len(predictor.classes) else f"class {index}"


def _drawn(image: np.ndarray, found: Instances, predictor: Predictor, scale: float) -> np.ndarray:
    classes = found.pred_classes.tolist()
    colors = class_colors(max([len(predictor.classes), *(index + 1 for index in classes)]))
    return draw_boxes(
        image,
        found.pred_boxes.tensor.numpy(),
        [_class_name(index, predictor) for index in classes],
        found.scores.numpy(),
        [colors[index] for index in classes],
        scale=scale,
    )


def _as_json(found: Instances, predictor: Predictor) -> list[dict[str, Any]]:
    boxes, scores = found.pred_boxes.tensor.tolist(), found.scores.tolist()
    return [
        {
            "class": _class_name(index, predictor),
            "class_id": index,
            "score": round(score, 4),
            "bbox": [round(value, 2) for value in box],
        }
        for box, score, index in zip(boxes, scores, found.pred_classes.tolist(), strict=True)
    ]


def _summary(found: Instances, predictor: Predictor) -> str:
    counts = Counter(_class_name(index, predictor) for index in found.pred_classes.tolist())
    listed = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    objects = f"{len(found)} object{'' if len(found) == 1 else 's'}"
    return f"{objects} ({listed})" if listed else objects


def _write_json(file: Path, run: _Run) -> None:
    content = {
        "classes": list(run.predictor.classes),
        "score_thresh": run.args.score_thresh,
        "images": run.images,
        "skipped": run.faults,
    }
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
