# SPDX-License-Identifier: Apache-2.0
"""Every recipe of a project takes every kind of batch; PDNet's say what its fact sheet says."""

from functools import cache

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.events import EventStorage
from torch import nn
from util import excite, loss_sum, random_input, tiny, without_gradient

from d2_decouple.config import config_names, configs_root, find_config, get_config
from d2_decouple.engine import lazy_recipe
from d2_decouple.layers.deform import DeformBottleneckBlock
from d2_decouple.modeling import TestTimeAugmentation

PROJECTS = configs_root().parent / "projects"
RECIPES = [name for name in config_names() if find_config(name).is_relative_to(PROJECTS)]
BATCHES = {
    "half empty": [((64, 96), 3), ((64, 96), 0)],
    "odd sizes": [((33, 47), 0), ((101, 67), 4), ((1, 1), 0)],
    "no objects": [((64, 64), 0), ((40, 64), 0)],
}


def test_there_are_projects():
    assert sum(name.startswith("pdnet_") for name in RECIPES) >= 15
    assert sum(name.startswith("decoupled_rcnn_") for name in RECIPES) >= 20


def with_detections(model):
    """Outputs that differ from cell to cell or region to region, and logits around zero."""
    if hasattr(model, "roi_heads"):
        excite(model.proposal_generator)
        for name, layer in model.roi_heads.named_modules():
            if name.endswith(("cls_score", "bbox_pred")):
                std = 0.3 if model.pixel_std.amin() > 1 else 0.005  # pixels sixty times as large
                nn.init.normal_(layer.weight, std=std)
        return
    excite(model)
    for name, parameter in model.head.named_parameters():
        if name.endswith("cls_score.bias"):
            parameter.data.zero_()


@pytest.mark.parametrize("name", RECIPES)
def test_every_project_recipe_takes_every_batch(name):
    model = instantiate(tiny(get_config(name)).model)
    for prepare in (lambda model: model, with_detections):
        prepare(model)
        for batch in BATCHES.values():
            model.zero_grad()
            with EventStorage():  # two-stage detectors write into it
                losses = model([random_input(size, objects) for size, objects in batch])
            assert all(torch.isfinite(loss) for loss in losses.values()), losses
            loss_sum(losses).backward()
            assert without_gradient(model) == []
    model.eval()
    with torch.no_grad():
        for batch in BATCHES.values():
            inputs = [random_input(size, 0) for size, _ in batch]
            results = [result["instances"] for result in model(inputs)]
            assert sum(map(len, results)) > 0
            for item, found in zip(inputs, results, strict=True):
                boxes = found.pred_boxes.tensor
                limit = torch.tensor([item["width"], item["height"]]).repeat(2)
                assert ((boxes >= 0) & (boxes <= limit)).all()


@cache
def full_size(name):
    """A recipe's whole model, without memory for it."""
    with torch.device("meta"):
        return instantiate(get_config(name).model)


def count(module, *, trainable=False):
    return sum(x.numel() for x in module.parameters() if x.requires_grad or not trainable)


CONSTANTS = 104  # numbers of the authors' model that it stores as parameters and never trains


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("pdnet_R_50_FPN_1x", 36438938),
        ("pdnet_R_101_FPN_2x", 55378842),
        ("pdnet_X_101_64x4d_FPN_2x", 94187418),
    ],
)
def test_pdnet_has_the_parameters_of_the_authors_model(name, parameters):
    model = full_size(name)
    assert count(model) == parameters - CONSTANTS
    assert count(model.head) == count(model.head, trainable=True) == 4986482


def test_what_is_frozen_of_pdnet():
    assert count(full_size("pdnet_R_50_FPN_1x"), trainable=True) == 36216434


def channels(name):
    head = full_size(name).head
    return head.predictor.point_pred.out_channels, head.cls_score.out_channels


@pytest.mark.parametrize("data", ["R_50_FPN_1x", "R_18_FPN_bccd"])
def test_ablations_predict_only_what_they_use(data):
    """4 for the coarse box, 4 slides, 18 shifts of class points, 8 for the mixing of levels."""
    K = get_config(f"pdnet_{data}").model.num_classes
    assert channels(f"pdnet_{data}") == (4 + 4 + 18 + 8, 9 * K)
    assert channels(f"pdnet_{data}_box") == (4 + 4 + 8, K)
    assert channels(f"pdnet_{data}_cls") == (4 + 18, 9 * K)
    assert channels(f"pdnet_{data}_off") == (4, K)


@torch.no_grad()
@pytest.mark.parametrize("name", ["pdnet_R_50_FPN_1x_off", "pdnet_R_18_FPN_bccd_off"])
def test_without_decoupling_a_cell_answers_by_itself(name):
    model = excite(instantiate(tiny(get_config(name)).model))
    seen = []
    model.head.predictor.register_forward_hook(lambda _, inputs, out: seen.append(inputs))
    predictions = model.predict([random_input((64, 96), 0)])[2]
    ((class_maps, box_maps, _),) = seen
    logits = torch.cat([x.flatten(2) for x in class_maps], 2).transpose(1, 2)
    logits = logits + model.head.predictor.cls_score.bias
    edges = torch.cat([model.head.predictor.bbox_pred(x).flatten(2) for x in box_maps], 2)
    boxes = predictions.extras["coarse_boxes"]
    boxes = boxes + edges.transpose(1, 2) * predictions.strides[:, None]
    torch.testing.assert_close(predictions.logits, logits)
    torch.testing.assert_close(predictions.boxes, boxes)


COCO = {  # recipe without "pdnet_" -> iterations, short sides in training, weights, stride in 1x1
    "R_50_FPN_1x": (90000, {800}, "MSRA/R-50", True),
    "R_50_FPN_1x_off": (90000, {800}, "MSRA/R-50", True),
    "R_50_FPN_1x_cls": (90000, {800}, "MSRA/R-50", True),
    "R_50_FPN_1x_box": (90000, {800}, "MSRA/R-50", True),
    "R_50_FPN_2x": (180000, {640, 800}, "MSRA/R-50", True),
    "R_50_FPN_2xx": (180000, {480, 960}, "MSRA/R-50", True),
    "R_101_FPN_2x": (180000, {640, 800}, "MSRA/R-101", True),
    "R_101_FPN_2xx": (180000, {480, 960}, "MSRA/R-101", True),
    "X_101_64x4d_FPN_2x": (180000, {640, 800}, "FAIR/X-101-64x4d", False),
    "X_101_64x4d_FPN_2xx": (180000, {480, 960}, "FAIR/X-101-64x4d", False),
    "X_101_64x4d_DCN_FPN_2xx": (180000, {480, 960}, "FAIR/X-101-64x4d", False),
}


@pytest.mark.parametrize("name", COCO)
def test_schedule_sizes_and_weights_on_coco(name):
    max_iter, sizes, weights, stride_in_1x1 = COCO[name]
    cfg = get_config(f"pdnet_{name}")
    assert cfg.train.max_iter == max_iter
    assert cfg.train.init_checkpoint == f"detectron2://ImageNetPretrained/{weights}.pkl"
    assert cfg.model.backbone.bottom_up.stages.stride_in_1x1 == stride_in_1x1

    multiplier = instantiate(cfg.lr_multiplier)
    assert multiplier(0.0) == pytest.approx(0.001)
    assert multiplier(250 / max_iter) == pytest.approx(0.5005)
    drops = [(60000, 80000), (120000, 160000)][max_iter // 90000 - 1]
    for iteration, rate in zip((500, *drops), (1.0, 0.1, 0.01), strict=True):
        assert multiplier(iteration / max_iter) == pytest.approx(rate)
        assert iteration == 500 or multiplier((iteration - 1) / max_iter) > rate

    resize = instantiate(cfg.dataloader.train.mapper.augmentations[0])
    image = torch.zeros(600, 600, 3).numpy()
    assert {resize.get_transform(image).new_h for _ in range(50)} == sizes
    resize = instantiate(cfg.dataloader.test.mapper.augmentations[0])
    assert resize.get_transform(image).new_h == 800


@pytest.mark.parametrize("name", ["pdnet_R_50_FPN_1x", "pdnet_R_18_FPN_bccd"])
def test_everything_decays_also_norms_and_biases(name):
    cfg = tiny(get_config(name))
    cfg.optimizer.params.model = instantiate(cfg.model)
    optimizer = instantiate(cfg.optimizer)
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {
        (0.01, 1e-4)
    }


def test_strides_of_the_backbones():
    """Caffe2's weights have the stride in the 1x1 convolution, ResNeXt's in the 3x3."""
    for name, expected in (("R_101_FPN_2x", (2, 1)), ("X_101_64x4d_FPN_2x", (1, 2))):
        block = full_size(f"pdnet_{name}").backbone.bottom_up.res3[0]
        assert (block.conv1.stride[0], block.conv2.stride[0]) == expected
        assert block.conv2.groups == (64 if "64x4d" in name else 1)


def test_deformable_network_takes_the_plain_ones_weights():
    plain = full_size("pdnet_X_101_64x4d_FPN_2xx").state_dict()
    deformable = full_size("pdnet_X_101_64x4d_DCN_FPN_2xx").state_dict()
    assert plain.keys() <= deformable.keys()
    assert all(value.shape == deformable[name].shape for name, value in plain.items())
    added = deformable.keys() - plain.keys()
    assert len(added) == 2 * (4 + 23 + 3)  # a weight and a bias in each block of res3 to res5
    assert all(".conv2_offset." in name for name in added)
    assert {deformable[name].shape[0] for name in added} == {27}


def test_deformable_network_trains():
    """Its recipe, with the blocks of a ResNet-50; half a batch without objects."""
    cfg = get_config(
        "pdnet_X_101_64x4d_DCN_FPN_2xx",
        [
            *("model.backbone.bottom_up.stages.depth=50", "model.num_classes=3"),
            "model.backbone.bottom_up.stages.num_groups=2",
            "model.backbone.bottom_up.stages.width_per_group=16",
            *("model.head.cls_conv_dims=[256]", "model.head.box_conv_dims=[256]"),
        ],
    )
    model = instantiate(cfg.model)
    assert isinstance(model.backbone.bottom_up.res3[0], DeformBottleneckBlock)
    losses = model([random_input((64, 96), 2), random_input((64, 64), 0)])
    loss_sum(losses).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert without_gradient(model) == []


def test_deformable_network_is_tested_at_thirteen_sizes():
    cfg = tiny(get_config("pdnet_X_101_64x4d_DCN_FPN_2xx"))
    recipe = lazy_recipe(cfg)
    augmented = recipe.evaluated(instantiate(cfg.model))
    assert isinstance(augmented, TestTimeAugmentation)
    assert len(augmented.short_edge_lengths) == 13
    assert augmented.flip
    assert (max(augmented.short_edge_lengths), augmented.max_size) == (1800, 3000)
    assert recipe.eval_period == 0


def test_detectron2_loads_a_project_recipe_by_relative_path(monkeypatch):
    """As its own launcher does, from the checkout's root."""
    monkeypatch.chdir(PROJECTS.parent)
    for name in ("pdnet_R_18_FPN_bccd_off", "pdnet_X_101_64x4d_DCN_FPN_2xx"):
        path = find_config(name).relative_to(PROJECTS.parent)
        assert LazyConfig.load(str(path)).model == get_config(name).model
