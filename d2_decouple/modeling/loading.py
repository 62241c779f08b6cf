# SPDX-License-Identifier: Apache-2.0
"""What modules do to a state dict before they load it."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

__all__ = ["FASTER_RCNN", "drop_misfits", "rename"]

_logger = logging.getLogger(__name__)

FASTER_RCNN = {  # Detectron2's names -> ours
    "box_head.": ("class_branch.head.", "box_branches.0.head."),
    "box_predictor.cls_score.": ("class_branch.cls_score.",),
    "box_predictor.bbox_pred.": ("box_branches.0.bbox_pred.",),
}


def drop_misfits(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Take the tensors of another shape than the module's out of a state dict, and report them.

    fvcore does so by the names in the file, before modules have translated them.

    Args:
        module: what will be loaded.
        state_dict: changed in place.
        prefix: of the module's names in it.
    """
    own = {f"{prefix}{name}": value for name, value in module.state_dict().items()}
    misfits = {
        name: f"{tuple(state_dict[name].shape)} in the file, {tuple(value.shape)} here"
        for name, value in own.items()
        if name in state_dict and state_dict[name].shape != value.shape
    }
    for name in misfits:
        del state_dict[name]
    if misfits:
        _logger.warning(
            "%d tensors of the head have another shape and keep their initial values: %s",
            len(misfits),
            "; ".join(f"{name}: {shapes}" for name, shapes in misfits.items()),
        )


def rename(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    names: Mapping[str, Sequence[str]],
) -> None:
    """Give the tensors of a state dict the names that a module has for them.

    Args:
        module: what will be loaded.
        state_dict: changed in place.
        prefix: of the module's names in it.
        names: how a name begins there -> how those begin that get the tensor, as far as the
            module has them. What the state dict holds under these already stays.
    """
    wanted = module.state_dict().keys()
    for theirs, ours in names.items():
        for key in [key for key in state_dict if key.startswith(prefix + theirs)]:
            end = key.removeprefix(prefix + theirs)
            if found := [begin + end for begin in ours if begin + end in wanted]:
                value = state_dict.pop(key)
                for name in found:  # copies, or parameters might share memory afterwards
                    state_dict.setdefault(prefix + name, value.clone())
