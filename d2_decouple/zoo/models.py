# SPDX-License-Identifier: Apache-2.0
"""A model by its name, with weights from a training here, a file or an address."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from yaml import YAMLError

from ..config import find_config, get_config, text_override
from .catalogue import ZooError, shipped, train_command

if TYPE_CHECKING:
    from torch import nn

__all__ = ["TRAINED", "ZooModel", "get", "train", "trained_weights", "zoo_folder"]

_logger = logging.getLogger(__name__)

TRAINED = "trained"
"""The name of the weights that :func:`train` makes."""
_FINAL = "model_final.pth"


class ZooModel(NamedTuple):
    """What :func:`get` answers.

    Attributes:
        config: the recipe, a ``DictConfig``.
        model: the detector, in evaluation mode.
        weights: where its weights were read; empty for random ones.
    """

    config: Any
    model: nn.Module
    weights: str


def get(
    name: str,
    *,
    weights: str | Path = "",
    seed: int = 1,
    overrides: Sequence[str] = (),
    device: str = "",
) -> ZooModel:
    """A recipe and its model.

    Args:
        name: of a recipe, such as ``fcos_R_50_FPN_1x``, or a recipe's file.
        weights: "" leaves the model at random, :data:`TRAINED` takes what was trained on this
            machine (:func:`trained_weights`). Everything else is a file, an address or a name, as
            ``train.init_checkpoint`` takes them; it must fill the whole model.
        seed: of the training that :data:`TRAINED` means.
        overrides: ``key=value`` strings.
        device: where the model is put; by default ``train.device`` of the recipe.

    Raises:
        ConfigError: an unknown name or key, or a device that is not there.
        ZooError: nothing was trained; the message says the command.
        CheckpointError: the weights cannot be had, or are of another model.
    """
    from detectron2.config import instantiate

    from ..checkpoint import Checkpointer
    from ..engine.predictor import torch_device

    source = str(trained_weights(name, seed=seed) if weights == TRAINED else weights)
    config = get_config(name, overrides)
    place = torch_device(device or config.train.device)
    model = instantiate(config.model)
    if source:
        Checkpointer(model, complete=True).load(source)
    return ZooModel(config, model.to(place).eval(), source)


def trained_weights(name: str, *, seed: int = 1) -> Path:
    """The file that a training of a recipe left: of :func:`train`, or of ``tools/bccd_table.py``.

    Looked for in :func:`zoo_folder`, and in ``output/bccd_table`` where you are. A folder's name
    ends in the hash of the config. One with another hash counts if the config that lies in it is
    the recipe's all the same, but for options of ``train`` and ``dataloader`` that came later.

    Raises:
        ZooError: there is none.
    """
    folders = list(_folders(name, seed))
    for folder in (*folders, *_like(folders)):
        if (folder / _FINAL).is_file():
            return folder / _FINAL
    source = _source(name)
    how = (
        f"type {train_command(source, seed)}"
        if _is_small(source)
        else f"train it by python -m d2_decouple.train --config-file {source} --num-gpus 8"
    )
    raise ZooError(
        f"there are no weights of {name}, seed {seed}: neither "
        + " nor ".join(str(folder / _FINAL) for folder in folders)
        + f"; {how}, or give a file or an address as weights"
    )


def train(name: str, *, seed: int = 1) -> Path:
    """Train a model of the small-data experiment into :func:`zoo_folder`; a second call goes on.

    BCCD is looked for in $DETECTRON2_DATASETS.

    Returns:
        The file of its weights.

    Raises:
        ZooError: it is no model of that experiment, or its training failed.
    """
    from ..train import main

    source = _source(name)
    if not _is_small(source):
        raise ZooError(
            f"{name} is not of the small-data experiment, whose names end like "
            f"fcos_R_18_FPN_bccd: type python -m d2_decouple.train --config-file {source}"
        )
    folder = next(_folders(name, seed))
    command = ["--config-file", source, "--resume", f"train.seed={seed}"]
    status = main([*command, text_override("train.output_dir", folder)])
    if status:
        raise ZooError(f"the training of {source} ended with status {status}; its log is {folder}")
    return folder / _FINAL


def zoo_folder() -> Path:
    """Where :func:`train` writes: $D2D_ZOO, or d2_decouple/zoo in the user's cache."""
    if given := os.environ.get("D2D_ZOO"):
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "d2_decouple" / "zoo"


def _folders(name: str, seed: int) -> Iterator[Path]:
    from ..evaluation.runs import config_hash, config_text

    source = _source(name)
    text = config_text(get_config(source, [f"train.seed={seed}"]))
    # The same name that the tool gives, so that either finds what the other has trained.
    folder = f"{source}_seed{seed}_{config_hash(text)}"
    yield zoo_folder() / folder
    yield Path("output", "bccd_table", folder)


def _like(folders: Sequence[Path]) -> Iterator[Path]:
    """Folders of the same recipe and seed, with another hash, whose config does not differ."""
    from ..evaluation.runs import config_changes, config_text

    name, _, seed = folders[0].name.rpartition("_")[0].rpartition("_seed")
    now = config_text(get_config(name, [f"train.seed={seed}"]))
    for folder in folders:
        for found in sorted(folder.parent.glob(f"{name}_seed{seed}_*")):
            kept = found / "config.yaml"
            if not kept.is_file():
                continue
            try:
                changed = config_changes(kept.read_text(encoding="utf-8"), now)
            except (ValueError, YAMLError) as error:
                _logger.warning("%s is passed over, it cannot be read: %s", kept, error)
                continue
            if not {*changed} - {"train.output_dir", "train.device"}:
                yield found


def _source(name: str) -> str:
    """The recipe whose training makes a recipe's weights: mostly itself.

    Raises:
        ZooError: a file of one's own, whose name may be a recipe's all the same.
    """
    from ..evaluation.small_data import ROWS

    stem = shipped(name).stem
    return next((row.weights for row in ROWS if row.recipe == stem and row.weights), stem)


def _is_small(name: str) -> bool:
    return "_bccd" in find_config(name).stem
