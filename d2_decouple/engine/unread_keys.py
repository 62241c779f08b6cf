# SPDX-License-Identifier: Apache-2.0
"""Keys of Detectron2's yacs configs that a model behind ``MODEL.DECOUPLE`` does not read."""

import functools
from typing import Any

from detectron2.config import CfgNode, get_cfg
from omegaconf import OmegaConf

from ..config import YACS_VALUES, ConfigError
from ..modeling import DecoupledROIHeads, OneStageDetector

__all__ = ["refuse_unread"]


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
    read = []  # a key of yacs, what the model reads in its place, and what to type
    for name in ("SCORE_THRESH_TEST", "NMS_THRESH_TEST"):
        if cfg.MODEL.DECOUPLE[name] is None:
            key, wanted = YACS_VALUES[name][not one_stage], f"MODEL.DECOUPLE.{name} {{}}"
            read += [(f"MODEL.{node}.{name}", key, wanted) for node in ("RETINANET", "ROI_HEADS")]
    part = "model" if one_stage else "model.roi_heads"
    limit = f"{part}.selection.max_detections_per_image"
    wanted = f"MODEL.DECOUPLE.OVERRIDES \"['{limit}={{}}']\""
    read.append(("TEST.DETECTIONS_PER_IMAGE", limit, wanted))
    typed = {text.lstrip("+").partition("=")[0] for text in cfg.MODEL.DECOUPLE.OVERRIDES}
    defaults = get_cfg()
    for key, model_key, wanted in read:
        value, default = (functools.reduce(getattr, key.split("."), x) for x in (cfg, defaults))
        known = (default, OmegaConf.select(model, model_key.removeprefix("model.")))
        if value not in known and model_key not in typed:
            raise ConfigError(
                f"{key} is {value}, but the model is the recipe {cfg.MODEL.DECOUPLE.MODEL_FILE}, "
                f"which does not read it: type {wanted.format(value)}"
            )
