# SPDX-License-Identifier: Apache-2.0
"""The models of the gallery: their recipes, where their weights lie, and where those come from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint.download import sha256_of
from .config import ConfigError, find_config, nearest
from .evaluation.evaluator import SUMMARY_FILE

__all__ = [
    "ATSS",
    "DECOUPLED_RCNN",
    "FCOS",
    "MODELS",
    "PDNET",
    "SALT",
    "SAPD",
    "SAPD_HARD",
    "TSCODE",
    "Model",
    "Weights",
    "find_weights",
    "given_weights",
    "provenance",
    "training_command",
]

_WEIGHTS = "model_final.pth"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the gallery.

    Attributes:
        title: what it is called in pictures.
        recipe: its config's name, a row of the small-data experiment.
        trained: whether it is shown with trained weights; one without is asked for its rule of
            assignment alone, which is of geometry.
    """

    title: str
    recipe: str
    trained: bool = True


FCOS = Model(title="FCOS", recipe="fcos_R_18_FPN_bccd", trained=False)
ATSS = Model(title="ATSS", recipe="atss_R_18_FPN_bccd")
TSCODE = Model(title="TSCODE on ATSS", recipe="tscode_atss_R_18_FPN_bccd")
PDNET = Model(title="PDNet", recipe="pdnet_R_18_FPN_bccd")
SALT = Model(title="SALT-Net", recipe="salt_R_18_FPN_bccd")
SAPD_HARD = Model(title="SAPD's baseline", recipe="sapd_R_18_FPN_bccd_baseline")
SAPD = Model(title="SAPD", recipe="sapd_R_18_FPN_bccd_nobfp")
DECOUPLED_RCNN = Model(title="Decoupled R-CNN", recipe="decoupled_rcnn_R_18_FPN_bccd")

MODELS = (FCOS, ATSS, TSCODE, PDNET, SALT, SAPD_HARD, SAPD, DECOUPLED_RCNN)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a model is built from.

    Attributes:
        config: a recipe's name, or a config file.
        file: the checkpoint; None for a model that is shown without trained weights.
        seed: of the training, or None where a checkpoint was named and its seed is not known.
    """

    config: str
    file: Path | None
    seed: int | None


def given_weights(pairs: Sequence[tuple[str, str]]) -> dict[str, Weights]:
    """What ``--model RECIPE FILE`` says, by the recipe's name.

    Args:
        pairs: a recipe's name, or a config file that is called as the recipe; and a checkpoint.

    Raises:
        ConfigError: no model of the gallery has such a recipe, or it is given twice.
        FileNotFoundError: there is no such checkpoint.
    """
    recipes = [model.recipe for model in MODELS]
    found: dict[str, Weights] = {}
    for config, file in pairs:
        recipe = find_config(config).stem
        if recipe not in recipes:
            raise ConfigError(
                f"--model {config}: the gallery shows no such recipe; {nearest(recipe, recipes)}"
            )
        if recipe in found:
            raise ConfigError(f"--model {config} is given twice; give one checkpoint of it")
        if not Path(file).is_file():
            raise FileNotFoundError(f"--model {config} {file}: there is no such checkpoint")
        found[recipe] = Weights(config=config, file=Path(file), seed=None)
    return found


def find_weights(
    model: Model, given: Mapping[str, Weights], folders: Sequence[Path], seed: int
) -> Weights | None:
    """The weights of a model: the given ones, else those of its training in one of the folders.

    Args:
        model: of the gallery.
        given: by :func:`given_weights`.
        folders: that hold ``RECIPE_seedN_HASH/model_final.pth``, as ``tools/bccd_table.py``
            leaves them.
        seed: N.

    Returns:
        None where there are none.

    Raises:
        ConfigError: there are several trainings of the recipe and seed.
    """
    if model.recipe in given:
        return given[model.recipe]
    if not model.trained:
        return Weights(config=model.recipe, file=None, seed=None)
    pattern = f"{model.recipe}_seed{seed}_*/{_WEIGHTS}"
    files = [
        file
        for folder in folders
        for file in sorted(folder.glob(pattern))
        # The recipe's name and the seed are followed by the config's hash alone.
        if "_" not in file.parent.name.removeprefix(f"{model.recipe}_seed{seed}_")
    ]
    if len(files) > 1:
        raise ConfigError(
            f"{model.recipe} was trained {len(files)} times with seed {seed}: {files[0]} and "
            f"{files[1]}; say which by --model {model.recipe} FILE"
        )
    return Weights(config=model.recipe, file=files[0], seed=seed) if files else None


def training_command(models: Sequence[Model], seed: int) -> str:
    """What trains some models, and leaves their weights in ``output/bccd_table``."""
    recipes = ",".join(model.recipe for model in models)
    return (
        "python tools/bccd_table.py --data datasets/BCCD "
        f"--only {recipes} --seeds {seed} --no-table"
    )


def provenance(model: Model, weights: Weights, results: Path) -> tuple[str, str, str, str]:
    """Where weights come from, for a table: seed, AP, commit of the training, their SHA-256.

    AP is what the training measured at its end on BCCD's test set. The commit is that of the kept
    result (``results/bccd``) with the same seed and AP: of this very training, then.
    """
    if weights.file is None:
        return "–", "–", "–", "none: it assigns by geometry alone"
    digest = sha256_of(weights.file)[:12]
    average = _average_precision(weights.file.parent / SUMMARY_FILE)
    if average is None or weights.seed is None or weights.file.name != _WEIGHTS:
        return str(weights.seed or "unknown"), "unknown", "unknown", f"`{digest}`"
    kept = _json(results / f"{model.recipe}_seed{weights.seed}.json")
    commit = "unknown"
    if kept.get("metrics", {}).get("AP") == average:
        commit = f"`{str(kept['commit']['id'])[:7]}`"
    return str(weights.seed), f"{average:.1f}", commit, f"`{digest}`"


def _average_precision(file: Path) -> float | None:
    value = _json(file).get("metrics", {}).get("AP")
    return float(value) if value is not None else None


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
