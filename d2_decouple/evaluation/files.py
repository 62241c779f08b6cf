# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all, and documents of which a part is made."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["put_between", "write_json", "write_text"]


def write_json(file: Path, content: Any, *, indent: int | None = None) -> None:
    """Replace the file; numbers that JSON does not have (NaN) are refused with ValueError."""
    separators = (",", ":") if indent is None else None
    text = json.dumps(content, indent=indent, separators=separators, allow_nan=False)
    write_text(file, text + "\n")


def write_text(file: Path, text: str) -> None:
    """Replace the file, or leave the old one as it is where that fails."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        unfinished.unlink(missing_ok=True)  # it may be a link, and lead to another file
        with open(unfinished, "x", encoding="utf-8") as output:
            output.write(text)
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def put_between(text: str, start: str, end: str, content: str) -> str | None:
    """A document's text with ``content`` between the first ``start`` and the next ``end``.

    Returns:
        None if it lacks one of these markers.
    """
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    return f"{before}{start}{content}{end}{after}" if found and closed else None
