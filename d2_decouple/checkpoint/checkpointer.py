# SPDX-License-Identifier: Apache-2.0
"""Detectron2's checkpointer that counts what fitted, and refuses a file that fits nothing."""

import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer

__all__ = ["CheckpointError", "Checkpointer"]

_logger = logging.getLogger(__name__)
_SHOWN = 6
_KEYS = "train.init_checkpoint (yacs: MODEL.WEIGHTS)"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that belongs to another model."""


class Checkpointer(DetectionCheckpointer):
    """Says in one line how many tensors were loaded and which keep their initial values."""

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """As Detectron2's, with messages for a file that is missing or cannot be fetched."""
        remote = "://" in path
        if path and not remote and not Path(path.partition("?")[0]).is_file():
            raise CheckpointError(f"there is no checkpoint {path}; set {_KEYS} to an existing file")
        try:
            return super().load(path, checkpointables)
        except OSError as error:
            if not remote:
                raise
            raise CheckpointError(
                f"{path} could not be fetched ({error}); without a network, bring the file here "
                f"and set {_KEYS} to it, or to an empty string for random weights"
            ) from error

    def _load_file(self, filename: str) -> dict[str, Any]:
        if not filename.endswith((".pth", ".pt")):
            return super()._load_file(filename)
        # Tensors and plain containers only: a file from elsewhere must not run code here.
        try:
            loaded = torch.load(filename, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
            raise CheckpointError(
                f"{filename} cannot be read as a checkpoint: it is damaged, cut off, or holds "
                f"more than tensors ({error}); save or copy it again"
            ) from error
        return loaded if "model" in loaded else {"model": loaded}

    def _load_model(self, checkpoint: Any) -> Any:
        names = {name.removeprefix("module.") for name in checkpoint["model"]}
        incompatible = super()._load_model(checkpoint)
        if incompatible is None:  # Detectron2 reports in its own words for matched old formats
            return incompatible
        model = self.model.state_dict()
        misshapen = [key for key, *_ in incompatible.incorrect_shapes]
        # torch does not call a missing counter of batch norm missing.
        counters = {name for name in model if name.endswith("num_batches_tracked")} - names
        fresh = sorted(({*incompatible.missing_keys, *misshapen} & model.keys()) | counters)
        loaded = len(model) - len(fresh)
        if names and not loaded:
            raise CheckpointError(
                f"none of the {len(names)} tensors in the checkpoint fits this model of "
                f"{len(model)}: the file has {_listed(incompatible.unexpected_keys)}, the model "
                f"wants {_listed(fresh)}; give the config that the checkpoint was trained with"
            )
        message = f"Loaded {loaded} of {len(model)} tensors"
        if fresh:
            message += f"; {len(fresh)} keep their initial values: {_listed(fresh)}"
        if misshapen:
            message += f"; of these {len(misshapen)} have another shape in the file"
        if incompatible.unexpected_keys:
            count = len(incompatible.unexpected_keys)
            message += f"; {count} in the file have no place: "
            message += _listed(sorted(incompatible.unexpected_keys))
        _logger.info(message)
        return incompatible


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(list(names)[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
