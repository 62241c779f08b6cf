# SPDX-License-Identifier: Apache-2.0
"""TSCODE's recipes: what they change of a host, and that all of it trains in half precision."""

import pytest
import torch
from detectron2.config import instantiate
from omegaconf import OmegaConf
from torch import nn
from util import loss_sum, random_input, tiny, without_gradient

from d2_decouple.config import config_names, get_config
from d2_decouple.layers.deform import DeformBottleneckBlock, OffsetDeformConv
from d2_decouple.modeling import PAFPN, TSCODE, SharedContext, TSCODEOptions

HOSTS = {  # recipe of the host -> iterations
    "fcos_R_50_FPN_1x": 90000,
    "atss_R_50_FPN_1x": 87950,
    "gfl_R_50_FPN_1x": 87950,
    "retinanet_R_50_FPN_1x": 90000,
    "autoassign_R_50_FPN_1x": 90000,
    "ddod_R_50_FPN_1x": 87950,
    "ota_R_50_FPN_1x": 90000,
    "pdnet_R_50_FPN_1x": 90000,
    "fcos_R_18_FPN_bccd": 800,
    "atss_R_18_FPN_bccd": 800,
    "gfl_R_18_FPN_bccd": 800,
    "pdnet_R_18_FPN_bccd": 800,
}
BIG = {  # backbone -> depth, groups, weights
    "R_101": (101, 1, "torchvision://resnet101.IMAGENET1K_V1"),
    "X_101_32x4d": (101, 32, "resnext101_32x4d-a5af3160.pth"),
    "X_101_64x4d": (101, 64, "resnext101_64x4d-ee2c6f71.pth"),
    "X_101_32x4d_DCN": (101, 32, "resnext101_32x4d-a5af3160.pth"),
    "X_101_64x4d_DCN": (101, 64, "resnext101_64x4d-ee2c6f71.pth"),
}
HALVES = [
    f"tscode_{host}_{data}"
    for host in ("fcos", "atss", "gfl")
    for data in ("R_50_FPN_1x", "R_18_FPN_bccd")
]


def plain(node):
    return OmegaConf.to_container(node, resolve=False)


@pytest.mark.parametrize("host", HOSTS)
def test_the_plug_in_is_three_lines(host):
    """Nothing but the context, the class tower and the head's inputs differs from the host."""
    theirs, ours = (get_config(name) for name in (host, f"tscode_{host}"))
    assert ours.train.max_iter == theirs.train.max_iter == HOSTS[host]
    model, of_host = plain(ours.model), plain(theirs.model)
    width = of_host["backbone"]["out_channels"]
    assert model["head"].pop("cls_conv_dims") == [2 * width, 2 * width]
    assert of_host["head"].pop("cls_conv_dims") == [width] * 4
    assert instantiate(ours.model.head.context).options == TSCODEOptions()
    del model["head"]["context"]
    del of_host["head"]["context"]
    assert model.pop("head_in_features") == ["res2", *of_host.pop("head_in_features")]
    assert model == of_host
    for key in ("dataloader", "optimizer", "lr_multiplier"):
        assert plain(ours[key]) == plain(theirs[key])


@pytest.mark.parametrize("name", HALVES)
def test_halves(name):
    both, sce, dpe = (get_config(name + half).model for half in ("", "_sce", "_dpe"))
    width = both.backbone.out_channels
    assert sce.head_in_features == both.head_in_features[1:]
    assert dpe.head_in_features == both.head_in_features
    assert sce.head.cls_conv_dims == [2 * width] * 2
    assert dpe.head.cls_conv_dims == [width] * 4
    options = [instantiate(x.head.context).options for x in (both, sce, dpe)]
    assert [(x.use_sce, x.use_dpe) for x in options] == [(True, True), (True, False), (False, True)]


@pytest.mark.parametrize("backbone", BIG)
def test_final_models_have_gfl_s_two_times_schedule(backbone):
    depth, groups, weights = BIG[backbone]
    cfg = get_config(f"tscode_gfl_{backbone}_FPN_2x_ms")
    assert cfg.train.init_checkpoint.endswith(weights)
    assert cfg.train.max_iter == 175899
    multiplier = instantiate(cfg.lr_multiplier)
    for epoch, rate in ((1, 1.0), (15.9, 1.0), (16.1, 0.1), (21.9, 0.1), (22.1, 0.01)):
        assert multiplier(epoch / 24) == pytest.approx(rate)
    resize = instantiate(cfg.dataloader.train.mapper.augmentations[0])
    image = torch.zeros(600, 600, 3).numpy()
    sizes = {resize.get_transform(image).new_h for _ in range(200)}
    assert min(sizes) >= 480
    assert max(sizes) <= 800
    assert len(sizes) > 50
    assert cfg.dataloader.train.mapper.augmentations[0].max_size == 1333
    with torch.device("meta"):
        model = instantiate(cfg.model)
    assert len(model.backbone.bottom_up.res4) == {50: 6, 101: 23}[depth]
    assert model.backbone.bottom_up.res4[0].conv2.groups == groups
    assert model.backbone.bottom_up.res4[0].conv2.stride == (2, 2)
    deformed = [
        stage
        for stage in ("res2", "res3", "res4", "res5")
        if isinstance(getattr(model.backbone.bottom_up, stage)[0], DeformBottleneckBlock)
    ]
    assert deformed == (["res4", "res5"] if "DCN" in backbone else [])
    for tower, channels in ((model.head.cls_subnet, 512), (model.head.bbox_subnet, 256)):
        convs = [part for part in tower if isinstance(part, nn.Conv2d | OffsetDeformConv)]
        kinds = [isinstance(part, OffsetDeformConv) for part in convs]
        assert kinds == [False] * (len(convs) - 1) + ["DCN" in backbone]
        assert convs[-1].out_channels == channels


def test_a_plain_towers_weights_load_into_a_deforming_one():
    with torch.device("meta"):
        plain_keys, deform_keys = (
            instantiate(get_config(f"tscode_gfl_X_101_32x4d_{x}2x_ms").model.head).state_dict()
            for x in ("FPN_", "DCN_FPN_")
        )
    assert plain_keys.keys() <= deform_keys.keys()
    added = deform_keys.keys() - plain_keys.keys()
    assert {deform_keys[name].shape[0] for name in added} == {27}
    assert len(added) == 4


def test_necks():
    context = instantiate(get_config("tscode_fcos_R_50_FPN_1x_neck").model.head.context)
    assert isinstance(context, TSCODE)
    assert (context.cls_channels, context.cls_stride, context.finer_levels) == (256, 1, 1)
    for host in ("fcos", "atss", "gfl"):
        cfg = get_config(f"{host}_R_50_PAFPN_1x")
        assert instantiate(tiny(cfg).model.head.context).__class__ is SharedContext
        assert isinstance(instantiate(cfg.model.backbone), PAFPN)


@pytest.mark.parametrize(
    "override",
    [
        *("sce_down=avg", "sce_down=max", "sce_kernel=5", "sce_kernel=7", "top_level=dup"),
        *("dpe_terms=[self,low]", "dpe_terms=[self,up1,up2,low]", "upsample=bilinear"),
    ],
)
def test_what_the_paper_compares_can_be_typed(override):
    name, value = override.split("=")
    cfg = get_config("tscode_fcos_R_50_FPN_1x", [f"model.head.context.options.{override}"])
    model = instantiate(tiny(cfg).model)
    options = model.head.context.options
    wanted = value.strip("[]").split(",") if value.startswith("[") else value
    got = getattr(options, name)
    assert (list(got) if isinstance(wanted, list) else str(got)) == wanted
    loss_sum(model([random_input((64, 96), 2)])).backward()
    assert without_gradient(model) == []


BFLOAT16 = [*(name for name in config_names() if name.endswith("_R_18_FPN_bccd"))]


@pytest.mark.parametrize("name", BFLOAT16)
def test_a_step_in_bfloat16(name):
    """Losses near those of float32, and every parameter has a finite gradient."""
    cfg = get_config(name)
    if "roi_heads" in cfg.model:
        pytest.skip("two stages draw samples: tests of their own compare precisions")
    torch.manual_seed(0)
    model = instantiate(tiny(cfg).model)
    inputs = [random_input((64, 96), 3), random_input((64, 64), 0)]
    exact = {term: loss.item() for term, loss in model(inputs).items()}
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(inputs)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert {term: loss.item() for term, loss in losses.items()} == pytest.approx(exact, rel=0.05)
    loss_sum(losses).backward()
    assert without_gradient(model) == []
