# SPDX-License-Identifier: Apache-2.0
"""Recipes that put several papers together: what they change of those that they are made of."""

from typing import Any

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from omegaconf import OmegaConf
from util import tiny

from d2_decouple.config import config_names, find_config, get_config
from d2_decouple.modeling import (
    TSCODE,
    DenseProposals,
    GFLAssigner,
    PDNetPredictor,
    ProbabilisticROIHeads,
    SALTOptions,
    SoftWeights,
    WeightedQualityTerm,
)
from d2_decouple.modeling.salt import SALT

DATA = ("R_50_FPN_1x", "R_18_FPN_bccd")
SALT_DPE = {"R_50_FPN_1x": "salt_dpe_R_50_FPN_1x", "R_18_FPN_bccd": "salt_R_18_FPN_bccd_dpe"}
SOFT = {  # recipe -> the one it is made of
    **{f"sapd_{host}_{data}": f"{host}_{data}" for host in ("fcos", "atss") for data in DATA},
    **{f"composed_soft_dpe_pdnet_{data}": f"composed_dpe_pdnet_{data}" for data in DATA},
    **{f"composed_soft_tscode_pdnet_{data}": f"tscode_pdnet_{data}" for data in DATA},
    **{f"composed_soft_salt_dpe_{data}": SALT_DPE[data] for data in DATA},
}
TWO_STAGES = {
    f"composed_{name}_decoupled_rcnn_{data}": (f"{host}_{data}", f"decoupled_rcnn_{data}")
    for name, host in (
        ("fcos", "fcos"),
        ("atss", "atss"),
        ("soft_salt_dpe", "composed_soft_salt_dpe"),
    )
    for data in DATA
}
REST = ("dataloader", "optimizer", "lr_multiplier", "train")


def plain(node: Any, *, resolve: bool = False) -> Any:
    return OmegaConf.to_container(node, resolve=resolve)


def test_every_composed_recipe_is_looked_at() -> None:
    names = {name for name in config_names() if name.startswith("composed_")}
    assert names == {
        *(name for name in SOFT if name.startswith("composed_")),
        *TWO_STAGES,
        *(f"composed_dpe_pdnet_{data}" for data in DATA),
    }


@pytest.mark.parametrize("name", SOFT)
def test_soft_weights_are_a_few_lines(name: str) -> None:
    """Nothing but the assigner, and the quality's term where there is one, is another one."""
    ours, theirs = (get_config(x) for x in (name, SOFT[name]))
    for key in REST:
        assert plain(ours[key]) == plain(theirs[key])
    host = instantiate(theirs.model.assigner)
    soft = instantiate(ours.model.assigner)
    assert isinstance(soft, SoftWeights)
    assert type(soft.host) is type(host)
    assert soft.host.num_classes == ours.model.num_classes == host.num_classes
    assert soft.exponent == 1
    assert soft.label_sets == ()
    assert soft.box_minimum == (1e-12 if isinstance(host, GFLAssigner) else 1)
    if isinstance(host, GFLAssigner):
        assert soft.host.score is host.score
    model, of_host = plain(ours.model), plain(theirs.model)
    del model["assigner"], of_host["assigner"]
    if name.startswith("sapd_"):
        term = instantiate(ours.model.losses.loss_quality)
        assert term == WeightedQualityTerm()
        del model["losses"]["loss_quality"], of_host["losses"]["loss_quality"]
    assert model == of_host


def test_the_number_of_classes_is_typed_once() -> None:
    cfg = get_config("composed_soft_salt_dpe_R_50_FPN_1x", ["model.num_classes=7"])
    model = instantiate(tiny(cfg, num_classes=7).model)
    assert model.assigner.host.num_classes == model.head.predictor.num_classes == 7


@pytest.mark.parametrize("data", DATA)
def test_dpe_under_pdnets_predictor(data: str) -> None:
    ours, theirs = (get_config(f"{x}_{data}") for x in ("composed_dpe_pdnet", "pdnet"))
    model, of_host = plain(ours.model), plain(theirs.model)
    assert model.pop("head_in_features") == ["res2", *of_host.pop("head_in_features")]
    context = instantiate(ours.model.head.context)
    assert isinstance(context, TSCODE)
    assert (context.options.use_sce, context.options.use_dpe) == (False, True)
    assert (context.cls_stride, context.box_channels) == (1, ours.model.backbone.out_channels)
    del model["head"]["context"], of_host["head"]["context"]
    assert model == of_host
    for key in REST:
        assert plain(ours[key]) == plain(theirs[key])


@pytest.mark.parametrize("name", TWO_STAGES)
def test_two_stages_are_a_few_lines(name: str) -> None:
    lines = find_config(name).read_text(encoding="utf-8").split('"""')[-1].split("\n")
    code = [line for line in lines if line.strip()]
    assert len(code) <= 14  # imports, of which one may be broken, and one assignment
    assert [line for line in code if line.startswith("model")] == [
        "model = dense_rcnn(_dense, _rcnn)"
    ]


@pytest.mark.parametrize("name", TWO_STAGES)
def test_two_stages_are_made_of_both(name: str) -> None:
    """The first is the one-stage detector with one class, the second the Decoupled R-CNN."""
    ours, dense, rcnn = (get_config(x) for x in (name, *TWO_STAGES[name]))
    for key in REST:
        assert plain(ours[key]) == plain(dense[key])
    model, first, second = (plain(x.model, resolve=True) for x in (ours, dense, rcnn))
    for key in ("backbone", "pixel_mean", "pixel_std", "input_format"):
        assert model[key] == first[key]
    generator = model["proposal_generator"]
    dense.model.num_classes = 1
    single = plain(dense.model, resolve=True)
    for key in ("head", "assigner", "losses", "head_in_features"):
        assert generator[key] == single[key]
    assert generator["score"] == single["selection"]["score"]
    limits = ("pre_nms_topk", "post_nms_topk", "nms_thresh", "nms_thresh_reg", "post_nms_topk_reg")
    for key in limits:
        assert generator[key] == second["proposal_generator"][key]
    heads, theirs = model["roi_heads"], second["roi_heads"]
    assert heads.pop("num_classes") == first["num_classes"]
    assert heads["class_branch"].pop("num_classes") == first["num_classes"]
    assert theirs.pop("num_classes") == theirs["class_branch"].pop("num_classes")
    assert heads.pop("box_in_features") == ["p3", "p4", "p5", "p6", "p7"]
    assert heads["box_pooler"].pop("scales") == [1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128]
    score = heads.pop("test_score_thresh")
    assert heads["selection"].pop("test_score_thresh") == pytest.approx(score**2)
    for key in ("_target_", "box_in_features"):
        heads.pop(key, None)
        del theirs[key]
    del theirs["box_pooler"]["scales"], theirs["selection"]["test_score_thresh"]
    assert heads == theirs


@pytest.mark.parametrize("name", TWO_STAGES)
def test_two_stages_are_built(name: str) -> None:
    with torch.device("meta"):
        model = instantiate(get_config(name).model)
    assert isinstance(model.proposal_generator, DenseProposals)
    assert isinstance(model.roi_heads, ProbabilisticROIHeads)
    assert model.proposal_generator.head.predictor.num_classes == 1
    pooler = model.roi_heads.box_pooler
    assert (pooler.min_level, pooler.max_level) == (3, 7)
    generator = model.proposal_generator
    generator.head.check_pyramid(model.backbone.output_shape(), generator.in_features)


def test_four_papers_are_in_the_last() -> None:
    """TSCODE's box half, SALT, SAPD's weights, and Decoupled R-CNN; PDNet excludes SALT."""
    cfg = tiny(get_config("composed_soft_salt_dpe_decoupled_rcnn_R_18_FPN_bccd"))
    generator = instantiate(cfg.model).proposal_generator
    assert isinstance(generator.head.context, TSCODE)
    assert isinstance(generator.head.aligner, SALT)
    assert isinstance(generator.assigner, SoftWeights)
    assert generator.assigner.host.score is generator.score
    assert generator.losses["loss_self_distillation"].score is generator.score


def test_salt_and_pdnet_exclude_each_other() -> None:
    """Both give coarse boxes, and the head says so instead of losing one kind."""
    model = tiny(get_config("pdnet_R_18_FPN_bccd")).model
    model.head.aligner = L(SALT)(
        channels="${...backbone.out_channels}", num_levels=5, options=L(SALTOptions)()
    )
    head = instantiate(model.head)
    assert isinstance(head.predictor, PDNetPredictor)
    maps = [torch.randn(1, 64, size, size) for size in (8, 4, 2, 1, 1)]
    with pytest.raises(ValueError, match=r"PDNetPredictor and SALT both write extras"):
        head(maps)
