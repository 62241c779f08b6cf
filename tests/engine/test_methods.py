# SPDX-License-Identifier: Apache-2.0
"""``--method``, ``--host`` and ``--size`` mean recipes that exist, or are refused with a choice."""

import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from util import tiny

from d2_decouple.config import ConfigError, config_names, get_config
from d2_decouple.engine.methods import (
    METHODS,
    SIZES,
    chosen_recipe,
    resize_network,
    train_from_scratch,
    use_finer_levels,
)

PAIRS = [(method, host) for method, hosts in METHODS.items() for host in hosts]


@pytest.mark.parametrize(("method", "host"), PAIRS)
def test_every_choice_is_a_recipe(method, host):
    known = config_names()
    for size in SIZES:
        if size == "s" and not METHODS[method][host].small:
            continue  # refused, see below
        recipe = chosen_recipe(method, host or None, size)
        assert recipe in known
        assert method in recipe
        if method == "tscode":
            assert recipe.startswith(f"tscode_{host}_")
        assert ("R_18" in recipe) == (size == "s")


@pytest.mark.parametrize(
    ("arguments", "recipe"),
    [
        (("pdnet", None, "s"), "pdnet_R_18_FPN_bccd"),
        (("tscode", None, "s"), "tscode_fcos_R_18_FPN_bccd"),
        (("tscode", "ota", "l"), "tscode_ota_R_50_FPN_1x"),
        (("salt", None, "s"), "salt_R_18_FPN_bccd"),
        (("salt", "gflv2", "m"), "salt_R_50_FPN_1x"),
        (("sapd", "atss", "s"), "sapd_atss_R_18_FPN_bccd"),
        (("decoupled_rcnn", None, "m"), "decoupled_rcnn_R_50_FPN_1x"),
    ],
)
def test_choices(arguments, recipe):
    assert chosen_recipe(*arguments) == recipe


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("pdnt", None, "s"), ["pdnt", "did you mean 'pdnet'", "decoupled_rcnn"]),
        (("pdnet", None, "xl"), ["--size xl", "s, m or l", "ResNet-101"]),
        (("pdnet", "atss", "s"), ["--host atss", "pdnet is a whole detector", "leave --host out"]),
        (("salt", "ota", "s"), ["--host ota", "type --host gflv2 or fcos or atss"]),
        (("sapd", "gfl", "s"), ["fcos or atss, or no --host for sapd's own"]),
        (("tscode", "ota", "s"), ["no small recipe", "--size m", "fcos or atss or gfl or pdnet"]),
        (("salt", "atss", "s"), ["no small recipe of salt on atss", "--host gflv2"]),
    ],
)
def test_what_does_not_exist_names_what_does(arguments, parts):
    with pytest.raises(ConfigError) as error:
        chosen_recipe(*arguments)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["fcos", "gfl"])
def test_the_large_size_is_a_deeper_network_with_its_weights(name):
    for size, depth, number in (("m", 50, "50"), ("l", 101, "101")):
        cfg = get_config(f"{name}_R_50_FPN_1x")
        resize_network(cfg, SIZES[size])
        assert cfg.model.backbone.bottom_up.stages.depth == depth
        weights = cfg.train.init_checkpoint
        assert weights.endswith((f"R-{number}.pkl", f"resnet{number}.IMAGENET1K_V1"))
    small = get_config(f"{name}_R_18_FPN_bccd")
    resize_network(small, SIZES["s"])
    assert small == get_config(f"{name}_R_18_FPN_bccd")


def test_from_scratch_nothing_is_frozen():
    cfg = get_config("fcos_R_50_FPN_1x")
    train_from_scratch(cfg)
    model = instantiate(tiny(cfg).model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name", ["fcos", "atss", "gfl", "pdnet", "salt", "sapd_atss"])
def test_finer_levels_train_every_parameter(name):
    cfg = tiny(get_config(f"{name}_R_18_FPN_bccd"))
    assert use_finer_levels(cfg)
    assert list(cfg.model.head.strides) == [4, 8, 16, 32, 64]
    model = instantiate(cfg.model)
    truth = Instances((64, 64))
    truth.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 14.0, 13.0], [5.0, 5.0, 60.0, 60.0]]))
    truth.gt_classes = torch.tensor([0, 2])
    image = torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8)
    losses = model([{"image": image, "instances": truth, "height": 64, "width": 64}])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("name", ["tscode_fcos", "sapd", "decoupled_rcnn"])
def test_models_that_cannot_use_finer_levels_stay_as_they_are(name):
    cfg = get_config(f"{name}_R_18_FPN_bccd")
    assert not use_finer_levels(cfg)
    assert cfg == get_config(f"{name}_R_18_FPN_bccd")
