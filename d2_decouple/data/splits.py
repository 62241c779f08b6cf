# SPDX-License-Identifier: Apache-2.0
"""What folders of labelled images call their splits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["SPLIT_WORDS", "WHOLE", "split_folders"]

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "trainval": "trainval",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
WHOLE = "all"
"""A set without a word for its split."""


def split_folders(folder: Path) -> Iterator[tuple[str, Path]]:
    """The folders in ``folder`` whose names are those of splits, sorted by name."""
    for place in sorted(folder.iterdir()):
        split = SPLIT_WORDS.get(place.name.lower())
        if split and place.is_dir():
            yield split, place
