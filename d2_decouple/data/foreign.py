# SPDX-License-Identifier: Apache-2.0
"""Reading files that somebody else wrote: so many bytes and no more, and messages that stay short.

What is read here may be made to do harm: to fill the memory, to stop the program, to be led to
another file. What a reader makes of the content is its own affair.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import stat
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from .loader import DataError

__all__ = [
    "ANNOTATION_MIB",
    "COCO_MIB",
    "IMAGE_MIB",
    "LARGEST_SIDE",
    "SIZE_VARIABLE",
    "brief",
    "read_json",
    "read_limited",
    "read_lines",
    "read_plain_yaml",
    "too_large",
    "unusable_name",
]

SIZE_VARIABLE = "D2D_MAX_FILE_MIB"
"""Environment variable: read files of so many MiB, of whatever kind."""
ANNOTATION_MIB = 16  # of one image, or a list of images: 16 MiB are 50,000 objects in VOC's format
COCO_MIB = 1536  # LVIS, the largest set in common use, has 1.1 GiB
IMAGE_MIB = 1024
_YAML_MIB = 1
_YAML_DEPTH = 32
_LONGEST_NUMBER = 128  # bits
LARGEST_SIDE = 2**31 - 1  # pixels; no format of images can say more
_HEAD = 4096
_LONGEST_NAME = 250  # bytes; file systems take 255, and a suffix may be added
_LONGEST_PATH = 1024


def too_large(size: int, limit_mib: int) -> str:
    """Why a file of ``size`` bytes is not read, and what to type; empty if it is.

    Raises:
        DataError: the environment variable ``D2D_MAX_FILE_MIB`` is no number.
    """
    text = os.environ.get(SIZE_VARIABLE, "").strip()
    if text and not (text.isascii() and text.isdigit() and int(text)):
        raise DataError(
            f"{SIZE_VARIABLE} is {text!r}, wanted a whole number of MiB, such as 4096; or unset it"
        )
    limit = int(text) if text else limit_mib
    if size <= limit * 2**20:
        return ""
    wanted = math.ceil(size / 2**20)
    return (
        f"it has {wanted} MiB, and at most {limit} MiB are read of such a file; if it is what you "
        f"mean and the memory suffices, type: export {SIZE_VARIABLE}={wanted}"
    )


def read_limited(file: Path, limit_mib: int) -> bytes:
    """The content of a regular file.

    Raises:
        DataError: it is a pipe or a device, or larger than ``limit_mib``.
        OSError: it is missing, a folder, or must not be read.
    """
    with _opened(file, limit_mib) as stream:
        return _rest(stream, file)


def read_lines(file: Path, *, strict: bool = False) -> list[str]:
    """The lines of a small text file.

    Args:
        file: its path.
        strict: refuse bytes that are not UTF-8, which become question marks else.

    Raises:
        DataError: as :func:`read_limited`, and with ``strict`` for another encoding.
    """
    content = read_limited(file, ANNOTATION_MIB)
    try:
        text = content.decode("utf-8-sig", errors="strict" if strict else "replace")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 (byte {error.start} is {content[error.start]:#04x}): save it "
            "with that encoding"
        ) from error
    return text.splitlines()


def read_json(file: Path, limit_mib: int = COCO_MIB) -> Any:
    """The content of a JSON file, whose first bytes are looked at before the others are read.

    Raises:
        DataError: it is no JSON, nested too deeply, or cannot be read as :func:`read_limited` says.
    """
    with _opened(file, limit_mib) as stream:
        head = stream.read(_HEAD)
        _refuse_other_than_json(head, file)
        content = head + _rest(stream, file)
    del head
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"cannot read {file} as JSON ({error}); export it again") from error


def read_plain_yaml(file: Path) -> Any:
    """The content of a small yaml file of plain values.

    Aliases (``*name``) are refused: a few lines of them stand for more values than fit into any
    memory. So are deep nesting, and numbers that Python refuses to write.

    Raises:
        DataError: it is no such file, or cannot be read as :func:`read_limited` says.
    """
    content = read_limited(file, _YAML_MIB)
    try:
        return yaml.load(content.decode("utf-8-sig"), Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        # The last three: dates, numbers and escapes that cannot be.
        raise DataError(f"cannot read {file} as yaml: {error}; correct it") from error


def brief(value: Any) -> str:
    """``repr`` that stays short, however large, deep or self-containing the value is."""
    return _BRIEF.repr(value)


def unusable_name(name: str) -> str:
    """Why no file can have this name on all systems; empty if one can."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return "it holds half of a character"
    if any(byte < 32 for byte in encoded):
        return "it holds a control character"
    if len(encoded) > _LONGEST_PATH or max(map(len, encoded.split(b"/"))) > _LONGEST_NAME:
        return f"names have at most {_LONGEST_NAME} bytes, paths {_LONGEST_PATH}"
    return ""


class _Brief(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 120, 80
        self.maxlist = self.maxtuple = self.maxset = 8
        self.maxdict = 8

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write numbers of some thousand digits.
        return f"a number of {x.bit_length()} bits" if x.bit_length() > _LONGEST_NUMBER else repr(x)


_BRIEF = _Brief()


class _PlainLoader(yaml.SafeLoader):
    """Refuses aliases and depth where they are met, before anything is made of them."""

    _depth = 0

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (AttributeError, LookupError) as error:  # of a tag such as in "!!bool x"
            what = f"{brief(node.value)} is nothing for the tag {node.tag[:80]}"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from error

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"the alias *{event.anchor} is not followed", event.start_mark
            )
        self._depth += 1
        if self._depth > _YAML_DEPTH:
            raise yaml.composer.ComposerError(
                None, None, f"more than {_YAML_DEPTH} levels", self.peek_event().start_mark
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _small_number(loader: _PlainLoader, node: yaml.ScalarNode) -> int:
    number: int = loader.construct_yaml_int(node)
    if number.bit_length() > _LONGEST_NUMBER:
        raise yaml.constructor.ConstructorError(None, None, brief(number), node.start_mark)
    return number


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _small_number)


def _opened(file: Path, limit_mib: int) -> BinaryIO:
    # A pipe would be waited for, so that it is asked what the file is before it is opened.
    status = file.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise DataError(f"{file} is no regular file; put the file itself there")
    if reason := too_large(status.st_size, limit_mib):
        raise DataError(f"{file} is not read: {reason}")
    return file.open("rb")


def _rest(stream: BinaryIO, file: Path) -> bytes:
    """What is left of a file, up to the size whose limit was looked at."""
    size = os.fstat(stream.fileno()).st_size
    content = stream.read(size + 1)
    if stream.tell() > size:  # also of /proc, where files have no size
        raise DataError(
            f"{file} has more than the {size} bytes that its size says; type the command again "
            "when nothing writes to it"
        )
    return content


def _refuse_other_than_json(head: bytes, file: Path) -> None:
    """Raise DataError for what is no JSON at first sight, so that its rest is not even read."""
    text = head.decode(json.detect_encoding(head), errors="ignore").lstrip("\ufeff \t\r\n")
    if not text:  # blanks, or nothing
        return
    if "\0" in text or text[0] not in '{["-0123456789tfnNI':
        raise DataError(
            f"cannot read {file} as JSON (it begins with {brief(text[:20])}); export it again"
        )
