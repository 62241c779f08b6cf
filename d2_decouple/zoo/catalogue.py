# SPDX-License-Identifier: Apache-2.0
"""What is known of each recipe: ``table.json``, which ``python -m d2_decouple.zoo update`` makes.

Nothing in that file is typed: papers' numbers come from the tables of the documents, measured ones
from ``results/``, schedules and costs from the recipes. So it can be read from a wheel, too, which
has neither documents nor results.
"""

import json
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..config import config_names, find_config, nearest

__all__ = [
    "TABLE",
    "Costs",
    "Entry",
    "Measured",
    "ZooError",
    "entries",
    "entry",
    "read_table",
    "shipped",
]

TABLE = Path(__file__).with_name("table.json")


class ZooError(ValueError):
    """A model, or weights of it, that there are not; the message says what to type."""


class Costs(NamedTuple):
    """What a model costs.

    Attributes:
        parameters: numbers in the network (an assigner's own are not counted).
        multiply_adds: of one image, from the image to the predictions; of two stages, to the
            detections. Convolutions and matrix products alone.
        image: its height and width in pixels.
    """

    parameters: int
    multiply_adds: int
    image: tuple[int, int]


class Measured(NamedTuple):
    """One run of a model that was measured here.

    Attributes:
        seed: of the training.
        ap: COCO's AP, in percent.
        commit: of this repository.
        command: what makes it again.
    """

    seed: int
    ap: float
    commit: str
    command: str


class Entry(NamedTuple):
    """A model.

    Attributes:
        name: of its recipe.
        config: the recipe's file, as its path below the repository.
        about: what the documents say beside the name; may be empty.
        data: what the numbers are of, such as "COCO val2017".
        paper: what the documents quote of a paper; may be "none".
        paper_ap: the AP in it, if it begins with one.
        iterations: of the training.
        batch: images of an iteration.
        measured: runs, by seed; empty where nothing was run.
        costs: None where they have not been counted.
    """

    name: str
    config: str
    about: str
    data: str
    paper: str
    paper_ap: float | None
    iterations: int
    batch: int
    measured: tuple[Measured, ...]
    costs: Costs | None

    @property
    def measured_ap(self) -> float | None:
        """The mean of the seeds."""
        runs = self.measured
        return sum(run.ap for run in runs) / len(runs) if runs else None


def entries(*, pattern: str = "*", method: str = "", data: str = "") -> list[Entry]:
    """The models, sorted by name.

    Args:
        pattern: of names, with ``*`` and ``?``; without either, a part of a name.
        method: what names begin with: "fcos", "tscode", "decoupled_rcnn", ...
        data: a part of the data's name, in any case: "coco", "bccd", "voc", "test-dev".

    Raises:
        ZooError: no model is left; the message names the nearest.
    """
    if not set(pattern) & set("*?["):
        pattern = f"*{pattern}*"
    everything = [_known(find_config(name)) for name in config_names()]
    found = [
        item
        for item in everything
        if fnmatchcase(item.name, pattern)
        and (not method or item.name.startswith(f"{method}_"))
        and data.lower() in item.data.lower()
    ]
    if found:
        return found
    wanted = {"pattern": pattern, "method": method, "data": data}
    said = ", ".join(f"{key} {value!r}" for key, value in wanted.items() if value not in ("", "*"))
    names = {item.name for item in everything}
    close = nearest(method, {name.partition("_")[0] for name in names}) if method else ""
    raise ZooError(f"no model with {said}; {close or nearest(pattern.strip('*'), names)}")


def entry(name: str) -> Entry:
    """One model.

    Raises:
        ConfigError: there is no such recipe; the message names the nearest.
        ZooError: a file of one's own, whose name may be a recipe's all the same.
    """
    return _known(shipped(name))


def shipped(name: str) -> Path:
    """The file of a recipe of this package; raises as :func:`entry`."""
    file = find_config(name)
    if file.stem not in config_names() or find_config(file.stem).resolve() != file.resolve():
        raise ZooError(
            f"{file} is no recipe of this package, so nothing is known of its training; give its "
            "weights as a file or an address"
        )
    return file


def _known(file: Path) -> Entry:
    name = file.stem
    known = read_table().get(name, {})
    costs = known.get("costs")
    return Entry(
        name=name,
        config=known.get("config", file.name),
        about=known.get("about", ""),
        data=known.get("data", "unknown"),
        paper=known.get("paper", "none"),
        paper_ap=known.get("paper_ap"),
        iterations=known.get("iterations", 0),
        batch=known.get("batch", 0),
        measured=tuple(
            Measured(run["seed"], run["ap"], run["commit"], train_command(name, run["seed"]))
            for run in known.get("measured", [])
        ),
        costs=Costs(costs["parameters"], costs["multiply_adds"], tuple(costs["image"]))
        if costs
        else None,
    )


def train_command(name: str, seed: int = 1) -> str:
    """What trains a model of the small-data experiment."""
    return f"python -m d2_decouple.zoo train {name}" + (f" --seed {seed}" if seed != 1 else "")


@cache
def read_table() -> dict[str, dict[str, Any]]:
    """``table.json``: by recipe, what there is to know of it.

    Raises:
        ZooError: it is missing or damaged.
    """
    try:
        table: dict[str, dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ZooError(
            f"{TABLE} cannot be read ({error}); in a checkout, type python -m d2_decouple.zoo "
            "update; else install d2-decouple again"
        ) from error
    return table
