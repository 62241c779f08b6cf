# SPDX-License-Identifier: Apache-2.0
"""Files of weights: read without running code from them, written whole or not at all."""

import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError, DamagedCheckpointError
from .foreign import check_tensors, check_torch_file

__all__ = ["read_torch_file", "reading", "write_whole"]

# Unpickling a damaged file may raise nearly anything: bytes are read as opcodes, names and sizes.
_DAMAGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)
_LONGEST = 2000  # letters; names in a damaged file may be as long as the file


@contextmanager
def reading(filename: str) -> Iterator[None]:
    """Turn whatever a damaged file raises inside the block into DamagedCheckpointError."""
    try:
        yield
    except _DAMAGED as error:
        raise DamagedCheckpointError(
            f"{filename} cannot be read as a checkpoint: it is damaged, cut off, or holds "
            f"more than tensors ({str(error)[:_LONGEST]}); save or copy it again"
        ) from error


def read_torch_file(filename: str) -> dict[str, Any]:
    """The dict that ``torch.save`` wrote: tensors and plain containers only, on the CPU.

    A file from elsewhere must not run code, nor take more memory than it is long, so one that
    holds other objects, is packed, or has tensors of 1 GiB more than the file is refused.

    Raises:
        DamagedCheckpointError: the file is no such file, or only a part of one.
    """
    with reading(filename):
        check_torch_file(filename)
        loaded = torch.load(filename, map_location="cpu", weights_only=True)
        check_tensors(loaded)
    if not isinstance(loaded, dict):
        raise DamagedCheckpointError(
            f"{filename} holds a {type(loaded).__name__}; wanted is a dict of tensors by "
            "name, or one with such a dict under 'model'"
        )
    return loaded


def write_whole(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file beside ``path`` and put it in its place when it is complete on the disk.

    Args:
        path: of the file; its folder exists.
        write: is called with the open binary file.

    Raises:
        CheckpointError: it could not be written; an older file of that name is as it was.
    """
    unfinished = path.with_name(path.name + ".tmp")
    try:
        # What a killed process left, or a link that somebody put there: through it another file
        # would be written. "x" makes a new file or none.
        unfinished.unlink(missing_ok=True)
        with open(unfinished, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        if hasattr(os, "O_DIRECTORY"):  # the new name, too, shall outlive a power cut
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into the latter
        try:
            unfinished.unlink(missing_ok=True)
            room = f"{shutil.disk_usage(path.parent).free / 2**20:.0f} MiB are free there"
        except OSError as other:  # the folder itself is gone, or is none
            room = f"nothing can be written there: {other.strerror}"
        raise CheckpointError(
            f"{path} could not be written ({error}; {room}). Files written before are whole: make "
            "room and try again; a training goes on with --resume"
        ) from error
