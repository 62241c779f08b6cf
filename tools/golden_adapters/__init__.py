# SPDX-License-Identifier: Apache-2.0
"""How each kind of golden case is compared; ``verify_golden.py`` beside this folder says more."""

from .atss import atss_assign
from .bfp import bfp
from .case import Adapter, Case, GoldenError, load_case, read_json
from .decoupled_rcnn import decoupled_proposals, decoupled_rcnn_head
from .fcos import fcos_targets
from .gfl import gfl_head, gfl_loss
from .pdnet import pdnet_head, pdnet_infer, pdnet_loss
from .point_gather import deformable_points, pdnet_collect
from .salt import salt_head, salt_loss

__all__ = ["ADAPTERS", "Adapter", "Case", "GoldenError", "load_case", "read_json"]

ADAPTERS: dict[str, Adapter] = {
    "atss_assign": Adapter(atss_assign),
    "bfp": Adapter(bfp),
    "decoupled_proposals": Adapter(decoupled_proposals),
    "decoupled_rcnn_head": Adapter(decoupled_rcnn_head),
    "deformable_points": Adapter(deformable_points),
    "fcos_targets": Adapter(fcos_targets),
    "gfl_head": Adapter(gfl_head),
    "gfl_loss": Adapter(gfl_loss),
    "pdnet_collect": Adapter(pdnet_collect),
    "pdnet_head": Adapter(pdnet_head),
    "pdnet_infer": Adapter(pdnet_infer),
    "pdnet_loss": Adapter(pdnet_loss),
    "salt_head": Adapter(salt_head),
    "salt_loss": Adapter(salt_loss),
}
