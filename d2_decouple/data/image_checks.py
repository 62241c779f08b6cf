# SPDX-License-Identifier: Apache-2.0
"""Image files against their annotations, by their headers or decoded."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import TiffImageFile

from .findings import Finding, Split
from .foreign import IMAGE_MIB, read_limited
from .images import DECODING_ERRORS, IMAGE_FORMATS
from .records import missing_files

__all__ = ["ImageFacts", "check_images", "read_facts"]

_UNREADABLE: tuple[type[Exception], ...] = (*DECODING_ERRORS, Image.DecompressionBombError)
_QUARTER_TURNS = (5, 6, 7, 8)
_AT_ONCE = 256  # images: what is waiting for its turn stays small


class ImageFacts(NamedTuple):
    """One image file.

    Attributes:
        stored: (width, height) of the pixels in the file.
        orientation: EXIF's, 1 for as stored.
        digest: of the file's bytes; empty unless it was decoded.
        error: why it cannot be used, or empty; then the rest says nothing.
    """

    stored: tuple[int, int] = (0, 0)
    orientation: int = 1
    digest: bytes = b""
    error: str = ""

    @property
    def shown(self) -> tuple[int, int]:
        """(width, height) as training reads it: turned as EXIF says."""
        width, height = self.stored
        return (height, width) if self.orientation in _QUARTER_TURNS else (width, height)


def read_facts(files: Iterable[str], *, decode: bool) -> Iterator[ImageFacts]:
    """The facts of each file, in order.

    Args:
        files: paths of images.
        decode: every pixel is read, which alone finds files that are cut off or damaged.
    """
    read = _decoded if decode else _header
    remaining = iter(files)
    while batch := list(islice(remaining, _AT_ONCE)):
        # Threads: reading, hashing and decoding all leave the interpreter to the others.
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            facts = list(pool.map(read, batch))
        # None is alive here: whoever asks for no more would leave them to Python's search for
        # cycles, which may come while another thread starts, and then both wait for ever.
        yield from facts


def _header(file: str) -> ImageFacts:
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            return _facts(image)
    except _UNREADABLE as error:
        return ImageFacts(error=_reason(error))


def _decoded(file: str) -> ImageFacts:
    try:
        content = read_limited(Path(file), IMAGE_MIB)
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            facts = _facts(image)
            image.load()
            if image.format == "PNG":  # its EXIF may stand behind the pixels
                facts = _facts(image)
    except _UNREADABLE as error:
        return ImageFacts(error=_reason(error))
    return facts._replace(digest=hashlib.blake2b(content, digest_size=16).digest())


def _facts(image: Image.Image) -> ImageFacts:
    # Asking a PNG without EXIF for it would decode all of it.
    has_exif = image.format != "PNG" or "exif" in image.info
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if has_exif else 1
    size = image.size
    if isinstance(image, TiffImageFile):  # whose size may be turned already
        size = (image.tag_v2[ExifTags.Base.ImageWidth], image.tag_v2[ExifTags.Base.ImageLength])
    return ImageFacts(size, orientation if orientation in range(1, 9) else 1)


def _reason(error: BaseException) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "no image of a known format, or its start is damaged"
    return str(error) or type(error).__name__


def check_images(splits: Sequence[Split], *, decode: bool, limit: int | None) -> Iterator[Finding]:
    """Files that are missing, unreadable, of another size, or in training and test sets.

    Args:
        splits: the sets.
        decode: read all pixels, which also tells images apart by their bytes.
        limit: images that are opened at most, spread evenly; None for all.
    """
    entries = [(split, record) for split in splits for record in split.records]
    missing = set(missing_files([record["file_name"] for _, record in entries]))
    if missing:
        yield Finding("image files that are missing", True, sorted(missing))
    present = [entry for entry in entries if entry[1]["file_name"] not in missing]
    if limit is not None and len(present) > limit:
        chosen = np.linspace(0, len(present) - 1, limit).astype(int)
        present = [present[index] for index in chosen]
    findings = _image_findings(decode)
    keys: list[tuple[str, str, str]] = []
    facts = read_facts((record["file_name"] for _, record in present), decode=decode)
    for (split, record), fact in zip(present, facts, strict=True):
        file = record["file_name"]
        kind, detail = _judge(record, fact)
        if kind:
            findings[kind].places.append(file + (f" ({detail})" if detail else ""))
        keys.append((fact.digest.hex() or file, split.role, file))
    yield from (finding for finding in findings.values() if finding.places)
    yield from _check_leaks(keys)


def _image_findings(decode: bool) -> dict[str, Finding]:
    how = "decoded" if decode else "opened"
    return {
        "unreadable": Finding(f"images that cannot be {how}", stops=True),
        "size": Finding("images of another size than their annotation's", stops=True),
        "unturned": Finding(
            "images that EXIF turns, annotated as they are stored; training reads them turned: "
            "turn the pixels and take the tag out, or annotate them anew",
            stops=True,
        ),
        "ambiguous": Finding(
            "images that EXIF turns or mirrors without another size; training reads them so: see "
            "that the boxes were drawn so",
            stops=False,
        ),
    }


def _judge(record: dict[str, Any], fact: ImageFacts) -> tuple[str, str]:
    """The kind of an image's finding, or nothing, and a detail."""
    if fact.error:
        return "unreadable", fact.error
    annotated = (record.get("width"), record.get("height"))
    if None not in annotated and annotated != fact.shown:
        sizes = "{}x{}, annotated {}x{}".format(*fact.shown, *annotated)
        return ("unturned" if annotated == fact.stored else "size"), sizes
    if fact.orientation != 1 and fact.stored == fact.shown:
        return "ambiguous", f"orientation {fact.orientation}"
    return "", ""


def _check_leaks(keys: Sequence[tuple[str, str, str]]) -> Iterator[Finding]:
    """Images of a training set that are in a test set, too, by (what they are, role, file)."""
    files: dict[str, dict[str, str]] = {}
    for key, role, file in keys:
        files.setdefault(key, {}).setdefault(role, file)
    both = [" = ".join(dict.fromkeys(roles.values())) for roles in files.values() if len(roles) > 1]
    if both:
        yield Finding("images in training and test sets, so that AP says too much", False, both)
