# SPDX-License-Identifier: Apache-2.0
"""Detectron2's checkpointer that counts what fitted, and refuses a file that fits nothing."""

import logging
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

__all__ = ["CheckpointError", "Checkpointer"]

_logger = logging.getLogger(__name__)
_SHOWN = 6
_KEYS = "train.init_checkpoint (yacs: MODEL.WEIGHTS)"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that belongs to another model."""


class Checkpointer(DetectionCheckpointer):
    """Says in one line how many tensors were loaded and which keep their initial values."""

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        complete: bool = False,
        extras: Mapping[str, Any] | None = None,
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            model: what is loaded and saved.
            save_dir: where :meth:`save` writes.
            complete: refuse a file that leaves some tensor at its initial value (evaluation).
            extras: plain values stored with the weights, such as class names.
            checkpointables: further objects with ``state_dict``, such as a trainer.
        """
        super().__init__(model, save_dir, **checkpointables)
        self._complete, self._extras = complete, dict(extras or {})

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name``.pth: weights, the state of what is checkpointed, and the extras."""
        super().save(name, **{**self._extras, **kwargs})

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
        # Tensors, arrays and plain containers only: a file from elsewhere must not run code.
        try:
            if filename.endswith(".pkl"):
                with open(filename, "rb") as file:
                    _PlainUnpickler(file, encoding="latin1").load()
                return super()._load_file(filename)
            loaded = torch.load(filename, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
            raise CheckpointError(
                f"{filename} cannot be read as a checkpoint: it is damaged, cut off, or holds "
                f"more than tensors ({error}); save or copy it again"
            ) from error
        if not isinstance(loaded, dict):
            raise CheckpointError(
                f"{filename} holds a {type(loaded).__name__}; wanted is a dict of tensors by "
                "name, or one with such a dict under 'model'"
            )
        return loaded if isinstance(loaded.get("model"), dict) else {"model": loaded}

    def _load_model(self, checkpoint: Any) -> Any:
        file = {name.removeprefix("module."): x for name, x in checkpoint["model"].items()}
        incompatible = super()._load_model(checkpoint)
        if incompatible is None:  # Detectron2 reports in its own words for matched old formats
            return incompatible
        model = self.model.state_dict()
        # torch does not call a missing counter of batch norm missing.
        counters = {name for name in model if name.endswith("num_batches_tracked")} - file.keys()
        misshapen = [name for name, *_ in incompatible.incorrect_shapes]
        fresh = sorted(({*incompatible.missing_keys, *misshapen} & model.keys()) | counters)
        loaded = len(model) - len(fresh)
        if file and not loaded:
            raise CheckpointError(
                f"none of the {len(file)} tensors in the checkpoint fits this model of "
                f"{len(model)}: the file has {_listed(incompatible.unexpected_keys)}, the model "
                f"wants {_listed(fresh)}; give the config that the checkpoint was trained with"
            )
        named = [_with_shapes(name, file, model) for name in fresh]
        if self._complete and fresh:
            raise CheckpointError(
                f"{len(fresh)} of {len(model)} tensors would keep random values in this "
                f"evaluation: {_listed(named)}; give the config that the checkpoint was trained "
                "with (another first number of cls_score is another number of classes)"
            )
        message = f"Loaded {loaded} of {len(model)} tensors"
        if fresh:
            message += f"; {len(fresh)} keep their initial values: {_listed(named)}"
        if incompatible.unexpected_keys:
            count = len(incompatible.unexpected_keys)
            message += f"; {count} in the file have no place: "
            message += _listed(sorted(incompatible.unexpected_keys))
        _logger.info(message)
        return incompatible


class _PlainUnpickler(pickle.Unpickler):
    """Refuses everything but NumPy arrays in plain containers."""

    _ALLOWED = frozenset(
        {
            ("_codecs", "encode"),
            ("collections", "OrderedDict"),
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            *(
                (f"numpy.{core}.multiarray", name)
                for core in ("core", "_core")
                for name in ("_reconstruct", "scalar")
            ),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not an array")
        return super().find_class(module, name)


def _with_shapes(name: str, file: Mapping[str, Any], model: Mapping[str, torch.Tensor]) -> str:
    """The name, and both shapes if the file has that tensor, perhaps under Detectron2's name."""
    other = file.get(name, file.get(name.replace("head.predictor.", "head.")))
    if other is None or tuple(other.shape) == tuple(model[name].shape):
        return name
    return f"{name} ({tuple(other.shape)} in the file, {tuple(model[name].shape)} here)"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(list(names)[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
