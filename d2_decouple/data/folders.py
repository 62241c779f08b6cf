# SPDX-License-Identifier: Apache-2.0
"""A folder of labelled images, recognised by what lies in it, as a training and a test set."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from .coco import COCOContent, COCOSource, image_path, read_coco
from .foreign import read_json
from .loader import DataError
from .records import IMAGE_SUFFIXES, Part, existing_folder, register_source, visible
from .splits import SPLIT_WORDS, WHOLE, split_folders
from .voc import VOCSource, annotated_classes, annotation_files, image_files
from .yolo import YOLOSource, yolo_layout

__all__ = ["FolderDataset", "register_folder"]

AnySource: TypeAlias = VOCSource | COCOSource | YOLOSource

# What is trained on and what is measured on, the first pair that is there. With all of train, val
# and test, a test set stays unseen while checkpoints are compared.
_PAIRS = (("trainval", "test"), ("train", "val"), ("train", "test"))

_WANTED = """wanted one of these layouts:
  Annotations/*.xml + JPEGImages/ (or images/), with ImageSets/Main/{train,val,test}.txt or without
  train/*.xml and val/*.xml (or valid/, test/), with their images
  annotations/instances_train*.json + instances_val*.json, with images in train*/ and val*/
  train/_annotations.coco.json + valid/_annotations.coco.json, with their images
  one COCO .json, with images in images/
  YOLO: data.yaml (names, train, val), or classes.txt, with images/ and labels/*.txt"""
_LOOKED_AT = 10_000  # files, for images in a folder that is no dataset
_KINDS = {VOCSource: "Pascal VOC", COCOSource: "COCO", YOLOSource: "YOLO"}


@dataclass(frozen=True)
class FolderDataset:
    """A folder that is registered.

    Attributes:
        train: name of the training set in Detectron2's catalog.
        test: name of the test set.
        classes: names in the order of their ids.
        notes: lines that say what was recognised and decided.
    """

    train: str
    test: str
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def register_folder(
    root: str | os.PathLike[str], *, test_fraction: float = 0.2, seed: int = 0
) -> FolderDataset:
    """Register a folder of labelled images as a training and a test set.

    The classes are those of the data, over all splits. Splits are the folder's own; where there
    is only one, a part of it is held out for the test: which images depends on their names, the
    fraction and the seed alone. Doing it again changes nothing, and folders of one name in
    different places get different names.

    Args:
        root: in one of the layouts of Pascal VOC, COCO or YOLO, looked for in this order.
        test_fraction: share of the images that is held out, between 0 and 1.
        seed: of that choice.

    Raises:
        FileNotFoundError: no such folder, or images are missing.
        DataError: no known layout, classes of the splits that differ, or faulty annotations.
    """
    if not 0 < test_fraction < 1:
        raise DataError(f"test_fraction must lie between 0 and 1, got {test_fraction}")
    if Path(root).is_file():
        raise DataError(
            f"{root} is a file; wanted the folder that holds images and labels, such as "
            f"{Path(root).absolute().parent}"
        )
    folder = existing_folder(root).resolve()
    contents: dict[str, COCOContent] = {}
    layout = None
    found = _voc(folder) or _voc_by_split(folder) or _coco(folder, contents)
    if not found and (layout := yolo_layout(folder)):
        found = dict(layout.sources)
    if not found:
        raise DataError(
            f"{folder} is no dataset: {_hint(folder)}found {_listing(folder)}; {_WANTED}"
        )
    train, test, unused, note = _choose(found, test_fraction, seed)
    classes, class_note = _classes(found, contents, (train, test))
    sources = [replace(source, classes=classes) for source in (train, test)]
    # Read before they are registered, so that a faulty folder leaves nothing behind.
    records = [_read(source, contents) for source in sources]
    name = _unique_name(folder, train.part)
    for source, which in zip(sources, ("train", "test"), strict=True):
        register_source(replace(source, name=f"{name}_{which}"))
    notes = [f"{folder}: {_KINDS[type(train)]}, {len(classes)} classes: {', '.join(classes)}"]
    sizes = [len(part) for part in records]
    notes += [f"{sizes[0]} images for training, {sizes[1]} for the test: {note}"]
    notes += [*(layout.notes if layout else ()), *_without_labels(sources)]
    notes += _unknown_lists(train)
    notes += [f"not used: {', '.join(unused)}"] if unused else []
    notes += [*([class_note] if class_note else []), *_alike(classes)]
    used = {record["file_name"] for part in records for record in part}
    notes += _without_annotation(sources, used)
    return FolderDataset(f"{name}_train", f"{name}_test", classes, tuple(notes))


def _voc(folder: Path) -> dict[str, AnySource]:
    """Splits of a VOC folder; empty if it is none."""
    if not annotation_files(folder):
        return {}
    found: dict[str, AnySource] = {}
    for file in _lists(folder):
        split = SPLIT_WORDS.get(file.stem.lower())
        if split in found:
            raise DataError(f"{file.parent} has two lists for {split}; take one out")
        if split:
            found[split] = VOCSource("", str(folder), file.stem, None)
    return found or {WHOLE: VOCSource("", str(folder), None, None)}


def _lists(folder: Path) -> list[Path]:
    return visible((folder / "ImageSets" / "Main").glob("*.txt"))


def _voc_by_split(folder: Path) -> dict[str, AnySource]:
    """A VOC folder for each split, as some labelling services write them."""
    return {
        split: VOCSource("", str(place), None, None)
        for split, place in split_folders(folder)
        if annotation_files(place)
    }


def _coco(folder: Path, contents: dict[str, COCOContent]) -> dict[str, AnySource]:
    """Splits of a folder with COCO files, whose contents are kept; empty if it has none."""
    files = visible([*folder.glob("*.json"), *(folder / "annotations").glob("*.json")])
    instances = [file for file in files if file.name.startswith("instances_")]
    splits = [(_split_of(file.stem), file) for file in instances or files]
    splits += [
        (split, file)
        for split, place in split_folders(folder)
        for file in visible(place.glob("*.json"))
    ]
    splits = [(split, file) for split, file in splits if _is_coco(file)]
    if len(splits) == 1 and splits[0][0] is None:
        splits = [(WHOLE, splits[0][1])]
    found: dict[str, AnySource] = {}
    for split, file in splits:
        others = [x for x in splits if x[0] == split and x[1] != file]
        if split is None or others:
            names = ", ".join(str(x[1].relative_to(folder)) for x in splits)
            raise DataError(
                f"{folder}: cannot tell which of {names} is for training and which for the test; "
                "wanted one with 'train' and one with 'val' or 'test' in its name"
            )
        contents[str(file)] = read_coco(file)
        place = _image_root(folder, contents[str(file)], split)
        found[split] = COCOSource("", str(file), str(place), None)
    return found


def _split_of(stem: str) -> str | None:
    """The split that a file's name says, as in instances_train2017."""
    words = re.findall(r"[a-z]+", stem.lower())
    found = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    return found.pop() if len(found) == 1 else None


def _is_coco(file: Path) -> bool:
    """Whether a file seems to be meant as COCO; a broken one is, so that it is read and named."""
    if "coco" in file.stem or file.stem.startswith("instances_"):
        return True
    try:
        content = read_json(file)
    except DataError:
        return True
    return isinstance(content, dict) and bool({"images", "annotations"} & content.keys())


def _image_root(folder: Path, content: COCOContent, split: str) -> Path:
    """The folder in which the first image of a COCO file lies."""
    file = content.file
    if not content.images:
        raise DataError(f"{file} has no images; wanted at least one")
    first = content.images[0]["file_name"]
    names = [file.stem.removeprefix("instances_")]
    names += [word for word, meaning in SPLIT_WORDS.items() if meaning == split]
    places = [file.parent] if file.parent.name.lower() in SPLIT_WORDS else []
    places += [folder / part / name for part in ("", "images") for name in names]
    places += [folder / name for name in ("images", "Images", "JPEGImages", "img", "data", "")]
    others = [place for place in sorted(folder.iterdir()) if place.is_dir()]
    for place in (*places, *others):
        if os.path.isfile(image_path(place, first)):
            return place
    known = dict.fromkeys(str(place) for place in places if place.is_dir())
    raise FileNotFoundError(
        f"{file}: its first image {first!r} is in none of {', '.join(known)}; put the images there"
    )


def _choose(
    found: Mapping[str, AnySource], fraction: float, seed: int
) -> tuple[AnySource, AnySource, list[str], str]:
    """Training set, test set, names of the splits that are neither, and a clause that says why."""
    for train, test in _PAIRS:
        if train in found and test in found:
            # Either trainval is used, which holds train and val, or it is these two.
            known = (train, test, "trainval", *(("train", "val") if train == "trainval" else ()))
            unused = [split for split in found if split not in known]
            return found[train], found[test], unused, f"the folder's own {train} and {test}"
    wanted = next((x for x in ("trainval", "train", WHOLE) if x in found), None)
    if wanted is None:
        raise DataError(
            f"found only {', '.join(found)}, and nothing to train on; wanted a split named train "
            "(or trainval), or no splits at all"
        )
    parts = [replace(found[wanted], part=Part(fraction, seed, held)) for held in (False, True)]
    unused = [split for split in found if split not in (wanted, "train", "val")]
    which = "no splits" if wanted == WHOLE else f"no test split beside {wanted}"
    return (
        parts[0],
        parts[1],
        unused,
        f"the folder has {which}, so {fraction:.0%} are held out, by name and seed {seed}",
    )


def _classes(
    found: Mapping[str, AnySource], contents: Mapping[str, COCOContent], chosen: Sequence[AnySource]
) -> tuple[tuple[str, ...], str]:
    """Class names over all splits, and a note on them or nothing."""
    if isinstance(chosen[0], YOLOSource):
        return chosen[0].classes, ""
    files = dict.fromkeys(x.json_file for x in chosen if isinstance(x, COCOSource))
    if files:
        return _declared_classes([contents[file] for file in files])
    folders = dict.fromkeys(x.root for x in found.values() if isinstance(x, VOCSource))
    names = {name for root in folders for name in annotated_classes(Path(root))}
    if not names:
        raise DataError(f"no object is annotated in {', '.join(folders)}: nothing to learn")
    return tuple(sorted(names)), ""


def _read(source: AnySource, contents: Mapping[str, COCOContent]) -> list[dict[str, Any]]:
    """Dataset dicts; reads, and so checks, the whole set."""
    if isinstance(source, COCOSource):
        return source.read(contents[source.json_file])
    return source.read()


def _unknown_lists(source: AnySource) -> list[str]:
    """A note on lists of images whose names say nothing, so that other splits were made."""
    if not isinstance(source, VOCSource) or source.split is not None:
        return []
    names = [file.stem for file in _lists(Path(source.root))]
    if not names:
        return []
    more = ", ..." if names[5:] else ""
    return [
        f"lists in ImageSets/Main that are not used: {', '.join(names[:5])}{more}; wanted one "
        "named train (or trainval), and one named val or test"
    ]


def _without_annotation(sources: Sequence[AnySource], used: set[str]) -> list[str]:
    """A note on images that no .xml file speaks of: a negative image needs one without objects."""
    roots = dict.fromkeys(x.root for x in sources if isinstance(x, VOCSource) and x.split is None)
    surplus = [x for root in roots for x in image_files(Path(root)) if str(x) not in used]
    if not surplus:
        return []
    return [
        f"{len(surplus)} images without an .xml file are not used, the first is {surplus[0]}; an "
        "image without objects needs an .xml file without <object>"
    ]


def _without_labels(sources: Sequence[AnySource]) -> list[str]:
    """A note on images without a label file, which YOLO takes for images without objects."""
    sets = [source for source in sources if isinstance(source, YOLOSource)]
    bare = [file for source in sets for file in source.without_labels()]
    if not bare:
        return []
    return [
        f"{len(bare)} images have no label file, so no objects; the first is {bare[0]}: take those "
        "out that were not looked at"
    ]


def _declared_classes(contents: Sequence[COCOContent]) -> tuple[tuple[str, ...], str]:
    first = contents[0]
    for other in contents[1:]:
        for here, there in ((first, other), (other, first)):
            surplus = [x for x in here.categories.values() if x not in there.categories.values()]
            if surplus:
                raise DataError(
                    f"the categories of {here.file} and {there.file} differ: the first has the "
                    f"surplus {', '.join(surplus)}; wanted the same names in both"
                )
    # Some services declare a root category that no object has and all others name as parent.
    used = {content.categories[index] for content in contents for index in content.used()}
    if not used:
        raise DataError(f"{first.file} annotates no object: nothing to learn")
    parents = {name for index, name in first.parents.items() if name != first.categories[index]}
    roots = {name for name in parents if name not in used}
    classes = tuple(name for name in first.categories.values() if name not in roots)
    left_out = [name for name in first.categories.values() if name in roots]
    note = f"category {', '.join(left_out)} is only the others' parent and is no class"
    return classes, note if left_out else ""


def _unique_name(folder: Path, part: Part | None) -> str:
    """A name that another folder, or another choice of test images, does not get."""
    choice = "" if part is None else f"/{part.fraction}/{part.seed}"
    digest = hashlib.sha256(f"{folder.resolve()}{choice}".encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', folder.name).strip('-') or 'data'}_{digest[:8]}"


def _hint(folder: Path) -> str:
    """What is probably meant by a folder that is no dataset; may be empty."""
    below = [place for place in sorted(folder.iterdir()) if place.is_dir()]
    for place in below:
        if annotation_files(place) or (place / "data.yaml").is_file():
            return f"is {place} meant? "
    files = islice(folder.rglob("*"), _LOOKED_AT)
    if any(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
        return "there are images, and no annotations that belong to them; "
    return ""


def _alike(classes: Sequence[str]) -> list[str]:
    """A note on classes whose names differ in nothing but case and blanks."""
    known: dict[str, list[str]] = {}
    for name in classes:
        known.setdefault(re.sub(r"[\s_-]+", "", name.casefold()), []).append(name)
    return [
        f"classes {' and '.join(map(repr, names))} are nearly written alike: if they are one, "
        "correct the annotations"
        for names in known.values()
        if len(names) > 1
    ]


def _listing(folder: Path) -> str:
    """What lies in a folder, in a few words."""
    entries = sorted(folder.iterdir())
    folders = [f"{entry.name}/" for entry in entries if entry.is_dir()]
    files = [entry for entry in entries if entry.is_file()]
    images = sum(file.suffix.lower() in IMAGE_SUFFIXES for file in files)
    others = [file.name for file in files if file.suffix.lower() not in IMAGE_SUFFIXES]
    shown = [*folders, *others][:12] + ([f"{images} images"] if images else [])
    return ", ".join(shown) or "nothing"
