# SPDX-License-Identifier: Apache-2.0
"""A model made ready for inference alone: batch norms folded away, weights in half precision.

Both change the model for good. It cannot be trained afterwards, and its state dict is no longer
the one that checkpoints have.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .pyramid import FoldedConv2d

__all__ = ["cast_weights", "fold_batch_norms"]

_BATCH_NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)
# Their own forward is the plain convolution; a subclass may do something else with its weight.
_PLAIN = (nn.Conv2d, Conv2d, FoldedConv2d)


@torch.no_grad()
def fold_batch_norms(model: nn.Module) -> int:
    """Multiply the batch norms of a model in evaluation mode into the convolutions before them.

    Seen are norms inside Detectron2's ``Conv2d``, and norms right behind a convolution in a
    ``Sequential``. Their statistics are fixed in evaluation, so each is one factor and one
    summand a channel. Outputs change by rounding alone.

    Returns:
        How many were folded.

    Raises:
        ValueError: the model is in training mode, where a norm's statistics are the batch's.
    """
    if model.training:
        raise ValueError("batch norms can be folded in evaluation mode only: call model.eval()")
    folded = 0
    plain: list[Any] = [module for module in model.modules() if type(module) in _PLAIN]
    for conv in plain:
        if _is_fixed_norm(getattr(conv, "norm", None)):
            _fold(conv, conv.norm)
            conv.norm = None
            folded += 1
    for conv, norm, parent, name in list(_neighbours(model)):
        _fold(conv, norm)
        setattr(parent, name, nn.Identity())
        folded += 1
    return folded


def _is_fixed_norm(module: Any) -> bool:
    return isinstance(module, _BATCH_NORMS) and module.running_mean is not None


def _neighbours(model: nn.Module) -> Iterator[tuple[Any, Any, nn.Sequential, str]]:
    """Convolutions with the batch norm that follows them in a ``Sequential``."""
    parents = [module for module in model.modules() if isinstance(module, nn.Sequential)]
    # One that several sequences share may have another norm in each: it cannot hold them all.
    uses = Counter(id(child) for parent in parents for child in parent)
    for parent in parents:
        children = list(parent.named_children())
        for (_, conv), (name, norm) in pairwise(children):
            linear = type(conv) in _PLAIN and all(
                getattr(conv, name, None) is None for name in ("norm", "activation")
            )
            if linear and uses[id(conv)] == 1 and _is_fixed_norm(norm):
                yield conv, norm, parent, name


def _fold(conv: Any, norm: Any) -> None:
    # In double precision: the quotient of a tiny variance magnifies rounding.
    statistics = (conv.weight, conv.bias, norm.running_mean, norm.running_var)
    values: list[Any] = [None if x is None else x.double() for x in statistics]
    affine: list[Any] = [None if x is None else x.double() for x in (norm.weight, norm.bias)]
    weight, bias = fuse_conv_bn_weights(*(*values, norm.eps, *affine))
    dtype = conv.weight.dtype
    conv.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(dtype), requires_grad=False)


def cast_weights(model: nn.Module, dtype: torch.dtype, *, parts: Sequence[str]) -> None:
    """Store the weights of convolutions and linear layers in half precision.

    Under autocast of that type the results are those of float32 weights, which autocast would
    convert again at every call.

    Args:
        model: changed in place.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        parts: names of the submodules this is done in; the others stay as they are.
    """
    for name, module in model.named_modules():
        inside = any(f"{name}.".startswith(f"{part}.") for part in parts)
        if inside and isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
