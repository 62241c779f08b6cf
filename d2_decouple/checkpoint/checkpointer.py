# SPDX-License-Identifier: Apache-2.0
"""Detectron2's checkpointer that never loses a checkpoint and counts what fitted of one."""

import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from .backbones import fit_backbone, unwrap
from .errors import WEIGHTS_KEYS, CheckpointError, DamagedCheckpointError, listed
from .files import read_torch_file, reading, write_whole
from .foreign import check_weights, read_arrays
from .sources import local_file, read_safetensors, without_heuristics

_listed = partial(listed, most=6)
__all__ = ["BEST", "CheckpointError", "Checkpointer", "DamagedCheckpointError"]

BEST = "model_best"
"""Name of the checkpoint with the best result, which no training is resumed from."""
_LAST = "last_checkpoint"
_CLASS_LAYER = "cls_score"
_logger = logging.getLogger(__name__)


# Of a detector; what else a file holds (of a training alone) is not missed in evaluation.
_PARTS = ("backbone.", "head.", "proposal_generator.", "roi_heads.")


class Checkpointer(DetectionCheckpointer):
    """Writes whole files or none, and says in one line how many tensors were loaded.

    A file replaces its predecessor when it is complete on the disk. If the newest one is damaged
    all the same, resuming takes the one before it.
    """

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
            extras: plain values stored with the weights. ``classes``, the names of the classes,
                are compared with those of a file that is loaded.
            checkpointables: further objects with ``state_dict``, such as a trainer.
        """
        super().__init__(model, save_dir, **checkpointables)
        self._complete, self._extras = complete, dict(extras or {})
        self._resuming = self._by_names = False

    def save(self, name: str, *, last: bool = True, **kwargs: Any) -> None:
        """Write ``name``.pth: weights, the state of what is checkpointed, and the extras.

        Args:
            name: of the file, without its suffix.
            last: whether a resumed training shall go on from it.
            kwargs: further plain values to store.

        Raises:
            CheckpointError: it could not be written; an older file of that name is as it was.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        state = {name: part.state_dict() for name, part in self.checkpointables.items()}
        content = {"model": self.model.state_dict(), **state, **self._extras, **kwargs}
        path = Path(self.save_dir) / f"{name}.pth"
        _logger.info("Saving checkpoint to %s", path)
        write_whole(path, lambda file: torch.save(content, file))
        if last:
            self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Say in the file ``last_checkpoint`` which one to resume from."""
        text = last_filename_basename.encode()
        write_whole(Path(self.save_dir) / _LAST, lambda file: file.write(text))

    def has_checkpoint(self) -> bool:
        """Whether there is anything to resume from."""
        return bool(self._candidates())

    def get_checkpoint_file(self) -> str:
        """The file that a resumed training goes on from, or ""."""
        return str(next(iter(self._candidates()), ""))

    def resume_or_load(self, path: str | Path, *, resume: bool = True) -> dict[str, Any]:
        """Load the newest whole checkpoint with everything in it, or the weights at ``path``.

        Raises:
            CheckpointError: the file belongs to another model or to other classes, cannot be read
                or fetched; or there are checkpoints to resume from, and all are damaged.
        """
        candidates = self._candidates() if resume else []
        if not candidates:
            return self.load(path, checkpointables=[])
        name = self._last_name()
        if name and candidates[0].name != name:
            _logger.warning(
                "%s names %.80r, and there is no such checkpoint: going on from the newest, %s",
                *(Path(self.save_dir) / _LAST, name, candidates[0].name),
            )
        self._resuming = True
        damaged = []
        try:
            for candidate in candidates:
                try:
                    return self.load(str(candidate))
                except DamagedCheckpointError as error:
                    damaged.append(str(error))
                    _logger.warning("%s. Trying the checkpoint before it", error)
        finally:
            self._resuming = False
        raise CheckpointError(
            "nothing to resume from: " + "; ".join(damaged) + ". Delete them to begin anew"
        )

    def _candidates(self) -> list[Path]:
        """Checkpoints to resume from: the last one, then the others, newest first."""
        folder = Path(self.save_dir)
        files = sorted(folder.glob("model_*.pth"), key=lambda file: -file.stat().st_mtime_ns)
        tagged = folder / self._last_name()
        files.sort(key=lambda file: file != tagged)
        return [file for file in files if file.stem != BEST]

    def _last_name(self) -> str:
        """What the file ``last_checkpoint`` says; empty if there is none."""
        tag = Path(self.save_dir) / _LAST
        # As bytes: a damaged one is no text, and then names no file.
        return tag.read_bytes().decode(errors="replace").strip() if tag.is_file() else ""

    def load(self, path: str | Path, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """As Detectron2's; ``path`` may also be a name, such as ``torchvision://resnet50``.

        With ``?matching_heuristics=True`` behind it names are matched by their ends.

        Raises:
            CheckpointError: the file is missing, cannot be fetched or read, or does not fit.
        """
        path, self._by_names = without_heuristics(local_file(os.fspath(path)))
        remote = "://" in path
        if path and not remote and not Path(path).is_file():
            raise CheckpointError(
                f"there is no checkpoint {path}; set {WEIGHTS_KEYS} to an existing file"
            )
        try:
            return super().load(path, checkpointables)
        except OSError as error:
            if not remote:
                raise
            raise CheckpointError(
                f"{path} could not be fetched ({error}); without a network, bring the file here "
                f"and set {WEIGHTS_KEYS} to it, or to an empty string for random weights"
            ) from error
        finally:
            self._by_names = False
            self._parsed_url_during_load = None  # newer Detectron2 refuses to load after a failure

    def _load_file(self, filename: str) -> dict[str, Any]:
        content = unwrap(self._read_file(filename))
        if self._by_names:
            content["matching_heuristics"] = True
        with reading(filename):
            check_weights(content)
        return fit_backbone(content, self.model, filename=filename)

    def _read_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".safetensors"):
            return dict(read_safetensors(filename))
        if not filename.endswith(".pkl"):
            return read_torch_file(filename)
        with reading(filename):
            content = read_arrays(filename)
            if "model" in content and "__author__" in content:
                return dict(content)
            # Caffe2's names, of Detectron's own days; Detectron2 matches them by their ends.
            blobs = content.get("blobs", content)
            state = {name: x for name, x in blobs.items() if not name.endswith("_momentum")}
        return {"model": state, "__author__": "Caffe2", "matching_heuristics": True}

    def _load_model(self, checkpoint: Any) -> Any:
        going_on = self._resuming and self.checkpointables
        averaged = not going_on and isinstance(checkpoint.get("ema"), dict)
        if averaged:
            checkpoint["model"] = checkpoint.pop("ema")
        if going_on and self.checkpointables.keys() - checkpoint.keys() - {"ema"}:
            raise CheckpointError(
                f"the last checkpoint in {self.save_dir} holds weights, but not the state of a "
                "training that could go on; to begin one with these weights, type "
                "train.init_checkpoint=FILE train.output_dir=FOLDER without --resume"
            )
        other_classes = self._without_other_classes(checkpoint)
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
        if fresh and (self._complete or going_on):
            raise CheckpointError(
                f"{len(fresh)} of {len(model)} tensors would keep random values in this "
                f"{'training' if going_on else 'evaluation'}: {_listed(named)}; give the config "
                "that the checkpoint was trained with (another first number of cls_score is "
                "another number of classes)"
            )
        parts = [x for x in incompatible.unexpected_keys if x.startswith(_PARTS)]
        if parts and self._complete:
            raise CheckpointError(
                f"{len(parts)} tensors of the file have no place in this model, so it is another "
                f"network than the one that was trained: {_listed(sorted(parts))}; give the config "
                "that the checkpoint was trained with"
            )
        message = f"Loaded {loaded} of {len(model)} tensors{' (averaged)' if averaged else ''}"
        if fresh:
            message += f"; {len(fresh)} keep their initial values: {_listed(named)}"
        if incompatible.unexpected_keys:
            count = len(incompatible.unexpected_keys)
            message += f"; {count} in the file have no place: "
            message += _listed(sorted(incompatible.unexpected_keys))
        _logger.info(message + other_classes)
        return incompatible

    def _without_other_classes(self, checkpoint: dict[str, Any]) -> str:
        """Take class layers that stand for other classes out of the weights; a clause about it."""
        theirs, ours = checkpoint.get("classes"), self._extras.get("classes")
        if not theirs or not ours or list(theirs) == list(ours):
            return ""
        both = f"{_listed(theirs)} in the checkpoint, {_listed(ours)} here"
        if self._resuming or self._complete:
            raise CheckpointError(
                f"the classes are not the checkpoint's: {both}; give the data that it was trained "
                "with, in the same order of classes, or train anew from its weights: type "
                "train.init_checkpoint=FILE train.output_dir=FOLDER without --resume"
            )
        weights = checkpoint["model"]
        for name in [name for name in weights if _CLASS_LAYER in name.split(".")]:
            del weights[name]
        return f"; the classes differ ({both}), so the class layer begins anew"


def _with_shapes(name: str, file: Mapping[str, Any], model: Mapping[str, torch.Tensor]) -> str:
    """The name, and both shapes if the file has that tensor, perhaps under Detectron2's name."""
    other = file.get(name, file.get(name.replace("head.predictor.", "head.")))
    if other is None or tuple(other.shape) == tuple(model[name].shape):
        return name
    return f"{name} ({tuple(other.shape)} in the file, {tuple(model[name].shape)} here)"
