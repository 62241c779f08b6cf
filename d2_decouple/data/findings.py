# SPDX-License-Identifier: Apache-2.0
"""Faults in dataset dicts, of one set and between sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

from .records import BoxFault, Source, cut_box

__all__ = ["Finding", "Split", "check_classes", "check_records"]

_FEW_OBJECTS = 5  # of a class; fewer say nothing about it
_SHOWN = 3  # names in one line of the report


@dataclass(frozen=True)
class Split:
    """A set that was checked: its role (training or test), name, classes and dataset dicts."""

    role: str
    name: str
    classes: tuple[str, ...]
    records: list[dict[str, Any]]


@dataclass
class Finding:
    """One kind of fault, and each place where it was found."""

    text: str
    stops: bool
    places: list[str] = field(default_factory=list)

    def line(self, shown: int = _SHOWN) -> str:
        """One line with the number of places and the first of them."""
        if not self.places:
            return self.text
        more = len(self.places) - shown
        rest = f", and {more} more" if more > 0 else ""
        return f"{self.text}: {len(self.places)} ({', '.join(self.places[:shown])}{rest})"


def check_records(split: Split, num_classes: int | None) -> Iterator[Finding]:
    """Boxes, category ids, negatives and ids of one set.

    ``num_classes`` is the model's, or None for as many as the metadata name.
    """
    where = f"{split.role} set {split.name!r}"
    mended = isinstance(DatasetCatalog[split.name], Source)
    count = num_classes or len(split.classes) or None
    faults: dict[BoxFault, Finding] = {
        "beyond": Finding(f"{where}: boxes that reach beyond their image, cut", stops=False),
        "empty": Finding(f"{where}: boxes without area in their image, dropped", stops=False),
        "not finite": Finding(
            f"{where}: boxes with a NaN or infinite coordinate" + (", dropped" if mended else ""),
            stops=not mended,
        ),
    }
    surplus = Finding(
        f"{where}: category ids beyond the model's {count} classes (0 to {(count or 0) - 1}), "
        "which would be trained as background",
        stops=True,
    )
    objects = 0
    for record in split.records:
        for item in record.get("annotations", ()):
            objects += not item.get("iscrowd", 0)
            label = item["category_id"]
            if label < 0 or (count is not None and label >= count):
                surplus.places.append(f"id {label} in {record['file_name']}")
            fault = _box_fault(record, item)
            if fault:
                faults[fault].places.append(record["file_name"])
    if split.role == "training" and not objects:
        yield Finding(f"{where} has no objects to learn from", stops=True)
    elif not objects:
        yield Finding(f"{where} has no objects: nothing can be measured on it", stops=False)
    yield from (finding for finding in (surplus, *faults.values()) if finding.places)
    yield from _check_duplicates(split, where)


def _box_fault(record: dict[str, Any], item: dict[str, Any]) -> BoxFault:
    box = [float(value) for value in item["bbox"]]
    if len(box) != 4:  # rotated
        return "" if np.isfinite(box).all() else "not finite"
    if item["bbox_mode"] != BoxMode.XYXY_ABS:
        box = BoxMode.convert(box, item["bbox_mode"], BoxMode.XYXY_ABS)
    return cut_box(box, record.get("width", np.inf), record.get("height", np.inf))[1]


def _check_duplicates(split: Split, where: str) -> Iterator[Finding]:
    for key, stops, text in (
        ("image_id", True, "ids that several images have"),
        ("file_name", False, "image files that are listed more than once"),
    ):
        counts = Counter(record.get(key) for record in split.records)
        twice = [str(value) for value, number in counts.items() if number > 1 and value is not None]
        if twice:
            yield Finding(f"{where}: {text}", stops, twice)


def check_classes(splits: Sequence[Split]) -> Iterator[Finding]:
    """Names that differ between sets, and classes that one kind of set hardly has."""
    if not splits:
        return
    classes = splits[0].classes
    for split in splits[1:]:
        if classes and split.classes and split.classes != classes:
            yield Finding(
                f"{split.role} set {split.name!r} has the classes {', '.join(split.classes)}, "
                f"{splits[0].name!r} has {', '.join(classes)}: wanted the same in the same order",
                stops=True,
            )
            return
    counts = {
        role: Counter(
            item["category_id"]
            for split in splits
            if split.role == role
            for record in split.records
            for item in record.get("annotations", ())
            if not item.get("iscrowd", 0)
        )
        for role in dict.fromkeys(split.role for split in splits)
    }
    few = [
        f"{name} {counts['training'][index]}"
        for index, name in enumerate(classes)
        if "training" in counts and counts["training"][index] < _FEW_OBJECTS
    ]
    if few:
        yield Finding(f"classes with fewer than {_FEW_OBJECTS} training objects", False, few)
    if len(counts) == 2:
        for here, there in (("training", "test"), ("test", "training")):
            only = [
                name
                for index, name in enumerate(classes)
                if counts[here][index] and not counts[there][index]
            ]
            if only:
                yield Finding(f"classes with {here} objects only", False, only)
