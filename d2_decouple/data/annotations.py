# SPDX-License-Identifier: Apache-2.0
"""The annotated objects of single images, found by the images' names.

The readers are those of whole sets; here an image comes first, and its annotation is sought.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Instances

from .coco import read_coco
from .datasets import ground_truth, require_dataset
from .loader import DataError
from .records import Part, data_path, keep_inside
from .voc import VOCSource, annotated_classes, annotation_files, annotations_folder

__all__ = ["Annotations", "open_annotations"]

_REMEDY = (
    "type --annotations with a COCO file, a VOC folder, a VOC .xml file or the name of a data set "
    "that has this image"
)


class Annotations(ABC):
    """Where annotations of images are sought."""

    @abstractmethod
    def record(self, image: Path) -> dict[str, Any]:
        """Detectron2's dataset dict of an image, or DataError if there is none."""

    def objects(self, image: Path, size: tuple[int, int]) -> Instances:
        """The objects of an image, without crowds, in its pixels.

        Args:
            image: its file; the name alone matters, and the folder where several have that name.
            size: (H, W) of the image as it is displayed.

        Raises:
            DataError: the image has no annotation, or that of an image of another size.
        """
        record = self.record(image)
        annotated = (record["height"], record["width"])
        if annotated != size:
            raise DataError(
                f"{image} is {size[1]} x {size[0]} pixels as it is displayed, its annotation is "
                f"for {annotated[1]} x {annotated[0]}; give the image that was annotated"
            )
        return ground_truth(record)


def open_annotations(where: str | None, classes: Sequence[str]) -> Annotations:
    """Annotations of any kind.

    Args:
        where: a COCO file (.json), a folder in the layout of VOC or its Annotations, a VOC file
            (.xml), or the name of a registered data set. By default the .xml file of an image is
            sought beside it, and in Annotations beside its folder.
        classes: names of the model's classes in the order of their ids; where they are not known,
            those of the annotations count.

    Raises:
        DataError: there is no such file, folder or data set, or it has other classes.
    """
    if where is None:
        return _Beside(classes)
    path = data_path(where)
    if path.is_file() and path.suffix.lower() == ".json":
        return _COCO(path, classes)
    if path.is_file() and path.suffix.lower() == ".xml":
        return _VOC(path.parent, classes, only=path)
    if path.is_dir():
        if not annotation_files(_voc_folder(path)):
            raise DataError(
                f"--annotations {where}: no .xml file lies in {annotations_folder(path)}; wanted "
                "is a folder in the layout of VOC; of COCO give the .json file itself"
            )
        return _VOC(path, classes)
    if path.exists():
        raise DataError(f"--annotations {where} is neither .json nor .xml; {_REMEDY}")
    try:
        require_dataset(where)
    except ValueError as error:
        raise DataError(f"--annotations {where}: no such file or folder; {error}") from error
    return _Registered(where, classes)


@dataclass(frozen=True)
class _Named(Part):
    """The part of a set that has these names."""

    names: frozenset[str] = frozenset()

    def choose(self, names: Iterable[str]) -> set[str]:
        """Those of the names that are in it."""
        return set(names) & self.names


def _named(name: str) -> _Named:
    return _Named(fraction=0.0, seed=0, held_out=True, names=frozenset((name,)))


class _VOC(Annotations):
    """A folder of .xml files, or one of them."""

    def __init__(self, folder: Path, classes: Sequence[str], *, only: Path | None = None) -> None:
        self._folder, self._only = _voc_folder(folder), only
        self._classes = tuple(classes) or annotated_classes(self._folder)

    def record(self, image: Path) -> dict[str, Any]:
        """Of the .xml file that has the image's name."""
        file = annotations_folder(self._folder) / f"{image.stem}.xml"
        if not file.is_file() or self._only not in (None, file):
            raise _missing(image, [self._only or file])
        source = VOCSource("", str(self._folder), None, self._classes, _named(image.stem))
        try:
            records = source.read()
        except FileNotFoundError as error:
            raise DataError(
                f"{file} is an annotation of {image.name}, which is sought beside it and in "
                f"{self._folder / 'JPEGImages'} and is in neither; put the image there"
            ) from error
        return keep_inside(records, str(file))[0]


class _Beside(Annotations):
    """The .xml file of each image, where programs for labelling put it."""

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes = tuple(classes)

    def record(self, image: Path) -> dict[str, Any]:
        """Of the .xml file beside the image, or in Annotations beside its folder."""
        folder = data_path(image).parent
        name = f"{image.stem}.xml"
        places = [folder, folder / "Annotations", folder.parent / "Annotations"]
        for place in places:
            if (place / name).is_file():
                return _VOC(place, self._classes).record(image)
        raise _missing(image, [place / name for place in places])


class _COCO(Annotations):
    """A COCO file, which is read once."""

    def __init__(self, file: Path, classes: Sequence[str]) -> None:
        self._content = read_coco(file)
        self._ids = self._content.class_ids(tuple(classes) or None)[1]

    def record(self, image: Path) -> dict[str, Any]:
        """Of the image with the same name."""
        content = self._content
        name = _same_name(image, [x["file_name"] for x in content.images], str(content.file))
        image_alone = [x for x in content.images if x["file_name"] == name]
        records = replace(content, images=image_alone).records(Path(), self._ids)
        return keep_inside(records, str(content.file))[0]


class _Registered(Annotations):
    """A set of Detectron2's catalog."""

    def __init__(self, name: str, classes: Sequence[str]) -> None:
        self._name = name
        self._records = {x["file_name"]: x for x in DatasetCatalog.get(name)}
        own = tuple(MetadataCatalog.get(name).get("thing_classes") or classes)
        classes = tuple(classes) or own
        if unknown := [x for x in own if x not in classes]:
            raise DataError(
                f"--annotations {name}: this data set has the class {unknown[0]}, and the model "
                f"was trained on {', '.join(classes)}; give a data set of these classes"
            )
        self._ids = [classes.index(x) for x in own]

    def record(self, image: Path) -> dict[str, Any]:
        """Of the image with the same name, its classes those of the model."""
        found = self._records[_same_name(image, [*self._records], f"data set {self._name}")]
        objects = [
            {**item, "category_id": self._ids[item["category_id"]]} for item in found["annotations"]
        ]
        return {**found, "annotations": objects}


def _voc_folder(path: Path) -> Path:
    """The folder that holds Annotations, if that is what is given."""
    return path.parent if path.name in ("Annotations", "annotations") else path


def _same_name(image: Path, names: Sequence[str], what: str) -> str:
    """The one of the names that an image's file has.

    Raises:
        DataError: none has, or several have and the folder does not tell which.
    """
    full = data_path(image).as_posix()
    same = [name for name in names if Path(name).name == image.name]
    if len(same) > 1:
        same = [name for name in same if full.endswith(f"/{name.lstrip('./')}")] or same
    if len(same) == 1:
        return same[0]
    if same:
        raise DataError(
            f"{image}: {what} has {len(same)} images of this name, {same[0]} and {same[1]}; give "
            "the image by a path that ends as one of them"
        )
    raise _missing(image, [f"{image.name} among the {len(names)} images of {what}"])


def _missing(image: Path, places: Sequence[Any]) -> DataError:
    looked = ", ".join(map(str, places))
    return DataError(f"{image} has no annotation: looked for {looked}; {_REMEDY}")
