# SPDX-License-Identifier: Apache-2.0
"""Notebooks as pages: what is written, run and printed in them, without running it again."""

import base64
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["notebook_page"]

_PICTURES = {"image/png": ".png", "image/jpeg": ".jpg"}
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # colours of a terminal


def notebook_page(notebook: Mapping[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """Markdown of a notebook (nbformat 4), and its pictures by file name.

    Args:
        notebook: what its JSON says.
        name: of the notebook's file without its ending; its pictures are called after it.
    """
    parts, pictures = [], dict[str, bytes]()
    for cell in notebook["cells"]:
        source = _text(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source:
            parts.append(_fenced(source, "python"))
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if kind := next((x for x in _PICTURES if x in data), None):
                picture = f"{name}_{len(pictures) + 1}{_PICTURES[kind]}"
                pictures[picture] = base64.b64decode(_text(data[kind]))
                parts.append(f"![Output of the cell above]({picture})")
            elif shown := _printed(output):
                parts.append(_fenced(shown, "text"))
    parts.append(f"[This page as a notebook]({name}.ipynb)")
    return "\n\n".join(parts) + "\n", pictures


def _printed(output: Mapping[str, Any]) -> str:
    """What an output says in words."""
    text = output.get("text") or output.get("data", {}).get("text/plain", "")
    lines = output.get("traceback", ())
    return _ESCAPES.sub("", "\n".join(lines) or _text(text)).strip("\n")


def _text(lines: str | list[str]) -> str:
    """JSON may have a text as its lines."""
    return lines if isinstance(lines, str) else "".join(lines)


def _fenced(text: str, language: str) -> str:
    """A block of code; its fence is longer than any in it."""
    longest = max((len(x) for x in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
