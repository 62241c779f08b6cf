# SPDX-License-Identifier: Apache-2.0
"""Files with the weights of one network that is no ResNet, brought to a detector's names."""

import logging
from collections.abc import Mapping
from typing import Any

from detectron2.modeling.backbone import Backbone
from torch import nn

from .errors import listed

__all__ = ["fit_network"]

_logger = logging.getLogger(__name__)


def fit_network(
    checkpoint: dict[str, Any], state: Mapping[str, Any], model: nn.Module
) -> dict[str, Any]:
    """A file with one network's tensors, under the names that they have in the detector.

    It is that network's if it fills at least half of it. Dots and underscores count alike: timm's
    ``stages.0`` is ``stages_0`` where maps are taken out. The input is not looked at: the detector
    must have the ``pixel_mean``, ``pixel_std`` and ``input_format`` that the weights want.

    Args:
        checkpoint: a file's content, its tensors by name under "model".
        state: these tensors, without ``module.`` in front.
        model: a detector; its network is any Detectron2 ``Backbone`` in it.

    Returns:
        The checkpoint with other names, or as it is, where it is no such file.
    """
    if not state.keys().isdisjoint(model.state_dict()):
        return checkpoint
    for prefix, network in model.named_modules():
        if not isinstance(network, Backbone):
            continue
        own = network.state_dict()
        # Below ``net.`` in a TimmBackbone, and in a pyramid that has no bottom_up.
        names = {name.removeprefix("net.").replace(".", "_"): name for name in own}
        known = {name: names.get(name.replace(".", "_")) for name in state}
        fitting = {
            f"{prefix}.{ours}": state[name]
            for name, ours in known.items()
            if ours is not None and tuple(own[ours].shape) == tuple(state[name].shape)
        }
        if fitting and 2 * len(fitting) >= len(own):
            others = [name for name, ours in known.items() if f"{prefix}.{ours}" not in fitting]
            _logger.info(
                "The file holds the network %s: %d of its %d tensors; left out: %s",
                *(prefix, len(fitting), len(own)),
                listed(others, most=3) or "none",
            )
            checkpoint.pop("matching_heuristics", None)
            return {**checkpoint, "model": fitting}
    return checkpoint
