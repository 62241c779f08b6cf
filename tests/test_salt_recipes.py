# SPDX-License-Identifier: Apache-2.0
"""SALT-Net's recipes: what they change of a host, and what the fact sheet says of them."""

from typing import Any

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from omegaconf import OmegaConf
from util import loss_sum, random_input, tiny, tiny_model, without_gradient

from d2_decouple.config import config_names, configs_root, find_config, get_config
from d2_decouple.layers.tower import bias_free_tower, conv_tower
from d2_decouple.modeling import (
    BestLocations,
    GFLAssigner,
    GFLv2Predictor,
    GIoUTerm,
    HardNMS,
    TSCODEOptions,
    clip_to_image,
    coarse_boxes,
    predicted_boxes,
    product_score,
)
from d2_decouple.modeling.free_points import FreePoints
from d2_decouple.modeling.pyramid import LinearP6P7
from d2_decouple.modeling.salt import SALT, SALTOptions, SelfDistillationTerm

HOSTS = {  # recipe -> its host
    "salt_R_50_FPN_1x": "gflv2_R_50_FPN_1x",
    "salt_R_18_FPN_bccd": "gflv2_R_18_FPN_bccd",
    "salt_fcos_R_50_FPN_1x": "fcos_R_50_FPN_1x",
    "salt_atss_R_50_FPN_1x": "atss_R_50_FPN_1x",
}
WITH_SDR = ["salt_R_50_FPN_1x", "salt_R_18_FPN_bccd"]
OURS = [name for name in config_names() if name.startswith("salt_")]


def plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=False)


def full_size(name: str, **overrides: Any) -> Any:
    """A recipe's whole model, without memory for it."""
    cfg = get_config(name, [f"{key}={value}" for key, value in overrides.items()])
    with torch.device("meta"):
        return instantiate(cfg.model)


def test_there_are_the_recipes_of_the_paper() -> None:
    assert set(OURS) >= {
        *HOSTS,
        *(f"{name}_nosdr" for name in WITH_SDR),
        *("salt_R_50_FPN_2x_ms", "salt_dpe_R_50_FPN_1x"),
        *(f"salt_R_18_FPN_bccd_{kind}" for kind in ("s1", "dpe", "free")),
    }


@pytest.mark.parametrize("name", HOSTS)
def test_the_plug_in_is_a_few_lines(name: str) -> None:
    """Nothing but the aligner, the towers' length and new losses differs from the host."""
    ours, theirs = get_config(name), get_config(HOSTS[name])
    model, of_host = plain(ours.model), plain(theirs.model)
    width = of_host["backbone"]["out_channels"]
    for tower in ("cls_conv_dims", "box_conv_dims"):
        assert of_host["head"].pop(tower) == [width] * 4
        assert model["head"].pop(tower) == [width] * 3
    del model["head"]["aligner"]
    del model["losses"]["loss_box_coarse"]
    assert ("loss_self_distillation" in model["losses"]) == (name in WITH_SDR)
    model["losses"].pop("loss_self_distillation", None)
    assert model == of_host
    for key in ("dataloader", "optimizer", "lr_multiplier", "train"):
        assert plain(ours[key]) == plain(theirs[key])


@pytest.mark.parametrize("name", OURS)
def test_parts_of_the_recipes(name: str) -> None:
    cfg = get_config(name)
    model = tiny_model(name, convs=3)
    assert len([x for x in model.head.cls_subnet if hasattr(x, "kernel_size")]) == 3
    assert len([x for x in model.head.bbox_subnet if hasattr(x, "kernel_size")]) == 3
    assert type(model.head.aligner) is (FreePoints if name.endswith("_free") else SALT)
    assert model.head.aligner.num_points == 9
    if not name.endswith("_free"):
        assert model.head.aligner.options == SALTOptions()
    assert model.losses["loss_box_coarse"] == GIoUTerm(weight=1.0, boxes=coarse_boxes)
    without = name.endswith(("_nosdr", "_free")) or "fcos" in name or "atss" in name
    assert ("loss_self_distillation" in model.losses) != without
    s1 = name.endswith("_s1")
    assert model.selection.boxes is (coarse_boxes if s1 else predicted_boxes)
    reads_res2 = "dpe" in name
    assert cfg.model.head_in_features[0] == ("res2" if reads_res2 else "p3")
    if reads_res2:
        assert model.head.context.options == TSCODEOptions(use_sce=False)
        assert model.head.context.cls_stride == 1


@pytest.mark.parametrize("name", WITH_SDR)
def test_losses_of_the_fact_sheet(name: str) -> None:
    model = tiny_model(name)
    weights = {key: term.weight for key, term in model.losses.items()}
    assert weights == {
        "loss_cls": 1,
        "loss_box_reg": 2,
        "loss_box_distribution": 0.25,
        "loss_box_coarse": 1,
        "loss_self_distillation": 1,
    }
    assert model.losses["loss_self_distillation"] == SelfDistillationTerm(score=product_score)
    assert type(model.assigner) is GFLAssigner
    assert model.assigner.score is model.selection.score is product_score
    assert type(model.head.predictor) is GFLv2Predictor


def test_selection_and_network_of_the_fact_sheet() -> None:
    """Sections 7 and 8: the best 1,000 locations of a level, 0.05, 0.6; P7 without a ReLU."""
    cfg = get_config("salt_R_50_FPN_1x")
    selection = instantiate(cfg.model.selection)
    assert selection.candidates == BestLocations(test_score_thresh=0.05, test_topk_candidates=1000)
    assert selection.nms == HardNMS(test_nms_thresh=0.6)
    assert selection.clip is clip_to_image
    assert selection.max_detections_per_image == 100
    model = full_size("salt_R_50_FPN_1x")
    assert model.head.offset == 0
    assert isinstance(model.backbone.top_block, LinearP6P7)
    assert cfg.model.head.tower is bias_free_tower
    assert get_config("salt_fcos_R_50_FPN_1x").model.head.get("tower", conv_tower) is conv_tower
    assert cfg.model.input_format == cfg.dataloader.train.mapper.image_format == "RGB"


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("salt_R_50_FPN_1x", 81, 6331716),
        ("salt_R_50_FPN_1x", 80, 6329411),
        ("salt_R_50_FPN_1x_nosdr", 80, 6329411),
        ("gflv2_R_50_FPN_1x", 80, 5065242),
    ],
)
def test_size_of_the_head(name: str, classes: int, parameters: int) -> None:
    head = full_size(name, **{"model.num_classes": classes}).head
    assert sum(x.numel() for x in head.parameters()) == parameters
    if name.startswith("salt"):
        assert sum(x.numel() for x in head.buffers()) == 0
        assert (
            len(head.state_dict()) == 18 + 6 + 3 + 2 + 8 + 3 + 2 + 4 + 2
        )  # sheet 10; scales in two


def test_two_times_schedule_at_many_sizes() -> None:
    cfg = get_config("salt_R_50_FPN_2x_ms")
    assert cfg.train.max_iter == pytest.approx(24 * 117266 / 16, abs=1)
    factor = instantiate(cfg.lr_multiplier)
    for epoch, rate in ((1, 1.0), (15.9, 1.0), (16.1, 0.1), (21.9, 0.1), (22.1, 0.01)):
        assert factor(epoch / 24) == pytest.approx(rate)
    resize = instantiate(cfg.dataloader.train.mapper.augmentations[0])
    assert (resize.short_edge_length, resize.max_size, resize.is_range) == ([480, 960], 1333, True)
    (test,) = cfg.dataloader.test.mapper.augmentations
    assert (test.short_edge_length, test.max_size) == (800, 1333)
    assert plain(cfg.model) == plain(get_config("salt_R_50_FPN_1x").model)


LADDER = [  # Tables 1 and 2
    *("options.class_points=box", "options.class_points=free", "options.class_points=sum"),
    *("options.use_skip=False", "num_points=5", "num_points=16", "options.coarse_bias=1.5"),
]


@pytest.mark.parametrize("override", LADDER)
def test_what_the_paper_compares_can_be_typed(override: str) -> None:
    cfg = get_config("salt_R_18_FPN_bccd", [f"model.head.aligner.{override}"])
    model = instantiate(tiny(cfg).model)
    loss_sum(model([random_input((64, 96), 2)])).backward()
    assert without_gradient(model) == []


@pytest.mark.parametrize("switch", ["of_gt_class=True", "per_positive=True", "weight=0.5"])
def test_switches_of_self_distillation_can_be_typed(switch: str) -> None:
    key, value = switch.split("=")
    cfg = get_config("salt_R_18_FPN_bccd", [f"model.losses.loss_self_distillation.{switch}"])
    model = instantiate(tiny(cfg).model)
    assert str(getattr(model.losses["loss_self_distillation"], key)) == value
    losses = model([random_input((64, 96), 3)])
    assert torch.isfinite(losses["loss_self_distillation"])


def test_detectron2_loads_a_recipe_by_relative_path(monkeypatch: pytest.MonkeyPatch) -> None:
    root = configs_root().parent
    monkeypatch.chdir(root)
    path = find_config("salt_R_18_FPN_bccd_dpe").relative_to(root)
    assert LazyConfig.load(str(path)).model == get_config("salt_R_18_FPN_bccd_dpe").model
