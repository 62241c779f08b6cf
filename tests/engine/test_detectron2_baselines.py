# SPDX-License-Identifier: Apache-2.0
"""Detectron2's own detectors go through this launcher; they differ from ours in the model only."""

import json

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling.backbone import FPN
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf
from torch import nn
from util import loss_sum, random_input, without_gradient

from d2_decouple.config import get_config
from d2_decouple.layers.norms import group_norm
from d2_decouple.train import main

OURS = "fcos_R_18_FPN_bccd"
RECIPES = {"retinanet_R_18_FPN_bccd_d2": RetinaNet, "fcos_R_18_FPN_bccd_d2": FCOS}


@pytest.mark.parametrize("name", RECIPES)
def test_the_model_is_detectron2s_and_all_else_ours(name):
    cfg, ours = get_config(name), get_config(OURS)
    for part in ("dataloader", "optimizer", "lr_multiplier", "train"):
        assert OmegaConf.to_container(cfg[part]) == OmegaConf.to_container(ours[part])
    model = instantiate(cfg.model)
    assert type(model) is RECIPES[name]
    assert type(model.backbone) is FPN
    assert model.num_classes == 3
    assert model.head.cls_subnet[0].weight.shape[:2] == (64, 64)
    assert sum(isinstance(layer, nn.Conv2d) for layer in model.head.cls_subnet) == 4
    # From scratch: batch norms learn, and so does everything else.
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in model.backbone.bottom_up.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    host = instantiate(ours.model)
    shapes, expected = (
        {name: value.shape for name, value in m.backbone.bottom_up.state_dict().items()}
        for m in (model, host)
    )
    assert shapes == expected


def test_the_two_differ_where_detectron2s_own_recipes_do():
    retina, fcos = (instantiate(get_config(name).model) for name in RECIPES)
    assert (retina.backbone.top_block.in_feature, fcos.backbone.top_block.in_feature) == (
        "res5",
        "p5",
    )
    assert retina.backbone.top_block.p6.in_channels == 512
    assert retina.head.cls_score.out_channels == 9 * 3
    sizes = [cells[0, 2:] - cells[0, :2] for cells in retina.anchor_generator.cell_anchors]
    areas = torch.stack([size.prod().sqrt() for size in sizes])
    assert areas.tolist() == pytest.approx([32, 64, 128, 256, 512])
    assert (fcos.test_score_thresh, fcos.test_nms_thresh) == (0.2, 0.6)
    assert (retina.test_score_thresh, retina.test_nms_thresh) == (0.05, 0.5)
    # Not RetinaNet's own, but on 64 channels it learns nothing without.
    for model in (retina, fcos):
        norms = [layer for layer in model.head.modules() if isinstance(layer, nn.GroupNorm)]
        assert [layer.num_groups for layer in norms] == [32] * 8


@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_learns(name):
    """With objects: without one, the FCOS of Detectron2's snapshot of 2022 raises IndexError."""
    model = instantiate(get_config(name).model)
    with EventStorage():  # RetinaNet writes its number of positives there
        losses = model([random_input((64, 96), 3), random_input((64, 64), 1)])
    loss_sum(losses).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert without_gradient(model) == []


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_can_be_saved_and_loaded(name, tmp_path):
    cfg = get_config(name)
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
    loaded = LazyConfig.load(str(tmp_path / "config.yaml"))
    # Weights may differ: YAML sorts keys, so that parts are made in another order.
    one, other = (
        {key: value.shape for key, value in instantiate(same.model).state_dict().items()}
        for same in (cfg, loaded)
    )
    assert one == other
    assert str(instantiate(cfg.model).head) == str(instantiate(loaded.model).head)


@pytest.mark.parametrize("name", RECIPES)
def test_two_iterations_on_real_images(name, tmp_path):
    options = ["--config-file", name, "train.max_iter=2", "train.log_period=1"]
    for part, split in (("train", "train"), ("test", "val")):
        options.append(f"dataloader.{part}.dataset.names=bccd_mini_{split}")
        options.append(f"dataloader.{part}.num_workers=0")
        options.append(f"dataloader.{part}.mapper.augmentations.0.short_edge_length=96")
    assert main([*options, f"train.output_dir={tmp_path}"]) == 0
    stored = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert stored["classes"] == ["RBC", "WBC", "Platelets"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "total_loss" in row] == [0, 1]
    assert all(any("cls" in key for key in row) for row in rows if "total_loss" in row)
    assert any("bbox/AP50" in row for row in rows)


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (256, 32), (48, 16), (1, 1)])
def test_group_norm_is_detectron2s_wherever_that_exists(channels, groups):
    norm = group_norm(channels)
    assert (norm.num_groups, norm.num_channels) == (groups, channels)
