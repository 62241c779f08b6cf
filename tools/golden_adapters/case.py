# SPDX-License-Identifier: Apache-2.0
"""What a case is: its two files as they are read, and how its kind is compared."""

import json
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Adapter", "Case", "GoldenError", "load_case", "read_json", "require"]


class GoldenError(ValueError):
    """A case that cannot be compared; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Case:
    """One case as its two files describe it."""

    path: Path
    kind: str
    seed: int
    config: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, Any]]
    outputs: Mapping[str, Mapping[str, Any]]
    weight_entries: list[tuple[str, list[int], float, float]]
    arrays: Mapping[str, np.ndarray]

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The input ``name``, in ``dtype`` if that is given."""
        return torch.as_tensor(self.array(name, self.inputs[name])).to(dtype=dtype)

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The parameters by their names in the reference implementation."""
        return {
            name: torch.as_tensor(self._draw(name, shape, scale, offset)).to(dtype)
            for name, shape, scale, offset in self.weight_entries
        }

    def array(self, name: str, entry: Mapping[str, Any]) -> np.ndarray:
        """The numbers that an entry of ``inputs`` or ``outputs`` stands for."""
        if "value" in entry:
            return np.asarray(entry["value"])
        if "rule" in entry:
            require(self.path, f"rule of {name!r}", entry["rule"], ("crc32-pcg64",))
            transform = entry.get("transform", "identity")
            require(self.path, f"transform of {name!r}", transform, TRANSFORMS)
            drawn = self._draw(entry["name"], entry["shape"], entry["scale"], entry["offset"])
            return TRANSFORMS[transform](drawn)
        key = entry["npz"]
        require(self.path.with_suffix(".npz"), f"array of {name!r}", key, self.arrays)
        if list(self.arrays[key].shape) != list(entry["shape"]):
            raise GoldenError(
                f"{self.path}: {name!r} shall have shape {entry['shape']}, the array {key!r} has "
                f"{list(self.arrays[key].shape)}"
            )
        return self.arrays[key]

    def _draw(self, name: str, shape: list[int], scale: float, offset: float) -> np.ndarray:
        generator = np.random.Generator(np.random.PCG64(self.seed ^ zlib.crc32(name.encode())))
        return np.asarray(offset + scale * generator.standard_normal(shape))


TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


def require(path: Path, what: str, got: str, known: Collection[str]) -> None:
    """Refuse a name that is not among the known ones."""
    if got not in known:
        raise GoldenError(f"{path}: {what} is {got!r}; known are {sorted(known)}")


def load_case(path: Path) -> Case:
    """Read ``NAME.json`` and the ``NAME.npz`` beside it.

    Raises:
        GoldenError: one of them is missing or damaged.
    """
    header = read_json(path)
    weights = header["weights"]
    if weights["entries"]:
        require(path, "rule of the weights", weights["rule"], ("crc32-pcg64",))
    return Case(
        path=path,
        kind=header["kind"],
        seed=header["seed"],
        config=header["config"],
        inputs=header["inputs"],
        outputs=header["outputs"],
        weight_entries=weights["entries"],
        arrays=_read_arrays(path.with_suffix(".npz")),
    )


def read_json(path: Path) -> Mapping[str, Any]:
    """Read ``NAME.json``; a key that is missing anywhere in it is an error that names it."""

    class Section(dict[str, Any]):
        def __missing__(self, key: str) -> Any:
            raise GoldenError(f"{path}: no {key!r} where one is needed; there are {sorted(self)}")

    try:
        header = json.loads(path.read_text(encoding="utf-8"), object_hook=Section)
    except (OSError, ValueError) as error:
        raise GoldenError(f"{path}: damaged or not readable: {error}") from error
    if not isinstance(header, Section):
        raise GoldenError(f"{path}: damaged, an object with the key 'kind' is wanted")
    return header


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise GoldenError(f"{path}: missing; {path.stem}.json needs it")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise GoldenError(f"{path}: damaged or not readable: {error}") from error


class Adapter(NamedTuple):
    """How a kind is compared: what runs it, and why some of its outputs are left out."""

    run: Callable[[Case, torch.dtype], Mapping[str, Tensor]]
    not_compared: tuple[tuple[str, str], ...] = ()  # (pattern of output names, reason)

    def left_out(self, output: str) -> str | None:
        """Why an output is not compared; None if it is."""
        reasons = (why for pattern, why in self.not_compared if fnmatchcase(output, pattern))
        return next(reasons, None)
