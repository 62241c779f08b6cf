# SPDX-License-Identifier: Apache-2.0
"""Which files the demo reads, and which it writes without replacing an input."""

import glob
from collections.abc import Sequence
from pathlib import Path

from .config import ConfigError
from .data.records import visible

__all__ = [
    "DETECTIONS",
    "LOOKS",
    "check_for_look",
    "input_files",
    "is_video",
    "result_files",
    "suffixed",
]

DETECTIONS = "detections.json"
LOOKS = {  # how detections were found -> what --show-NAME draws, of so many detections
    "points": "draw where {} of each image were read, too",
    "stages": "draw the proposals, and the stages of {}, too",
    "context": "draw where the evidence for the class and for the box of {} lies, too",
    "assignment": "draw which cells of which level learn each annotated object, too",
}
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


def check_for_look(look: str, sources: Sequence[Path], *, tta: bool) -> None:
    """Raise ConfigError if one of ``LOOKS`` cannot be shown of these files in this way."""
    option = f"--show-{look}"
    if tta:
        raise ConfigError(
            f"{option} shows how one look at an image found its objects, and --tta merges "
            "several looks; leave one of them out"
        )
    if videos := [str(source) for source in sources if is_video(source)]:
        raise ConfigError(
            f"{option} is for images, and there are videos among the inputs: {videos[0]}"
            + (", ..." if videos[1:] else "")
            + f"; give the images alone, or leave {option} out"
        )


def result_files(
    sources: Sequence[Path], output: Path, *, with_json: bool, look: str = ""
) -> list[tuple[Path, Path]]:
    """For each source the file it is drawn to, without its suffix; no two are the same.

    Args:
        sources: images and videos.
        output: the folder of the results.
        with_json: whether detections are written there, too.
        look: one of ``LOOKS`` if there is a second picture of each image, such as NAME_points.jpg.

    Raises:
        ConfigError: the folder is a file, or pictures beside an input could replace others.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output} is a file; type the name of a folder")
    ends = ("", f"_{look}") if look else ("",)
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
