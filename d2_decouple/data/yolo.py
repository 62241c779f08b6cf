# SPDX-License-Identifier: Apache-2.0
"""Labels in the format of YOLO, as datasets of Detectron2.

One text file for each image, one line for each object: the class's number, from 0, and the box's
middle, width and height as shares of the image's. ``data.yaml`` names classes and splits, or
``classes.txt`` (``obj.names``) the classes, one a line, and folders the splits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .foreign import brief, read_lines, read_plain_yaml, unusable_name
from .image_checks import read_facts
from .loader import DataError
from .records import (
    IMAGE_SUFFIXES,
    Part,
    existing_folder,
    keep_inside,
    refuse_duplicates,
    visible,
)
from .splits import SPLIT_WORDS, WHOLE, split_folders
from .yolo_labels import label_file, looks_labelled, read_labels

__all__ = ["YOLOLayout", "YOLOSource", "yolo_layout"]

_KEYS = ("train", "val", "test")  # splits in data.yaml
_NAME_FILES = ("classes.txt", "obj.names", "classes.names", "labels/classes.txt")
_LOOKED_AT = 50  # label files by which a folder is recognised


@dataclass(frozen=True)
class YOLOSource:
    """What the catalog calls for a split of a YOLO folder; ``part`` takes a part of its images.

    Attributes:
        name: in the catalog.
        root: the folder.
        places: below it, folders of images and lists (.txt) of them.
        classes: names in the order of their numbers.
        part: which of the images, None for all.
    """

    name: str
    root: str
    places: tuple[str, ...]
    classes: tuple[str, ...]
    part: Part | None = None

    def __call__(self) -> list[dict[str, Any]]:
        """Dataset dicts; boxes are cut to their image, those without area in it dropped."""
        return keep_inside(self.read(), self._what())

    def read(self) -> list[dict[str, Any]]:
        """Dataset dicts with the boxes as annotated: absolute xyxy pixels, origin upper left.

        The size is the image file's, turned as EXIF says. An image whose label file is empty or
        missing has no objects.

        Raises:
            FileNotFoundError: a place or a listed image is missing.
            DataError: no images, or none with a label file; an image or a label cannot be read.
        """
        root = existing_folder(self.root)
        images = self.images()
        labels = [label_file(root, file) for file in images.values()]
        if not any(file.is_file() for file in labels):
            raise DataError(
                f"none of the {len(images)} images of {self._what()} has a label file; the first, "
                f"{next(iter(images.values()))}, wants {labels[0]}: put the labels there (an empty "
                "file for an image without objects)"
            )
        records, unreadable = [], []
        facts = read_facts([str(file) for file in images.values()], decode=False)
        for (name, file), label, fact in zip(images.items(), labels, facts, strict=True):
            if fact.error:
                unreadable.append(f"{file} ({fact.error})")
                continue
            width, height = fact.shown
            records.append(
                {
                    "file_name": str(file),
                    "image_id": name,
                    "height": height,
                    "width": width,
                    "annotations": read_labels(label, self.classes, width, height),
                }
            )
        if unreadable:
            raise DataError(
                f"{len(unreadable)} of the {len(images)} images of {self._what()} cannot be "
                f"opened, the first is {unreadable[0]}; copy them again, or take them out"
            )
        return records

    def images(self) -> dict[str, Path]:
        """The image files of this part by id, sorted."""
        root = existing_folder(self.root)
        files = sorted({file for place in self.places for file in _images_of(root, place)})
        if not files:
            raise DataError(f"{self._what()} has no images; wanted at least one")
        ids = _image_ids(root, files)
        refuse_duplicates(ids, f"{self._what()}: images of one name", "rename all but one of them")
        chosen = set(ids) if self.part is None else self.part.choose(ids)
        return {name: file for name, file in zip(ids, files, strict=True) if name in chosen}

    def without_labels(self) -> list[Path]:
        """The images that have no label file, and so no objects."""
        root = existing_folder(self.root)
        return [x for x in self.images().values() if not label_file(root, x).is_file()]

    def _what(self) -> str:
        part = {None: "", True: ", held-out part", False: ", training part"}[
            None if self.part is None else self.part.held_out
        ]
        return f"{self.root} ({', '.join(self.places)}{part})"

    def __repr__(self) -> str:
        part = "" if self.part is None else f", {self.part!r}"
        return (
            f"YOLO folder {self.root!r}, images in {', '.join(self.places)}, classes "
            f"{', '.join(self.classes)}{part}"
        )


class YOLOLayout(NamedTuple):
    """A folder with YOLO's labels: its sets by split (``all`` where there are none), and notes."""

    sources: dict[str, YOLOSource]
    notes: tuple[str, ...]


def yolo_layout(folder: Path) -> YOLOLayout | None:
    """Recognise a folder with YOLO's labels; None if there are none.

    Raises:
        FileNotFoundError: what data.yaml names is missing.
        DataError: the classes are not named, or data.yaml is faulty or leads out of the folder.
    """
    files = [(file, content) for file, content in _yaml_files(folder) if content is not None]
    if len(files) > 1:
        raise DataError(
            f"{folder} has several files that name classes and splits: "
            f"{', '.join(file.name for file, _ in files)}; leave one of them there"
        )
    if files:
        return _by_yaml(folder, *files[0])
    places = _places(folder)
    if not places:
        return None
    names = next((file for x in _NAME_FILES if (file := folder / x).is_file()), None)
    if names is None:
        raise DataError(
            f"{folder} has YOLO's labels, and nothing there names the classes; write "
            f"{folder / 'classes.txt'} with one name a line, in the order of their numbers (or a "
            "data.yaml with names, train and val)"
        )
    lines = read_lines(names, strict=True)
    while lines and not lines[-1].strip():
        lines.pop()
    classes = _checked_names([line.strip() for line in lines], str(names))
    sources = {
        split: YOLOSource("", str(folder), found, classes) for split, found in places.items()
    }
    return YOLOLayout(sources, ())


def _yaml_files(folder: Path) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """The yaml files at the top, with their content if that names classes and a split."""
    for file in visible([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
        try:
            content = read_plain_yaml(file)
        except DataError:
            if file.stem != "data":
                continue
            raise
        named = isinstance(content, dict) and "names" in content and set(_KEYS) & content.keys()
        if file.stem == "data" and not named:
            raise DataError(
                f"{file} lacks names, train or val; wanted three lines such as "
                "train: images/train, val: images/val, names: [cat, dog]"
            )
        yield file, content if named else None


def _by_yaml(folder: Path, file: Path, content: dict[str, Any]) -> YOLOLayout:
    if "kpt_shape" in content:
        raise DataError(
            f"{file} has kpt_shape, so its labels hold keypoints; wanted boxes alone: write five "
            "numbers a line and take kpt_shape out"
        )
    classes = _yaml_names(content["names"], file)
    count = content.get("nc", len(classes))
    if count != len(classes):
        raise DataError(f"{file}: nc is {brief(count)}, but names has {len(classes)}; correct one")
    base, notes = _base(folder, file, content.get("path"))
    sources: dict[str, YOLOSource] = {}
    for split in _KEYS:
        values = content.get(split)
        if not values:
            continue
        values = values if isinstance(values, list) else [values]
        places = tuple(_place(folder, base, value, f"{file}: {split}") for value in values)
        sources[split] = YOLOSource("", str(folder), places, classes)
    if not sources:
        raise DataError(f"{file}: train and val are empty; write where the images lie")
    train, val = sources.get("train"), sources.get("val")
    if train and val and train.places == val.places:
        notes.append(
            f"{file.name} names the same images as train and val: AP will say how well they were "
            "learned by heart, and nothing else"
        )
    return YOLOLayout(sources, tuple(notes))


def _base(folder: Path, file: Path, path: Any) -> tuple[Path, list[str]]:
    """What the splits' paths start from, below the folder; ``path`` is often another machine's."""
    if path in (None, "", ".", "./"):
        return folder, []
    inside = _inside(folder, folder / str(path)) if isinstance(path, str | int) else None
    if inside is not None and inside.is_dir():
        return inside, []
    return folder, [f"path {brief(path)} in {file.name} is not followed: {folder} was given"]


def _place(folder: Path, base: Path, value: Any, where: str) -> str:
    """A folder or list that data.yaml names, as a path below the folder."""
    if not isinstance(value, str):
        raise DataError(f"{where} is {brief(value)}, wanted the path of a folder of images")
    # Some services write ../train/images beside data.yaml itself, and mean train/images.
    bare = value.replace("\\", "/")
    shorter = bare
    while shorter.startswith("../"):
        shorter = shorter[3:]
    for name in dict.fromkeys((bare, shorter)):
        place = _inside(folder, base / name)
        if place is not None and (place.is_dir() or (place.is_file() and place.suffix == ".txt")):
            return os.path.relpath(place, folder)
    if _inside(folder, base / bare) is None:
        raise DataError(
            f"{where} is {brief(value)}, which leads out of {folder}; wanted a path inside of it, "
            "such as images/train: correct it, or give the folder that holds both with --dataset"
        )
    raise FileNotFoundError(
        f"{where} is {brief(value)}, and there is no {base / shorter}; correct it, or put the "
        "images there"
    )


def _inside(folder: Path, path: Path) -> Path | None:
    """The path without ``..``, or None if it is outside; links are not looked through.

    It is None, too, for names that no file can have.
    """
    plain = Path(os.path.normpath(path))
    if not plain.is_relative_to(folder) or unusable_name(str(plain.relative_to(folder))):
        return None
    return plain


def _yaml_names(names: Any, file: Path) -> tuple[str, ...]:
    if isinstance(names, Mapping):
        if any(isinstance(key, bool) for key in names) or {*names} != {*range(len(names))}:
            raise DataError(
                f"{file}: names has the numbers {brief([*names])[1:-1]}; wanted 0 to "
                f"{len(names) - 1}, each once"
            )
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list):
        raise DataError(f"{file}: names is {brief(names)}, wanted a list such as [cat, dog]")
    for name in names:
        if not isinstance(name, str | int | float) or isinstance(name, bool):
            raise DataError(f"{file}: a name is read as {brief(name)}; put it in quotes")
    return _checked_names([str(name).strip() for name in names], f"{file}: names")


def _checked_names(names: Sequence[str], where: str) -> tuple[str, ...]:
    if not names:
        raise DataError(f"{where} has no class; wanted one or more")
    if "" in names:
        raise DataError(f"{where}: class {names.index('')} has an empty name; write one")
    for name in names:
        if reason := unusable_name(name):
            raise DataError(f"{where}: {brief(name)} is no name of a class: {reason}")
    refuse_duplicates(names, where, "give each class its own name")
    return tuple(names)


def _places(folder: Path) -> dict[str, tuple[str, ...]]:
    """Where images with YOLO's labels lie, by split, in a folder without data.yaml."""
    lists = [(SPLIT_WORDS.get(x.stem.lower(), ""), x.name) for x in visible(folder.glob("*.txt"))]
    parents = [x for x in (folder / "images", folder) if x.is_dir()]
    folders = [
        (split, os.path.relpath(images if (images := place / "images").is_dir() else place, folder))
        for parent in parents
        for split, place in split_folders(parent)
    ]
    for candidates in ([x for x in lists if x[0]], folders):
        found: dict[str, tuple[str, ...]] = {
            split: (place,) for split, place in candidates if _labelled(folder, place)
        }
        if found:
            return found
    wholes = [x for x in ("images", "obj_train_data", ".") if (folder / x).is_dir()]
    return next(({WHOLE: (x,)} for x in wholes if _labelled(folder, x)), {})


def _labelled(folder: Path, place: str) -> bool:
    """Whether images of a place have label files that look like YOLO's."""
    try:
        files = _images_of(folder, place)
    except (DataError, OSError):
        return False
    labels = [x for file in files if (x := label_file(folder, file)).is_file()]
    looks = [looks_labelled(file) for file in labels[:_LOOKED_AT]]
    return any(looks) or (bool(looks) and False not in looks)


def _images_of(root: Path, place: str) -> list[Path]:
    """The images of a folder and of those in it, or of a list."""
    path = root / place
    if path.is_file():
        return _listed(root, path)
    if not path.is_dir():
        raise FileNotFoundError(f"no folder of images {path}; put it there")
    # Of the given folder itself only what lies directly in it: below may be other sets.
    files = path.iterdir() if place == "." else path.rglob("*")
    # A pipe of that name would be waited for; a link that leads nowhere is reported.
    return visible(
        file
        for file in files
        if file.suffix.lower() in IMAGE_SUFFIXES and (file.is_file() or not file.exists())
    )


def _listed(root: Path, listing: Path) -> list[Path]:
    files = []
    for number, line in enumerate(read_lines(listing), 1):
        name = line.strip().replace("\\", "/")
        if not name:
            continue
        starts = [listing.parent / name, root / name]
        places = [place for start in starts if (place := _inside(root, start)) is not None]
        if not places:
            raise DataError(
                f"{listing}, line {number}: {brief(name)} leads out of {root}; write the path from "
                "there"
            )
        # Some tools begin with the name of the folder that shall be given.
        shorter = _inside(root, root / name.partition("/")[2])
        candidates = [*places, *([] if shorter is None else [shorter])]
        found = next((place for place in candidates if place.is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"{listing}, line {number}: there is no image {places[0]}; put it there, or take "
                "the line out"
            )
        files.append(found)
    return files


def _image_ids(root: Path, files: Sequence[Path]) -> list[str]:
    """Names without suffix, as VOC's ids are; with their folders where a name comes twice."""
    stems = [file.stem for file in files]
    if len(set(stems)) == len(stems):
        return stems
    return [file.relative_to(root).with_suffix("").as_posix() for file in files]
