# SPDX-License-Identifier: Apache-2.0
"""Cases of the gather: PDNet's collection, and points that read every channel."""

import torch
from torch import Tensor

from d2_decouple.layers.point_gather import deformable_point_gather, dynamic_point_gather

from .case import Case, require

__all__ = ["deformable_points", "pdnet_collect"]

REDUCTIONS = {"merge": "sum", "concat": "none"}  # PDNet's operators, by their names in a case


def pdnet_collect(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Values and gradients of PDNet's collection, for each problem that ``config`` lists.

    A location is (N, 2P, h, w) with the y of a point before its x; the bias is added to the sum.
    """
    results: dict[str, Tensor] = {}
    for label, problem in case.config.items():
        require(case.path, f"operator of {label!r}", problem["operator"], REDUCTIONS)
        leaves = _leaves(case, label, ("map", "location", "bias"), dtype)
        points = leaves["location"].unflatten(1, (-1, 2)).flip(2)
        out = dynamic_point_gather(leaves["map"], points, REDUCTIONS[problem["operator"]])
        if "bias" in leaves:
            out = out + leaves["bias"][:, None, None]
        results |= _with_gradients(case, label, out, leaves)
    return results


def deformable_points(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Values and gradients where each point reads every channel, in the package's conventions."""
    results: dict[str, Tensor] = {}
    for label in case.config:
        leaves = _leaves(case, label, ("map", "points"), dtype)
        out = deformable_point_gather(leaves["map"], leaves["points"])
        results |= _with_gradients(case, label, out, leaves)
    return results


def _leaves(
    case: Case, label: str, names: tuple[str, ...], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The inputs of a problem; only a bias may be missing."""
    return {
        name: case.tensor(f"{label}/{name}", dtype).requires_grad_()
        for name in names
        if name != "bias" or f"{label}/bias" in case.inputs
    }


def _with_gradients(
    case: Case, label: str, out: Tensor, leaves: dict[str, Tensor]
) -> dict[str, Tensor]:
    """``out``, and the gradients of sum(out * gout); without a gout there are none."""
    results = {f"{label}/out": out}
    if f"{label}/gout" in case.inputs:
        upstream = case.tensor(f"{label}/gout", out.dtype)
        gradients = torch.autograd.grad(out, list(leaves.values()), upstream)
        results |= {
            f"{label}/grad_{name}": gradient
            for name, gradient in zip(leaves, gradients, strict=True)
        }
    return results
