# SPDX-License-Identifier: Apache-2.0
"""What looks inside a detector have in common: outputs that are kept, and numbers to hand out."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ConfigError, config_names

__all__ = ["check_limit", "kept_outputs", "ordinary", "recipes_with", "rounded"]


@contextmanager
def kept_outputs(*modules: nn.Module) -> Iterator[list[list[Any]]]:
    """For each module a list that its outputs inside the block are appended to.

    So what explains a detection comes from the forward that found it, and no second one is
    needed. Forwards of other threads, which may run the same model at this moment, are not kept.
    """
    thread = get_ident()
    kept: list[list[Any]] = [[] for _ in modules]

    def keeper(outputs: list[Any]) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if get_ident() == thread:
                outputs.append(output)

        return keep

    with ExitStack() as hooks:
        for module, outputs in zip(modules, kept, strict=True):
            hooks.callback(module.register_forward_hook(keeper(outputs)).remove)
        yield kept


def check_limit(limit: int | None) -> None:
    """Raise ConfigError unless ``limit`` is a number of detections, or None."""
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be a whole number from 1, or None, got {limit}")


def recipes_with(what: str, prefixes: Sequence[str]) -> str:
    """The end of a message that names recipes, by how their names begin."""
    names = [name for name in config_names() if name.startswith(tuple(prefixes))]
    if not names:
        return f"no recipe here has {what}"
    return f"recipes with {what} are {', '.join(names[:5])}" + (", ..." if names[5:] else "")


def ordinary(value: Any) -> Any:
    """A copy of a field of ``Instances`` on the CPU, made outside of inference mode, in float32.

    Tensors of inference mode refuse to be changed in place outside of it, and users of Detectron2
    scale and clip boxes in place.
    """
    if hasattr(value, "tensor"):  # boxes
        return type(value)(ordinary(value.tensor))
    if not isinstance(value, Tensor):
        return value
    # Scores of Detectron2's own detectors come in half precision, which NumPy may not know.
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    return value.detach().to("cpu", dtype, copy=True)


def rounded(values: Any, digits: int) -> Any:
    """The numbers of nested lists, rounded."""
    if isinstance(values, list):
        return [rounded(value, digits) for value in values]
    return round(values, digits)
