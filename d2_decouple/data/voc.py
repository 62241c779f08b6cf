# SPDX-License-Identifier: Apache-2.0
"""Folders in the layout of Pascal VOC, as datasets of Detectron2.

A folder holds ``Annotations/ID.xml``, ``JPEGImages/ID.jpg`` and ``ImageSets/Main/SPLIT.txt`` with
one ID a line. Registering reads nothing: a recipe can name a set that is not on this machine, and
the first one who asks for its images is told where they were looked for.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from .foreign import (
    ANNOTATION_MIB,
    LARGEST_SIDE,
    brief,
    read_limited,
    read_lines,
    unusable_name,
)
from .loader import DataError
from .records import (
    IMAGE_SUFFIXES,
    Part,
    contained,
    existing_folder,
    keep_inside,
    missing_files,
    refuse_duplicates,
    register_source,
    require_images,
    visible,
)

__all__ = [
    "VOCSource",
    "annotated_classes",
    "annotation_files",
    "annotations_folder",
    "image_files",
    "load_voc",
    "register_voc",
]

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "Annotations", "annotations", "")


def load_voc(
    root: str | os.PathLike[str], split: str | None, classes: Sequence[str]
) -> list[dict[str, Any]]:
    """Read one split of a VOC folder as Detectron2 dataset dicts.

    Boxes are absolute xyxy pixels with the origin at the image's upper left corner. VOC counts
    pixels from 1 and includes both corners, so (1, 1, W, H) is the whole image and becomes
    (0, 0, W, H): one is taken from the first corner and none from the second. Sets that count
    from 0 would start at -1 and start at 0 instead. The image size is the annotation's. Boxes
    that reach beyond it are cut, those without area inside it or with a NaN or infinite
    coordinate dropped; one warning counts them all.

    ``difficult`` objects become ``iscrowd=1``. VOC asks neither to find nor to miss them, and
    crowds are what Detectron2 has for that: its mapper takes them out of the training targets
    (their place counts as background), and COCO's evaluation neither demands them nor counts a
    detection that lies on one as false.

    An image is sought under its id with the suffix of the annotation's ``<filename>``, then under
    its id with any suffix of an image, then under that name, which may be an older one.

    Args:
        root: the folder that holds Annotations (or annotations, or the .xml files themselves),
            ImageSets and JPEGImages (or images, or the images themselves). A leading
            ``$DETECTRON2_DATASETS`` stands for that variable's folder, ``datasets`` if unset.
        split: a file name in ImageSets/Main, without its suffix; None for all annotated images.
        classes: class names in the order of their ids.

    Raises:
        FileNotFoundError: the folder, the split, an annotation or images are missing.
        DataError: an annotation cannot be read, names an unknown class, none, or a file outside
            the folder; a split is empty or names an image twice.
    """
    return VOCSource("", os.fspath(root), split, tuple(classes))()


def register_voc(
    name: str,
    root: str | os.PathLike[str],
    split: str,
    *,
    classes: Sequence[str] | None = None,
) -> None:
    """Make a split of a VOC folder known to Detectron2 under ``name``; see :func:`load_voc`.

    Nothing is read before somebody asks for the images. Registering the same set twice does
    nothing; another set under a name in use is an error. Without ``classes`` they are the sorted
    names in *all* annotations of the folder, not in this split's alone: a class that is rare
    enough to be missing from one split would shift the ids of the others. The metadata know
    such classes only after the images were asked for.
    """
    source = VOCSource(name, os.fspath(root), split, None if classes is None else tuple(classes))
    register_source(source, split=split)


@dataclass(frozen=True)
class VOCSource:
    """What the catalog calls for a split of a VOC folder; ``part`` takes a part of the split."""

    name: str
    root: str
    split: str | None
    classes: tuple[str, ...] | None
    part: Part | None = None

    def __call__(self) -> list[dict[str, Any]]:
        """Dataset dicts, see :func:`load_voc`."""
        return keep_inside(self.read(), self._what())

    def read(self) -> list[dict[str, Any]]:
        """The same with the boxes as annotated."""
        folder = existing_folder(self.root)
        classes = self.classes
        if classes is None:
            classes = annotated_classes(folder)
            if not classes:
                raise DataError(
                    f"no object in {annotations_folder(folder)}: pass classes=[...] instead"
                )
            MetadataCatalog.get(self.name).set(thing_classes=list(classes))
        ids = {name: index for index, name in enumerate(classes)}
        places = _image_folders(folder)
        load = partial(_load_image, folder, places, _home(folder), ids)
        records = [load(image_id) for image_id in self.image_ids()]
        _find_other_suffixes(records, places)
        require_images(records, self._what())
        return records

    def image_ids(self) -> list[str]:
        """Ids of the images, in the order of the split's file."""
        folder = existing_folder(self.root)
        listed = _split_ids(folder, self.split)
        chosen = set(listed) if self.part is None else self.part.choose(listed)
        return [image_id for image_id in listed if image_id in chosen]

    def _what(self) -> str:
        part = {None: "", True: ", held-out part", False: ", training part"}[
            None if self.part is None else self.part.held_out
        ]
        split = "all images" if self.split is None else f"split {self.split!r}"
        return f"{self.root}, {split}{part}"

    def __repr__(self) -> str:
        classes = "those annotated" if self.classes is None else ", ".join(self.classes)
        part = "" if self.part is None else f", {self.part!r}"
        return f"VOC folder {self.root!r}, split {self.split!r}, classes {classes}{part}"


def annotations_folder(folder: Path) -> Path:
    """Where the .xml files of a VOC folder lie."""
    for name in ("Annotations", "annotations"):
        if (folder / name).is_dir():
            return folder / name
    return folder


def annotation_files(folder: Path) -> list[Path]:
    """The .xml files of a VOC folder, sorted."""
    return visible(annotations_folder(folder).glob("*.xml"))


def annotated_classes(folder: Path) -> tuple[str, ...]:
    """Sorted names of the objects in all annotations of a folder."""
    names = {
        _name(item, file)
        for file in annotation_files(folder)
        for item in _parse(file).iterfind("object")
    }
    return tuple(sorted(names))


def image_files(folder: Path) -> list[Path]:
    """All images of a VOC folder, sorted."""
    files = (file for place in _image_folders(folder) for file in place.iterdir())
    return visible(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES)


def _image_folders(folder: Path) -> list[Path]:
    return [folder / name for name in _IMAGE_FOLDERS if (folder / name).is_dir()]


def _home(folder: Path) -> Path:
    """Where a missing image is wanted: the first folder that holds images, else VOC's own."""
    places = _image_folders(folder)
    for place in places:
        if any(file.suffix.lower() in IMAGE_SUFFIXES for file in place.iterdir()):
            return place
    own = [place for place in places if place.name in _IMAGE_FOLDERS[:3]]
    return own[0] if own else folder / _IMAGE_FOLDERS[0]


def _split_ids(folder: Path, split: str | None) -> list[str]:
    if split is None:
        files = annotation_files(folder)
        if not files:
            raise DataError(f"no annotation (.xml) in {annotations_folder(folder)}")
        return [file.stem for file in files]
    listing = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not listing.is_file():
        known = sorted(file.stem for file in listing.parent.glob("*.txt"))
        raise FileNotFoundError(
            f"no split {split!r}: {listing} is missing; "
            f"splits found there: {', '.join(known) or 'none'}"
        )
    # VOC's own per-class lists have a second column (1, 0, -1), which is of no use here.
    lines = read_lines(listing)
    place = annotations_folder(folder)
    ids = [
        contained(_image_id(line.strip(), place), f"{listing}: an id")
        for line in lines
        if line.strip()
    ]
    if not ids:
        raise DataError(f"split {split!r} is empty: {listing} names no image; wanted one id a line")
    refuse_duplicates(ids, f"ids in {listing}", "take the surplus lines out")
    return ids


def _image_id(line: str, annotations: Path) -> str:
    words = line.split()
    if len(words) != 2 or words[1] not in ("1", "0", "-1"):
        return line  # the blanks belong to the image's name
    # It may be that of frame 1, too.
    named = not unusable_name(line) and (annotations / f"{line}.xml").is_file()
    return line if named else words[0]


def _parse(file: Path) -> ET.Element:
    if not file.is_file():
        raise FileNotFoundError(f"annotation {file} is missing, though its split lists {file.stem}")
    content = read_limited(file, ANNOTATION_MIB)
    # Before a parser gets it: older ones expand entities up to the end of what they were given,
    # whatever a handler says. Without its zeros UTF-16 is found, too; other encodings keep ASCII.
    if b"<!DOCTYPE" in content.replace(b"\0", b""):
        raise DataError(
            f"cannot read annotation {file}: a DOCTYPE (and with it entities) is not accepted in "
            "annotations; take it out"
        )
    try:
        return ET.fromstring(content)
    except (ET.ParseError, ValueError, LookupError) as error:  # the last: an unknown encoding
        raise DataError(f"cannot read annotation {file}: {error}") from error


def _number(element: ET.Element, path: str, file: Path) -> float:
    text = element.findtext(path)
    try:
        return float(text or "")
    except ValueError as error:
        raise DataError(
            f"{file}: <{path}> is {brief(text)}, wanted a number; correct it"
        ) from error


def _size(root: ET.Element, path: str, file: Path) -> int:
    value = _number(root, path, file)
    if not 1 <= value <= LARGEST_SIDE:  # NaN is in no range
        raise DataError(
            f"{file}: <{path}> is {brief(root.findtext(path))}, wanted the image's size in pixels"
        )
    return int(value)


def _load_image(
    folder: Path, places: Sequence[Path], home: Path, ids: dict[str, int], image_id: str
) -> dict[str, Any]:
    file = annotations_folder(folder) / f"{image_id}.xml"
    root = _parse(file)
    filename = contained((root.findtext("filename") or "").strip(), f"{file}: <filename>")
    return {
        "file_name": _find_image(places, home, image_id, filename),
        "image_id": image_id,
        "height": _size(root, "size/height", file),
        "width": _size(root, "size/width", file),
        "annotations": [_load_object(item, file, ids) for item in root.iterfind("object")],
    }


def _find_image(places: Sequence[Path], home: Path, image_id: str, filename: str) -> str:
    suffixes = [suffix for low in IMAGE_SUFFIXES for suffix in (low, low.upper())]
    if filename.lower().endswith(".xml"):  # the annotation's own name, which is no image's
        filename = ""
    likely = image_id + (Path(filename).suffix or ".jpg")
    # The name comes last: it is often an older one, which another image may have got since.
    names = [likely, *(image_id + end for end in suffixes), *([filename] if filename else [])]
    for name in names:
        for place in places:
            if (place / name).is_file():
                return str(place / name)
    return str(home / likely)


def _find_other_suffixes(records: Sequence[dict[str, Any]], places: Sequence[Path]) -> None:
    """Give records whose image is missing another file of its name: ``a.Jpg``, ``a.gif``."""
    missing = set(missing_files([record["file_name"] for record in records]))
    if not missing:
        return
    files = (file for place in reversed(places) for file in place.iterdir())
    found = {x.stem: str(x) for x in files if x.suffix.lower() in (*IMAGE_SUFFIXES, ".gif")}
    for record in records:
        if record["file_name"] in missing:
            record["file_name"] = found.get(record["image_id"], record["file_name"])


def _name(item: ET.Element, file: Path) -> str:
    name = (item.findtext("name") or "").strip()
    if not name:
        raise DataError(f"{file}: an <object> has no <name>; write the class there")
    return name


def _load_object(item: ET.Element, file: Path, ids: dict[str, int]) -> dict[str, Any]:
    name = _name(item, file)
    if name not in ids:
        raise DataError(
            f"{file}: unknown class {brief(name)}; known classes: {', '.join(ids)}; correct the "
            "file, or register the dataset with a list of classes that has it"
        )
    x1, y1, x2, y2 = (_number(item, f"bndbox/{corner}", file) for corner in _CORNERS)
    return {
        # Where a set counts from 0, its 0 stays; what is below 0 lies beyond the image in any case.
        "bbox": [max(x1 - 1, min(x1, 0.0)), max(y1 - 1, min(y1, 0.0)), x2, y2],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": ids[name],
        "iscrowd": int((item.findtext("difficult") or "0").strip() == "1"),
    }
