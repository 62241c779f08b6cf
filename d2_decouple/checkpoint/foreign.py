# SPDX-License-Identifier: Apache-2.0
"""Files of weights from somebody else: what is looked at before they are read, and after.

torch's reader of plain weights runs no code, but a file of some bytes may ask it for any amount of
memory. Of Detectron2's pickles only arrays of numbers are made, and these by our own hands: numpy
would make an array of objects out of any bytes.
"""

import io
import os
import pickle
import pickletools
import re
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["check_tensors", "check_torch_file", "check_weights", "read_arrays"]

# What a pickle of weights, optimizers and schedules names, of what torch would call for it.
_NAMED = re.compile(
    r"(__builtin__|builtins) (set|complex)"
    r"|_codecs encode"
    r"|collections (OrderedDict|Counter)"
    r"|torch ([A-Z][A-Za-z]*(16)?Storage|Size|device|bool|b?u?(int|float|complex)\d+)"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
    r"|torch\.nn\.parameter Parameter"
)
_ZIP = b"PK\x03\x04"
_OLD_PICKLES = 5  # in a file of torch before 1.6: magic number, protocol, system, content, keys
_SPARE = 2**30  # bytes that tensors may have beyond the file: some repeat a number to save room
_ENTRY = 100  # bytes that a dict takes for a key and a value
_CALL = 1000  # bytes that a tensor takes without its numbers
_NUMBERS = re.compile(r"[biufc]\d{1,2}")


def check_torch_file(filename: str) -> None:
    """Look at a file of ``torch.save`` before it is read.

    Raises:
        pickle.UnpicklingError: it names something that is no part of weights and the state of a
            training, or it could fill the memory: its archive is packed, or what it calls would
            take 1 GiB more than the file.
        ValueError, zipfile.BadZipFile, EOFError, OSError: it is damaged.
    """
    with open(filename, "rb") as file:
        is_zip = file.read(len(_ZIP)) == _ZIP
        if not is_zip:
            if tarfile.is_tarfile(filename):  # torch before 2.6 runs code from these
                raise pickle.UnpicklingError("it is a tar archive; save it with a newer torch")
            file.seek(0)
            for _ in range(_OLD_PICKLES):
                begin = file.tell()
                _check_names(file)
                end = file.tell()
                file.seek(begin)
                _Rehearsal(file.read(end - begin)).load()
            return
    with zipfile.ZipFile(filename) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise pickle.UnpicklingError("it was packed, which torch.save never does")
        names = {entry.filename for entry in entries}
        whole = sum(entry.file_size for entry in entries)
        if len(names) < len(entries) or whole > os.path.getsize(filename):
            raise pickle.UnpicklingError("parts of it are there twice, or lie over each other")
        for entry in entries:
            # torch takes DATA.PKL for data.pkl. Newer Pythons may have another filename of it.
            if entry.orig_filename.lower().endswith(".pkl"):
                content = archive.read(entry)
                _check_names(io.BytesIO(content))
                _Rehearsal(content).load()


def _check_names(stream: BinaryIO | io.BytesIO) -> None:
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "GLOBAL" and not _NAMED.fullmatch(str(argument)):
            name = str(argument).replace(" ", ".")[:80]
            raise pickle.UnpicklingError(f"it names {name}, which is no part of weights")


# Python's own: the one in C makes room for two thousand million objects if a file numbers one so.
class _Careful(pickle._Unpickler):
    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")
        # A sound file has each number once, as text that is encoded and then copied.
        self._room = 2 * len(content) + _SPARE

    def take(self, size: int) -> None:
        """Count bytes that are about to be copied: one that is named again is copied again."""
        self._room -= size
        if self._room < 0:
            raise pickle.UnpicklingError(
                f"what it holds would take {_SPARE / 2**20:.0f} MiB more than the file has"
            )

    def load_bytearray8(self) -> None:
        # Python's own makes room for as many bytes as the file claims; numpy writes none of these.
        raise pickle.UnpicklingError("it holds a bytearray, wanted arrays of numbers")

    dispatch: ClassVar[Any] = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8}


class _Rehearsal(_Careful):
    """Reads what torch is about to read, with nothing in the place of what that calls.

    A call may copy what it is given, and takes five bytes of a file: text of 1 MiB that is encoded
    two thousand times fills 2 GiB.
    """

    def find_class(self, module: str, name: str) -> Any:
        return _Nothing(self.take)

    def persistent_load(self, pid: Any) -> Any:
        return _Nothing(self.take)

    def load_newobj(self) -> None:
        arguments = self.stack.pop()  # type: ignore[attr-defined]
        self.stack[-1] = self.stack[-1](*arguments)  # type: ignore[attr-defined]

    dispatch: ClassVar[Any] = {**_Careful.dispatch, pickle.NEWOBJ[0]: load_newobj}


class _Nothing:
    """What is called, and what it gives: of this it is known how many items it has at most."""

    def __init__(self, take: Callable[[int], None], items: int = 0) -> None:
        self._take, self._items = take, items

    def __call__(self, *arguments: Any) -> Any:
        given = [x for x in arguments if isinstance(x, Sized)]
        self._take(_CALL + sum(len(x) * (1 if isinstance(x, str) else _ENTRY) for x in given))
        return _Nothing(self._take, sum(map(len, given)))

    def __len__(self) -> int:
        return self._items

    def __setitem__(self, key: Any, value: Any) -> None:
        self._items += 1

    def append(self, value: Any) -> None:
        self._items += 1

    def __setstate__(self, state: Any) -> None:
        self(state)  # an OrderedDict takes a copy of it


def check_tensors(content: Any) -> None:
    """Compare what tensors say of their size with the numbers that they have, after reading.

    A number that is repeated along an axis takes four bytes of the file, and any amount of memory
    as soon as somebody computes with it.

    Raises:
        pickle.UnpicklingError: together they have 1 GiB more than the file, or hold no numbers.
    """
    surplus, seen, waiting = 0, set(), [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise pickle.UnpicklingError("a tensor in it is sparse, quantised or empty-handed")
            stored = value.untyped_storage().nbytes()
            surplus += max(0, value.numel() * value.element_size() - stored)
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += [*value.values()] if isinstance(value, Mapping) else value
    if surplus > _SPARE:
        raise pickle.UnpicklingError(
            f"its tensors would take {surplus / 2**20:.0f} MiB more than the file has"
        )


def check_weights(content: Mapping[str, Any]) -> None:
    """What a checkpointer relies on: tensors by name, and names of classes if there are any.

    Raises:
        TypeError: the first thing that is something else.
    """
    for part in ("model", "ema"):
        state = content.get(part, {})
        if not isinstance(state, Mapping):
            raise TypeError(f"{part} is a {type(state).__name__}, wanted tensors by name")
        for name, value in state.items():
            if not isinstance(name, str) or not isinstance(value, Tensor | np.ndarray):
                what = f"{part} has a {type(value).__name__} under {str(name)[:80]!r}"
                raise TypeError(f"{what}, wanted tensors by name")
    if content.get("matching_heuristics") and not content.get("model"):
        raise TypeError("it has no tensors")  # which Detectron2 could compare names with
    classes = content.get("classes") or ()
    if not isinstance(classes, list | tuple) or not all(isinstance(x, str) for x in classes):
        raise TypeError(f"classes is a {type(classes).__name__}, wanted a list of names")


def read_arrays(filename: str) -> dict[Any, Any]:
    """The content of a pickle of numpy arrays in plain containers, as Detectron2's models are.

    Raises:
        pickle.UnpicklingError: it holds anything else; and whatever a damaged file raises.
    """
    # From memory, so that a length that the file only claims is not made room for.
    content = _plain(_Arrays(Path(filename).read_bytes()).load(), {})
    if not isinstance(content, dict):
        raise pickle.UnpicklingError(f"it holds a {type(content).__name__}, wanted arrays by name")
    return content


class _Arrays(_Careful):
    def find_class(self, module: str, name: str) -> Any:
        made = _made(re.sub(r"^numpy\._?core\.", "numpy.", module), name, self.take)
        if made is None:
            raise pickle.UnpicklingError(f"{module}.{name} is not an array")
        return made


def _made(module: str, name: str, take: Callable[[int], None]) -> Any:
    """What stands for a name in a pickle; new each time, since a pickle may write upon it."""

    def reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
        return _Array(take)

    def number(kind: _Kind, content: Any = b"") -> Any:
        return np.frombuffer(_bytes(content), kind.dtype)[0]

    def encoded(text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"text in it is in {encoding[:20]!r}, wanted latin1")
        take(len(text))
        return text.encode("latin1")

    def kind(code: Any, align: Any = False, copy: Any = False) -> _Kind:
        return _Kind(code)

    def ordered(items: Any = ()) -> OrderedDict[Any, Any]:
        take(_ENTRY * len(items))
        return OrderedDict(items)

    def empty() -> bytes:
        return b""

    known: dict[tuple[str, str], Any] = {
        ("__builtin__", "bytes"): empty,
        ("_codecs", "encode"): encoded,
        ("collections", "OrderedDict"): ordered,
        ("numpy", "dtype"): kind,
        ("numpy", "ndarray"): "an array",
        ("numpy.multiarray", "_reconstruct"): reconstruct,
        ("numpy.multiarray", "scalar"): number,
    }
    return known.get((module, name))


class _Kind:
    """The type of an array's numbers, of which a pickle may choose the byte order alone."""

    def __init__(self, code: Any) -> None:
        code = code.decode("latin1") if isinstance(code, bytes) else code
        if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
            raise pickle.UnpicklingError(f"an array of {str(code)[:20]!r}, wanted numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        _, order, *fields = state
        if any(field is not None for field in fields[:3]):
            raise pickle.UnpicklingError("an array of records, wanted numbers")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """An array that is being read."""

    array = np.zeros(0)

    def __init__(self, take: Callable[[int], None]) -> None:
        self._take = take

    def __setstate__(self, state: Any) -> None:
        *_, shape, kind, by_columns, content = state
        if not isinstance(kind, _Kind):
            raise pickle.UnpicklingError("an array without a type of its numbers")
        flat = np.frombuffer(_bytes(content), kind.dtype)
        self._take(flat.nbytes)
        self.array = flat.reshape(shape, order="F" if by_columns else "C").copy()


def _bytes(content: Any) -> bytes:
    if isinstance(content, str):
        return content.encode("latin1")
    if not isinstance(content, bytes):  # of a number Python would make that many zeros
        raise pickle.UnpicklingError(f"an array's numbers are a {type(content).__name__}")
    return content


def _plain(value: Any, made: dict[int, Any]) -> Any:
    """A copy with arrays in place of what stands for them; each container is copied once."""
    if isinstance(value, _Array):
        return value.array
    if not isinstance(value, dict | list | tuple):
        return value
    if id(value) in made:
        return made[id(value)]
    if isinstance(value, dict):
        new: Any = {}
        made[id(value)] = new
        # Not value.items(): a pickle may have put something of that name there.
        new.update((key, _plain(item, made)) for key, item in dict.items(value))
    elif isinstance(value, list):
        new = []
        made[id(value)] = new
        new.extend(_plain(item, made) for item in value)
    else:
        new = tuple(_plain(item, made) for item in value)
        made[id(value)] = new
    return new
