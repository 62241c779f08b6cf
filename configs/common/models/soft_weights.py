# SPDX-License-Identifier: Apache-2.0
"""SAPD's soft anchor weights on the assigner of any model node."""

from typing import Any

from detectron2.config import LazyCall as L
from omegaconf import OmegaConf

from d2_decouple.modeling import SoftWeights


def soften(model: Any, **options: Any) -> None:
    """Put the assigner into :class:`SoftWeights`, whose other arguments are ``options``.

    What it refers to in the detector lies one node further out then.
    """
    host = OmegaConf.to_container(model.assigner, resolve=False)
    for key, value in host.items():
        if isinstance(value, str) and value.startswith("${.."):
            host[key] = value.replace("${..", "${...", 1)
    model.assigner = L(SoftWeights)(host=host, **options)
