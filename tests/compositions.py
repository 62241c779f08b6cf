# SPDX-License-Identifier: Apache-2.0
"""Tiny recipes with the papers' stand-ins in their slots, written as a recipe would be."""

from collections.abc import Callable
from typing import Any

from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from standin_assigners import (
    AnchorAssigner,
    LearnedLevels,
    LevelTerm,
    PaddingIgnored,
    ScoreWeighted,
)
from standins import AnchorPredictor, PointAligner
from torch import nn
from util import WIDTH, excite, tiny

from d2_decouple.config import get_config
from d2_decouple.modeling import (
    TSCODE,
    BestLocations,
    GIoUTerm,
    TSCODEOptions,
    class_score,
    coarse_boxes,
)

CHANNELS = "${...backbone.out_channels}"
CLASSES = 3
STRIDES = (8, 16, 32, 64, 128)


def recipe(*plug_ins: Callable[[Any], None]) -> Any:
    """The tiny plain host with each of the functions ``model -> None`` applied."""
    model = tiny(get_config("fcos_R_50_FPN_1x"), num_classes=CLASSES).model
    for plug_in in plug_ins:
        plug_in(model)
    return model


def nested(assigner: Any, **changes: Any) -> dict[str, Any]:
    """A recipe's assigner one level deeper, where its relative interpolation would miss."""
    own = {"num_classes": CLASSES} if "num_classes" in assigner else {}
    return {**assigner, **own, **changes}


def half_resolution(model: Any) -> None:
    model.head.context = L(TSCODE)(channels=CHANNELS)
    model.head_in_features = ["res2", *model.head_in_features]


def box_detail(model: Any) -> None:
    model.head.context = L(TSCODE)(channels=CHANNELS, options=L(TSCODEOptions)(use_sce=False))
    model.head_in_features = ["res2", *model.head_in_features]


def aligned(model: Any) -> None:
    model.head.aligner = L(PointAligner)(channels=CHANNELS, num_levels=len(STRIDES))
    model.losses.loss_box_coarse = L(GIoUTerm)(boxes=coarse_boxes)


def pdnet(model: Any) -> None:
    """All that PDNet's recipe has in other slots than the plain host; the context stays."""
    own = tiny(get_config("pdnet_R_50_FPN_1x"), num_classes=CLASSES).model
    model.backbone = own.backbone
    model.head.update(predictor=own.head.predictor, offset=own.head.offset, tower=own.head.tower)
    model.update(assigner=own.assigner, losses=own.losses, selection=own.selection)


def anchors(model: Any) -> None:
    model.head.predictor = L(AnchorPredictor)(num_classes="${...num_classes}", in_channels=WIDTH)
    model.assigner = L(AnchorAssigner)(num_classes="${..num_classes}")
    del model.losses.loss_quality
    model.selection.score = class_score


def learned_levels(model: Any) -> None:
    model.assigner = L(LearnedLevels)(
        host=nested(model.assigner),
        channels="${..backbone.out_channels}",
        num_levels=len(STRIDES),
    )
    model.losses.loss_select = L(LevelTerm)()


def score_weighted(model: Any) -> None:
    model.assigner = L(ScoreWeighted)(host=nested(model.assigner), score="${..selection.score}")


def best_locations(model: Any) -> None:
    model.selection.candidates = L(BestLocations)(test_score_thresh=0.05, test_topk_candidates=9)


def padding_ignored(model: Any) -> None:
    model.assigner = L(PaddingIgnored)(host=nested(model.assigner))


COMPOSITIONS = {
    "plain": [],
    "TSCODE": [half_resolution],
    "SALT": [aligned, score_weighted, best_locations, padding_ignored],
    "PDNet": [pdnet],
    "RetinaNet": [anchors],
    "SAPD": [learned_levels],
    "SALT and box detail": [box_detail, aligned],
    "PDNet and TSCODE": [half_resolution, pdnet],
    "RetinaNet and TSCODE": [half_resolution, anchors],
    "PDNet and box detail": [box_detail, pdnet],
    "SALT and SAPD": [aligned, learned_levels],
    "SAPD and TSCODE": [half_resolution, learned_levels],
}


def compose(name: str) -> nn.Module:
    """The detector of a composition, with outputs that differ from cell to cell."""
    return excite(instantiate(recipe(*COMPOSITIONS[name])), gain=0.5)
