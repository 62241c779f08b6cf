# SPDX-License-Identifier: Apache-2.0
"""What the loaders of VOC and COCO folders share: paths, parts, images that exist, boxes inside.

A source is what the catalog calls for a set's dataset dicts: a frozen dataclass, equal to another
when it would give the same images, with a ``name`` and a ``classes``.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from detectron2.data import DatasetCatalog, MetadataCatalog

from .foreign import brief, unusable_name
from .loader import DataError

__all__ = [
    "DATASETS_PREFIX",
    "IMAGE_SUFFIXES",
    "BoxFault",
    "Part",
    "Source",
    "contained",
    "cut_box",
    "data_path",
    "existing_folder",
    "keep_inside",
    "missing_files",
    "refuse_duplicates",
    "register_source",
    "require_images",
    "visible",
]

_logger = logging.getLogger(__name__)
_DATASETS_VARIABLE = "DETECTRON2_DATASETS"
DATASETS_PREFIX = f"${_DATASETS_VARIABLE}"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

BoxFault = Literal["", "beyond", "empty", "not finite"]
_T = TypeVar("_T")

_FAULTS: dict[BoxFault, str] = {
    "beyond": "boxes that reach beyond their image, cut",
    "empty": "boxes without area inside their image, dropped",
    "not finite": "boxes with a NaN or infinite coordinate, dropped",
}


@runtime_checkable
class Source(Protocol):
    """A set of this package in Detectron2's catalog."""

    @property
    def name(self) -> str:
        """In the catalog."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names in the order of their ids, or None for those in the data."""

    def read(self) -> list[dict[str, Any]]:
        """Dataset dicts with the boxes as annotated: some may lie outside or not be finite."""

    def __call__(self) -> list[dict[str, Any]]:
        """Dataset dicts fit for training."""


@dataclass(frozen=True)
class Part:
    """One of the two parts of a list of images that is split by a seed.

    The images are ordered by a hash of seed and name, and the first share of that order is held
    out. So the parts depend on the names alone, and images that are added later move few others.
    """

    fraction: float
    seed: int
    held_out: bool

    def choose(self, names: Iterable[str]) -> set[str]:
        """The names that belong to this part; of two names or more each part gets one.

        Raises:
            DataError: fewer than two names.
        """
        order = sorted(names, key=self._rank)
        if len(order) < 2:
            raise DataError(
                f"{len(order)} images cannot be split into training and test images: wanted two "
                "or more"
            )
        count = min(max(round(self.fraction * len(order)), 1), len(order) - 1)
        return set(order[:count] if self.held_out else order[count:])

    def _rank(self, name: str) -> bytes:
        return hashlib.sha256(f"{self.seed}/{name}".encode()).digest()


def register_source(source: Source, **metadata: Any) -> None:
    """Put a source into Detectron2's catalog; doing it again with an equal one does nothing.

    Raises:
        DataError: another set has the name.
    """
    name = source.name
    if name in DatasetCatalog:
        known = DatasetCatalog[name]
        if known != source:
            raise DataError(
                f"dataset {name!r} is already registered as {known!r} and cannot become "
                f"{source!r}; choose another name, or call DatasetCatalog.remove({name!r}) and "
                f"MetadataCatalog.remove({name!r}) first"
            )
        return
    DatasetCatalog.register(name, source)
    MetadataCatalog.get(name).set(evaluator_type="coco", **metadata)
    if source.classes is not None:
        MetadataCatalog.get(name).set(thing_classes=list(source.classes))


def data_path(path: str | os.PathLike[str]) -> Path:
    """Absolute; a leading ``$DETECTRON2_DATASETS`` stands for that variable, or ``datasets``."""
    text = os.fspath(path)
    if text == DATASETS_PREFIX or text.startswith(f"{DATASETS_PREFIX}/"):
        text = os.environ.get(_DATASETS_VARIABLE, "datasets") + text[len(DATASETS_PREFIX) :]
    return Path(text).expanduser().absolute()


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """:func:`data_path`, or FileNotFoundError if there is no such folder."""
    folder = data_path(path)
    if folder.is_dir():
        return folder
    if not os.fspath(path).startswith(DATASETS_PREFIX):
        raise FileNotFoundError(f"no dataset folder {folder}; correct the path, or put it there")
    value = os.environ.get(_DATASETS_VARIABLE)
    raise FileNotFoundError(
        f"no dataset folder {folder} ({_DATASETS_VARIABLE} is "
        f"{'not set' if value is None else repr(value)}); put {folder.name!r} there, or type: "
        f"export {_DATASETS_VARIABLE}=FOLDER, with the folder that holds {folder.name!r}"
    )


def contained(name: str, where: str) -> str:
    """``name``, a relative path that stays inside its folder under any system's rules.

    Args:
        name: as a file of the dataset gives it.
        where: which file, and which part of it, for the message.

    Raises:
        DataError: an absolute path, one with ``..``, or a name that no file can have.
    """
    if reason := unusable_name(name):
        raise DataError(f"{where} is {brief(name)}, which names no file: {reason}; correct it")
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.is_absolute() or path.drive or path.root or ".." in path.parts:
            raise DataError(
                f"{where} is {brief(name)}: wanted a path inside the dataset's folder, neither "
                "absolute nor with '..'; correct it, or link the image into the folder"
            )
    return name


def refuse_duplicates(values: Iterable[Hashable], what: str, remedy: str) -> None:
    """Raise DataError, naming the first, if one of ``values`` comes twice."""
    counts = Counter(values)
    twice = [value for value, count in counts.items() if count > 1]
    if twice:
        raise DataError(
            f"{what}: {len(twice)} come more than once, first {brief(twice[0])}; {remedy}"
        )


def visible(files: Iterable[Path]) -> list[Path]:
    """Sorted, without hidden ones: archives made on a Mac hold a ``._NAME`` beside each file."""
    return sorted(file for file in files if not file.name.startswith("."))


def missing_files(files: Sequence[str]) -> list[str]:
    """Those that do not exist. Each folder is listed once: quicker on a network than asking."""
    present: dict[str, set[str]] = {}
    missing = []
    for file in files:
        folder, name = os.path.split(file)
        if folder not in present:
            present[folder] = _file_names(folder)
        if name not in present[folder]:
            missing.append(file)
    return missing


def _file_names(folder: str) -> set[str]:
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def require_images(records: Sequence[dict[str, Any]], what: str) -> None:
    """Raise unless there are images and all of their files exist.

    Raises:
        DataError: no image.
        FileNotFoundError: files are missing; the first is named.
    """
    if not records:
        raise DataError(f"{what} has no images; wanted at least one")
    missing = missing_files([record["file_name"] for record in records])
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(records)} images of {what} are missing, the first is "
            f"{missing[0]}; put them there, or take them out of the list"
        )


def cut_box(box: Sequence[float], width: float, height: float) -> tuple[list[float], BoxFault]:
    """A box (4,) xyxy cut to an image of ``width`` x ``height``, and what was wrong with it.

    The box is as it was where it is ``"empty"`` or ``"not finite"``.
    """
    x1, y1, x2, y2 = box
    if not math.isfinite(x1 + y1 + x2 + y2):
        return list(box), "not finite"
    cut = [max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height)]
    if cut[2] <= cut[0] or cut[3] <= cut[1]:
        return list(box), "empty"
    return cut, "" if cut == [x1, y1, x2, y2] else "beyond"


def keep_inside(records: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """Cut boxes (xyxy) to their image, drop those that cannot be, in place; say so once.

    Args:
        records: dataset dicts, which are also returned.
        what: the set, for the warning.
    """
    counts: Counter[BoxFault] = Counter()
    first: dict[BoxFault, str] = {}
    for record in records:
        kept = []
        for item in record["annotations"]:
            box, fault = cut_box(item["bbox"], record["width"], record["height"])
            if fault:
                counts[fault] += 1
                first.setdefault(fault, record["file_name"])
            if fault in ("", "beyond"):
                kept.append({**item, "bbox": box})
        record["annotations"] = kept
    if counts:
        texts = (
            f"{text}: {counts[fault]} (the first in {first[fault]})"
            for fault, text in _FAULTS.items()
            if counts[fault]
        )
        _logger.warning("%s: %s", what, "; ".join(texts))
    return records
