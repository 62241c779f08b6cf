# SPDX-License-Identifier: Apache-2.0
"""Keys of Detectron2's yacs configs that a model behind ``MODEL.DECOUPLE`` does not read."""

import functools
from typing import Any

from detectron2.config import CfgNode, get_cfg
from omegaconf import OmegaConf

from ..config import ConfigError
from ..modeling import DecoupledROIHeads, OneStageDetector

__all__ = ["refuse_unread"]

_THRESHOLDS = {  # by name, in the node of the selection
    "SCORE_THRESH_TEST": ("candidates.test_score_thresh", "test_score_thresh"),
    "NMS_THRESH_TEST": ("nms.test_nms_thresh", "nms.test_nms_thresh"),
}


def refuse_unread(cfg: CfgNode, model: Any) -> None:
    """Refuse a threshold or limit that somebody set, and that detections would not follow.

    Args:
        cfg: the yacs config.
        model: the lazy model that its ``MODEL.DECOUPLE`` names, with its values filled in.

    Raises:
        ConfigError: with what to type in its place. A value that the model has anyhow is no
            mistake, nor is one of heads that are Detectron2's own.
    """
    one_stage = OneStageDetector.__name__ == cfg.MODEL.META_ARCHITECTURE
    if not one_stage and DecoupledROIHeads.__name__ != cfg.MODEL.ROI_HEADS.NAME:
        return
    selection = "selection." if one_stage else "roi_heads.selection."
    for name, keys in _THRESHOLDS.items():
        key = selection + keys[not one_stage]
        if cfg.MODEL.DECOUPLE[name] is None:
            wanted = f"MODEL.DECOUPLE.{name} {{}}"
            _compare(cfg, f"MODEL.RETINANET.{name}", model, key, wanted)
            _compare(cfg, f"MODEL.ROI_HEADS.{name}", model, key, wanted)
    limit = f"{selection}max_detections_per_image"
    wanted = f"MODEL.DECOUPLE.OVERRIDES \"['model.{limit}={{}}']\""
    _compare(cfg, "TEST.DETECTIONS_PER_IMAGE", model, limit, wanted)


def _compare(cfg: CfgNode, key: str, model: Any, model_key: str, wanted: str) -> None:
    if any(
        text.lstrip("+").startswith(f"model.{model_key}=") for text in cfg.MODEL.DECOUPLE.OVERRIDES
    ):
        return
    value, default = (functools.reduce(getattr, key.split("."), x) for x in (cfg, get_cfg()))
    if value not in (default, OmegaConf.select(model, model_key)):
        raise ConfigError(
            f"{key} is {value}, but the model is the recipe {cfg.MODEL.DECOUPLE.MODEL_FILE}, "
            f"which does not read it: type {wanted.format(value)}"
        )
