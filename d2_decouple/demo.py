# SPDX-License-Identifier: Apache-2.0
"""``python -m d2_decouple.demo``: detections drawn on images and videos of your own."""

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from .runtime import demo as exported

if __name__ == "__main__" and exported.is_meant():
    sys.exit(exported.main())  # before anything is imported that such a machine may not have

import numpy as np
from detectron2.structures import Instances
from PIL import Image

from .data.images import ImageError, read_rgb
from .data.loader import DataError
from .data.videos import VideoError, VideoReader, VideoWriter
from .demo_assignment import (
    Supervised,
    Supervision,
    add_options,
    build_predictor,
    check_options,
    draw_supervised,
    open_supervision,
)
from .demo_files import (
    DETECTIONS,
    LOOKS,
    check_for_look,
    input_files,
    is_video,
    result_files,
    suffixed,
)
from .engine import run_command
from .engine.context import DetectionContext
from .engine.points import DetectionPoints
from .engine.predictor import Predictor
from .engine.stages import DetectionStages
from .visualization import class_colors, draw_boxes, draw_context, draw_points, draw_stages

__all__ = ["main"]

_SIDES = (640, 2000)  # pixels: the longer side of a drawn picture; lines and text keep their size
_QUALITY = 92
_EPILOG = f"""
examples:
  python -m d2_decouple.demo --config-file fcos_R_18_FPN_bccd --weights output/model_final.pth \\
      --input photo.jpg "more/*.png" --output detections
  python -m d2_decouple.demo --config-file output/config.yaml --weights output/model_final.pth \\
      --input FOLDER --output detections --json --score-thresh 0.5 --precision bfloat16
  python -m d2_decouple.demo --config-file fcos_R_50_FPN_1x --weights FILE \\
      --input film.mp4 --output detections --every 5 --max-frames 100 --json
  python -m d2_decouple.demo --config-file pdnet_R_50_FPN_1x --weights FILE \\
      --input photo.jpg --output detections --show-points 4
  python -m d2_decouple.demo --config-file decoupled_rcnn_R_18_FPN_bccd --weights FILE \\
      --input photo.jpg --output detections --show-stages 4
  python -m d2_decouple.demo --config-file fcos_R_50_FPN_1x --weights FILE \\
      --input photo.jpg --output detections --show-context 2 --json
  python -m d2_decouple.demo --config-file fcos_R_50_FPN_1x --input photo.jpg --output detections \\
      --show-assignment --annotations objects.json --compare atss_R_50_FPN_1x gfl_R_50_FPN_1x:FILE
  python -m d2_decouple.demo --model model.onnx --input photo.jpg --output detections --json

Of a folder the images and videos that lie directly in it are taken; name others by a pattern, as
in "FOLDER/**/*.jpg". The output folder gets NAME.jpg for an image (its longer side {_SIDES[0]} to
{_SIDES[1]} pixels) and NAME.mp4 for a video; with --json also {DETECTIONS} for all images and
NAME.jsonl for each video, one line a frame, with boxes [x1, y1, x2, y2] in pixels of the original.
With --show-points, for images and for models with points (PDNet), NAME_points.jpg shows where the
strongest detections were read: coarse box, a point for each side of the box with the pyramid levels
that its value came from, and the points of the class. With --show-stages, for images and Decoupled
R-CNN, NAME_stages.jpg shows the proposals at both densities, and the box of the strongest
detections after every stage with its IoU with the last one. With --show-context, for images and
any one-stage detector of this package, NAME_context.jpg shows which pixels the class, and which the
box, of the strongest detections depend on: five backward passes for each of them, minutes for
large images without a GPU. With --show-assignment, for images and any one-stage detector of this
package, NAME_assignment.jpg shows which cells of which level would learn each annotated object, and
how strongly: a row for each model, those of --compare below the first. Objects are sought under the
image's name in --annotations, or else in an .xml file beside the image or in Annotations beside its
folder. Without --weights a model has random ones, which is enough where objects are assigned by
rules of geometry alone (FCOS, ATSS, RetinaNet). With --json all of these are in {DETECTIONS}, too.
Files that cannot be read are reported and skipped, and make the exit status 1.
"""

_DRAW: dict[str, Callable[..., np.ndarray]] = {
    "points": draw_points,
    "stages": draw_stages,
    "context": draw_context,
    "assignment": draw_supervised,
}

_Item = TypeVar("_Item")
_Seen: TypeAlias = DetectionPoints | DetectionStages | DetectionContext | Supervised


@dataclass(kw_only=True)
class _Run:
    """What a call of the command has done so far."""

    predictor: Predictor
    args: argparse.Namespace
    look: str  # one of LOOKS, or nothing
    limit: int  # of detections that it shows
    total: int
    supervision: Supervision | None  # of --show-assignment
    images: list[dict[str, Any]] = field(default_factory=list)
    faults: list[dict[str, str]] = field(default_factory=list)
    levels: dict[str, int] = field(default_factory=dict)  # name -> stride, once a look has them
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
    if exported.is_meant(arguments):
        return exported.main(arguments)
    parser = _parser()
    args = parser.parse_args(arguments)
    if fault := check_options(args):
        parser.error(fault)
    return run_command(lambda: _demo(args), OSError)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d2_decouple.demo",
        description=str(__doc__).splitlines()[0],
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="NAME", help="a recipe's name, or a config file")
    add("--weights", metavar="FILE", help="the checkpoint of a training")
    add("--model", metavar="FILE", help="in place of both: an exported model (.onnx), for images")
    add("--input", required=True, nargs="+", help="images, videos, folders or patterns")
    add("--output", required=True, metavar="DIR", help="folder of the results")
    add("--score-thresh", type=_share, default=0.3, help="show detections above it (%(default)s)")
    add("--json", action="store_true", help="write the detections as JSON, too")
    looks = parser.add_mutually_exclusive_group()
    for name, about in LOOKS.items():
        about = about.format("the N strongest detections (4)")
        number = {"action": "store_true"} if name == "assignment" else _NUMBER
        looks.add_argument(f"--show-{name}", help=about, **number)
    add_options(parser)
    add("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    add("--precision", default="float32", help="float32, bfloat16, or on a GPU float16")
    add("--batch-size", type=_positive, default=1, help="images computed together (%(default)s)")
    add("--tta", action="store_true", help="look at each image in three sizes and mirrored")
    add("--every", type=_positive, default=1, metavar="N", help="take each Nth frame of a video")
    add("--max-frames", type=_positive, metavar="N", help="stop a video after N taken frames")
    add("overrides", nargs="*", metavar="key=value", help="overrides of the config, last")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        hint = "; before key=value give this option its number, too" if "=" in text else ""
        raise argparse.ArgumentTypeError(f"wanted a whole number from 1, got {text}{hint}")
    return int(text)


_NUMBER = {"type": _positive, "nargs": "?", "const": 4, "metavar": "N"}  # of detections


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"wanted a number from 0 to 1, got {text}")
    return value


def _demo(args: argparse.Namespace) -> int:
    sources = input_files(args.input)
    output = Path(args.output)
    wanted = {name: getattr(args, f"show_{name}") for name in LOOKS}
    look, limit = next((pair for pair in wanted.items() if pair[1]), ("", 0))
    if look:
        check_for_look(look, sources, tta=args.tta)
    targets = result_files(sources, output, with_json=args.json, look=look)
    options = {
        "score_thresh": args.score_thresh,
        "channels": "RGB",
        "device": args.device,
        "precision": args.precision,
        "batch_size": args.batch_size,
    }
    predictor = build_predictor(
        args.config_file, args.weights, args.overrides, tta=args.tta, **options
    )
    supervision = open_supervision(predictor, args, options) if look == "assignment" else None
    output.mkdir(parents=True, exist_ok=True)
    print(
        f"{args.config_file} with {args.weights or 'random weights'}: "
        f"{len(predictor.classes)} classes, {predictor.precision} on {predictor.device}, "
        f"score above {args.score_thresh:g}"
    )
    run = _Run(
        predictor=predictor,
        args=args,
        look=look,
        limit=limit,
        total=len(sources),
        supervision=supervision,
    )
    start = time.perf_counter()
    try:
        _images([pair for pair in targets if not is_video(pair[0])], run)
        for source, target in targets:
            if is_video(source):
                _video(source, target, run)
    finally:  # also of a run that was interrupted
        if args.json and run.done:
            _write_json(output / DETECTIONS, run)
    print(
        f"{run.total - len(run.faults)} of {run.total} files in {time.perf_counter() - start:.1f} "
        f"s; results in {output}" + (f"; {len(run.faults)} skipped" if run.faults else "")
    )
    return 1 if run.faults else 0


def _images(pairs: Sequence[tuple[Path, Path]], run: _Run) -> None:
    for batch in _batches(iter(pairs), run.args.batch_size):
        start = time.perf_counter()
        read, seen = [], []
        for source, target in batch:
            try:
                image = read_rgb(source)
                if run.look:
                    seen.append(_seen(source, image, run))
            except (ImageError, DataError) as error:
                run.report(source, error)
            else:
                read.append((source, target, image))
        if run.look:  # the detections are the same
            results = [x.instances for x in seen]
        else:
            results = run.predictor([image for *_, image in read])
        milliseconds = 1000 * (time.perf_counter() - start) / len(batch)
        for index, ((source, target, image), found) in enumerate(zip(read, results, strict=True)):
            low, high = _SIDES
            longest = max(image.shape[:2])
            scale = min(max(longest, low), high) / longest
            picture = suffixed(target, ".jpg")
            drawn = _drawn(image, found, run.predictor, scale)
            Image.fromarray(drawn).save(picture, quality=_QUALITY)
            record = {
                "file_name": str(source),
                "width": image.shape[1],
                "height": image.shape[0],
                "picture": picture.name,
                "detections": _as_json(found, run.predictor),
            }
            if seen:
                _add_look(record, image, seen[index], target, run)
            run.images.append(record)
            summary = _summary(found, run.predictor)
            run.say(source, f"{summary}, {milliseconds:.0f} ms -> {picture}")


def _seen(source: Path, image: np.ndarray, run: _Run) -> _Seen:
    """The detections of an image, and how they were found."""
    if run.supervision is not None:
        return run.supervision.seen(image, run.supervision.objects(source, image))
    if run.look == "context":  # costs time for each detection
        return run.predictor.context(image, limit=run.limit)
    return getattr(run.predictor, run.look)(image)


def _add_look(
    record: dict[str, Any], image: np.ndarray, seen: _Seen, target: Path, run: _Run
) -> None:
    """Draw what was seen in an image, and write it behind its detections."""
    drawn = _DRAW[run.look](image, seen, run.predictor.classes, limit=run.limit)
    if isinstance(seen, DetectionStages):
        record["proposals"] = seen.proposals_record()
    else:
        if isinstance(seen, Supervised):
            record["assignment"] = seen.assignment_record(run.predictor.classes)
        run.levels = dict(zip(seen.level_names, seen.strides, strict=True))
    picture = suffixed(target, f"_{run.look}.jpg")
    Image.fromarray(drawn).save(picture, quality=_QUALITY, subsampling=0)  # thin coloured lines
    record[f"{run.look}_picture"] = picture.name
    # Of a context there are records of the strongest alone.
    for detection, known in zip(record["detections"], seen.as_records(), strict=False):
        detection[run.look] = known


def _video(source: Path, target: Path, run: _Run) -> None:
    start, frames, objects = time.perf_counter(), 0, 0
    lines = suffixed(target, ".jsonl") if run.args.json else None
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
        **({"levels": run.levels} if run.levels else {}),
        "images": run.images,
        "skipped": run.faults,
    }
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
