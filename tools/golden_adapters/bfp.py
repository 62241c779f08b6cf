# SPDX-License-Identifier: Apache-2.0
"""Cases of the balanced feature pyramid."""

import torch
from torch import Tensor

from d2_decouple.modeling import BalancedFeatures

from .case import Case, GoldenError, require

__all__ = ["bfp"]

NAMES = {  # theirs -> ours
    "refine.theta.conv": "theta",
    "refine.phi.conv": "phi",
    "refine.g.conv": "g",
    "refine.conv_out.conv": "out",
}
NON_LOCAL = {
    "reduction": 1,
    "use_scale": False,
    "mode": "embedded_gaussian",
    "sub_sample": False,
}


def bfp(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Balanced maps, finest first; ours refines by a non-local block of full width alone."""
    config = case.config
    require(case.path, "refine_type", config["refine_type"], ("non_local",))
    if dict(config["non_local"]) != NON_LOCAL:
        raise GoldenError(f"{case.path}: non_local is {config['non_local']}; known is {NON_LOCAL}")
    balance = BalancedFeatures(channels=config["channels"], refine_level=config["refine_level"])
    weights = {}
    for name, value in case.weights(dtype).items():
        layer, _, kind = name.rpartition(".")
        require(case.path, f"parameter {name!r}: its layer", layer, NAMES)
        weights[f"{NAMES[layer]}.{kind}"] = value
    try:
        balance.to(dtype).load_state_dict(weights)
    except RuntimeError as error:
        raise GoldenError(f"{case.path}: {error}") from error
    maps = [case.tensor(f"feature/{level}", dtype) for level in range(config["num_levels"])]
    with torch.no_grad():
        return {f"out/{level}": x for level, x in enumerate(balance(maps))}
