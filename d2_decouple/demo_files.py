# SPDX-License-Identifier: Apache-2.0
"""Which files the demo reads, and which it writes without replacing an input."""

import glob
from collections.abc import Sequence
from pathlib import Path

from .config import ConfigError
from .data.records import visible

__all__ = [
    "DETECTIONS",
    "POINTS",
    "check_for_points",
    "input_files",
    "is_video",
    "result_files",
    "suffixed",
]

DETECTIONS = "detections.json"
POINTS = "_points"  # behind the name of an image, for the picture of its points
_IMAGES = {*(".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")}
_VIDEOS = {*(".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")}


def input_files(inputs: Sequence[str]) -> list[Path]:
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


def check_for_points(sources: Sequence[Path], *, tta: bool) -> None:
    """Raise ConfigError if points cannot be shown of these files in this way."""
    if tta:
        raise ConfigError(
            "--show-points shows where one look at an image found its objects, and --tta merges "
            "several looks; leave one of them out"
        )
    if videos := [str(source) for source in sources if is_video(source)]:
        raise ConfigError(
            f"--show-points is for images, and there are videos among the inputs: {videos[0]}"
            + (", ..." if videos[1:] else "")
            + "; give the images alone, or leave --show-points out"
        )


def result_files(
    sources: Sequence[Path], output: Path, *, with_json: bool, with_points: bool = False
) -> list[tuple[Path, Path]]:
    """For each source the file it is drawn to, without its suffix; no two are the same.

    Raises:
        ConfigError: the folder is a file, or pictures beside an input could replace others.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output} is a file; type the name of a folder")
    ends = ("", POINTS) if with_points else ("",)
    taken: set[str] = set()
    targets = []
    for source in sources:
        name, number = source.stem, 1
        # Some file systems do not tell A from a.
        while any((name + end).lower() in taken for end in ends):
            number += 1
            name = f"{source.stem}-{number}"
        taken.update((name + end).lower() for end in ends)
        targets.append((source, output / name))
    inputs = {source.resolve() for source in sources}
    written = [output / DETECTIONS] if with_json else []
    for source, target in targets:
        suffixes = [".mp4", ".avi"] if is_video(source) else [f"{end}.jpg" for end in ends]
        suffixes += [".jsonl"] if with_json and is_video(source) else []
        written += [suffixed(target, suffix) for suffix in suffixes]
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


def suffixed(target: Path, suffix: str) -> Path:
    """The file with a suffix behind its name."""
    return target.with_name(target.name + suffix)  # the name may have dots of its own


def is_video(source: Path) -> bool:
    """Whether a file's name says that it is a video."""
    return source.suffix.lower() in _VIDEOS
