# SPDX-License-Identifier: Apache-2.0
"""``python -m d2_decouple.export``: a trained one-stage detector as a file that runs elsewhere."""

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..data.images import ImageError
from ..engine import run_command
from ..engine.inference_config import inference_config
from ..engine.predictor import Predictor
from .description import ExportError, describe
from .graph import exportable
from .programs import FORMATS, LEAST_OPSET, check_format, export_file

__all__ = ["main"]

_IMAGES = {*(".bmp", ".jpeg", ".jpg", ".png", ".webp")}
_EPILOG = """
examples:
  python -m d2_decouple.export --config-file fcos_R_18_FPN_bccd --weights output/model_final.pth \\
      --output model.onnx
  python -m d2_decouple.export --config-file output/config.yaml --weights output/model_final.pth \\
      --output model.onnx --nms inside --verify FOLDER
  python -m d2_decouple.export --config-file output/config.yaml --weights output/model_final.pth \\
      --output model.pt2 --format aoti --size 240 320

Only one-stage detectors can be exported. An ONNX file takes any number of images of any one size;
python -m d2_decouple.demo --model model.onnx runs it with neither PyTorch nor Detectron2. With
--verify the images of a folder are detected by both, in PyTorch and by the file, and the exit
status is 1 where they differ by more than 0.001, or where an image could not be read.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 1 if nothing could be written, the file finds other objects, or an image
        to compare on could not be read.
    """
    args = _parser().parse_args(arguments)
    return run_command(lambda: _export(args), OSError)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d2_decouple.export",
        description=str(__doc__).splitlines()[0],
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="NAME", help="a recipe's name, or a config file")
    add("--weights", required=True, metavar="FILE", help="the checkpoint of a training")
    add("--output", required=True, metavar="FILE", help="the file to write")
    add("--format", default="onnx", help=f"{', '.join(FORMATS)} (%(default)s)")
    add(
        "--nms",
        choices=("inside", "outside"),
        default="outside",
        help="whether the file suppresses overlapping boxes itself (%(default)s)",
    )
    add("--opset", type=int, default=LEAST_OPSET, help="of ONNX (%(default)s)")
    add(
        "--size",
        type=_side,
        nargs=2,
        metavar=("H", "W"),
        help="take one image of this size in pixels, after resizing, and no other",
    )
    add("--verify", metavar="FOLDER", help="compare with PyTorch on the images of a folder")
    add("--overwrite", action="store_true", help="replace an older file")
    add("overrides", nargs="*", metavar="key=value", help="overrides of the config, last")
    return parser


def _side(text: str) -> int:
    """Of an image, in pixels."""
    try:
        side = int(text)
    except ValueError:
        side = 0
    if side < 1:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, wanted are whole numbers from 1 on; type the height and the width in "
            "pixels, such as --size 240 320"
        )
    return side


def _export(args: argparse.Namespace) -> int:
    file = Path(args.output)
    check_format(args.format, file)
    images = _images(args.verify, args.format)
    if file.is_dir() or (file.exists() and not args.overwrite):
        raise ExportError(
            f"--output {file} is there already; type another name"
            + ("" if file.is_dir() else ", or --overwrite")
        )
    predictor = Predictor.from_config(
        args.config_file, args.weights, args.overrides, device="cpu", channels="RGB"
    )
    settings = inference_config(args.config_file, args.overrides)
    # Of a copy: the predictor's own is compared with the file.
    graph = exportable(copy.deepcopy(predictor.model), nms_inside=args.nms == "inside")
    size = (args.size[0], args.size[1]) if args.size else None
    description = describe(
        predictor.model,
        recipe=Path(args.config_file).stem,
        classes=predictor.classes,
        augmentations=settings.augmentations,
        nms_inside=graph.nms_inside,
        fixed_size=size,
    )
    start = time.perf_counter()
    file.parent.mkdir(parents=True, exist_ok=True)
    export_file(graph, description, file, kind=args.format, opset=args.opset, fixed_size=size)
    print(
        f"{file}: {file.stat().st_size / 2**20:.1f} MiB, {args.format}, inputs image, outputs "
        f"{', '.join(graph.output_names)}, {time.perf_counter() - start:.0f} s"
    )
    return _verify(predictor, file, images) if images else 0


def _images(folder: str | None, kind: str) -> list[Path]:
    """The images to compare on."""
    if folder is None:
        return []
    if kind != "onnx":
        raise ExportError(f"--verify runs ONNX files, not those of --format {kind}; leave it out")
    path = Path(folder)
    found = path.iterdir() if path.is_dir() else []
    images = sorted(x for x in found if x.suffix.lower() in _IMAGES and x.is_file())
    if not images:
        raise ExportError(f"--verify {folder}: no image lies directly in such a folder")
    return images


def _verify(predictor: Predictor, file: Path, images: Sequence[Path]) -> int:
    from ..runtime import ExportedDetector, ExportedModelError
    from .verify import TOLERANCE, compare

    agreeing = skipped = 0
    try:
        detector = ExportedDetector(file)
        for image in images:
            try:
                (row,) = compare(predictor, detector, [image])
            except (ImageError, ExportedModelError) as error:  # the latter: of another size
                skipped += 1
                named = "" if str(image) in str(error) else f"{image}: "
                print(f"skipped: {named}{error}", file=sys.stderr)
                continue
            found = row.deviation
            agreeing += found.accepted
            print(
                f"{row.image.name} ({row.size[1]}x{row.size[0]}): {found.detections} detections, "
                f"boxes differ by {found.box:.1e} pixels, scores by {found.score:.1e}, "
                f"{found.unmatched} not in both; {row.torch_ms:.0f} ms in PyTorch, "
                f"{row.exported_ms:.0f} ms here",
                flush=True,
            )
    except ExportedModelError as error:
        raise ExportError(str(error)) from error
    print(
        f"{agreeing} of {len(images) - skipped} images agree to {TOLERANCE:g}"
        + (f", {skipped} skipped" if skipped else "")
    )
    return 0 if agreeing == len(images) else 1


if __name__ == "__main__":
    sys.exit(main())
