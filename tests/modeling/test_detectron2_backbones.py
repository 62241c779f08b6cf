# SPDX-License-Identifier: Apache-2.0
"""Swin, MViT and ViTDet of a newer Detectron2 under every method; what an older one says."""

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.utils.events import EventStorage
from torch import nn
from util import WIDTH, loss_sum, random_input, tiny, without_gradient

from d2_decouple.checkpoint import Checkpointer
from d2_decouple.config import ConfigError, configs_root, get_config
from d2_decouple.modeling import detectron2_backbones as module
from d2_decouple.modeling.detectron2_backbones import (
    decayed_by_layer,
    mvit,
    simple_pyramid,
    swin,
    vit,
)

try:
    from detectron2.modeling.backbone import swin as _swin  # noqa: F401
except ImportError:
    HAS_THEM = False
else:
    HAS_THEM = True
needs_newer = pytest.mark.skipif(not HAS_THEM, reason="this Detectron2 is older than 2022")

SMALL_SWIN = dict(embed_dim=12, depths=[1, 1, 2, 1], num_heads=[1, 1, 1, 1], window_size=4)
SMALL_MVIT = dict(embed_dim=8, depth=4, last_block_indexes=[0, 1, 2, 3], window_size=8)
SMALL_VIT = dict(embed_dim=32, depth=2, num_heads=2, img_size=64, window_size=2, global_blocks=[1])
METHODS = [
    "fcos_R_50_FPN_1x",
    "atss_R_50_FPN_1x",
    "gfl_R_50_FPN_1x",
    "pdnet_R_50_FPN_1x",
    "tscode_gfl_R_50_FPN_1x",
    "salt_R_50_FPN_1x",
    "sapd_R_50_FPN_1x",
]
RECIPES = [
    "fcos_swin_tiny_FPN_1x",
    "fcos_mvitv2_tiny_FPN_1x",
    "gfl_vitdet_base_SFP_1x",
    "pdnet_swin_tiny_FPN_1x",
]


def part(name):
    """A function of the recipes' common part."""
    return LazyConfig.load(str(configs_root() / "common" / "models" / "backbones.py"), name)


def small(recipe, network):
    """A method's recipe on a small network."""
    cfg = tiny(get_config(recipe))
    if network == "swin":
        part("put_under")(cfg.model, L(swin)(**SMALL_SWIN), 12)
    elif network == "mvit":
        part("put_under")(cfg.model, L(mvit)(**SMALL_MVIT), 8)
    else:
        part("vitdet_base")(cfg.model)
        cfg.model.backbone.net.update(SMALL_VIT)
    return cfg


@needs_newer
@pytest.mark.parametrize("network", ["swin", "mvit", "vitdet"])
@pytest.mark.parametrize("recipe", METHODS)
def test_every_method_stands_on_every_network(recipe, network):
    if network == "vitdet" and recipe == "sapd_R_50_FPN_1x":
        recipe = "sapd_R_50_FPN_1x_nobfp"
    torch.manual_seed(0)
    model = instantiate(small(recipe, network).model)
    assert model.head.strides == (8, 16, 32, 64, 128)
    assert model.input_format == "RGB"
    assert model.pixel_std.flatten()[0].item() == pytest.approx(58.395)
    for batch in ([((64, 96), 3), ((101, 67), 0)], [((64, 64), 0)]):
        model.zero_grad()
        with EventStorage():
            losses = model([random_input(size, objects) for size, objects in batch])
        assert all(torch.isfinite(loss) for loss in losses.values()), losses
        loss_sum(losses).backward()
        assert without_gradient(model) == []
    model.eval()
    with torch.no_grad():
        (result,) = model([random_input((75, 90), 0)])
    assert result["instances"].image_size == (75, 90)


@needs_newer
@pytest.mark.parametrize(
    ("make", "channels"),
    [(lambda **x: swin(**SMALL_SWIN, **x), 12), (lambda **x: mvit(**SMALL_MVIT, **x), 8)],
    ids=["swin", "mvit"],
)
def test_maps_are_named_as_a_resnets(make, channels):
    net = make().eval()
    image = torch.randn(1, 3, 64, 96)
    maps, shapes = net(image), net.output_shape()
    assert list(maps) == list(shapes) == ["res2", "res3", "res4", "res5"]
    for index, (name, x) in enumerate(maps.items()):
        stride = 4 * 2**index
        assert shapes[name] == ShapeSpec(channels=channels * 2**index, stride=stride)
        assert x.shape == (1, channels * 2**index, 64 // stride, 96 // stride)
    less = make(out_features=["res4", "res3"])
    assert list(less(image)) == list(less.output_shape()) == ["res3", "res4"]
    with pytest.raises(
        ValueError, match=r"out_features is \['p3'\]; wanted are some of res2, res3"
    ):
        make(out_features=["p3"])


@needs_newer
def test_names_of_parameters_are_detectron2s():
    from detectron2.modeling.backbone.swin import SwinTransformer

    theirs = SwinTransformer(
        embed_dim=12, depths=(1, 1, 2, 1), num_heads=(1, 1, 1, 1), window_size=4
    ).eval()
    ours = swin(**SMALL_SWIN).eval()
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(1, 3, 64, 64)
    for got, want in zip(ours(image).values(), theirs(image).values(), strict=True):
        assert torch.equal(got, want)


@needs_newer
@pytest.mark.parametrize(
    ("freeze_at", "frozen"),
    [(0, set()), (1, {"patch_embed"}), (2, {"patch_embed", "layers.0"})],
)
def test_frozen_stages_of_swin(freeze_at, frozen):
    net = swin(**SMALL_SWIN, freeze_at=freeze_at)
    found = {
        ".".join(name.split(".")[: 2 if name.startswith("layers") else 1])
        for name, parameter in net.named_parameters()
        if not parameter.requires_grad
    }
    assert found == frozen


@needs_newer
def test_levels_of_the_simple_pyramid():
    top = LastLevelP6P7(WIDTH, WIDTH, "p5")
    pyramid = simple_pyramid(net=vit(**SMALL_VIT), out_channels=WIDTH, top_block=top, finest="p2")
    sizes = {name: tuple(x.shape[-2:]) for name, x in pyramid(torch.randn(1, 3, 64, 96)).items()}
    assert sizes == {
        "p2": (16, 24),
        "p3": (8, 12),
        "p4": (4, 6),
        "p5": (2, 3),
        "p6": (1, 2),
        "p7": (1, 1),
    }
    assert pyramid.size_divisibility == 32
    strides = {name: shape.stride for name, shape in pyramid.output_shape().items()}
    assert strides == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
    with pytest.raises(ValueError, match=r"finest is 'p4'; .* begins with one of p2, p3"):
        simple_pyramid(net=vit(**SMALL_VIT), out_channels=WIDTH, finest="p4")


def test_a_pyramid_of_several_maps_cannot_stand_on_a_vit():
    cfg = get_config("sapd_R_50_FPN_1x")
    with pytest.raises(ConfigError, match=r"BFP.* needs several maps .*sapd_R_50_FPN_1x_nobfp"):
        part("vitdet_base")(cfg.model)


@needs_newer
@pytest.mark.parametrize("network", ["swin", "vitdet"])
def test_a_file_of_the_network_alone_loads(network, tmp_path):
    cfg = small("fcos_R_50_FPN_1x", network)
    torch.manual_seed(0)
    source, model = instantiate(cfg.model), instantiate(cfg.model)
    inner = "bottom_up" if network == "swin" else "net"
    state = getattr(source.backbone, inner).state_dict()
    file = tmp_path / "imagenet.pth"
    torch.save({"model": {**state, "head.weight": torch.zeros(1000, 96)}}, file)
    Checkpointer(model).load(str(file))
    loaded = getattr(model.backbone, inner).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert model.head.cls_score.weight.ne(source.head.cls_score.weight).any()


class Blocks(nn.Module):
    """Names of a detector on a ViT of two blocks."""

    def __init__(self):
        super().__init__()
        net = nn.Module()
        net.pos_embed = nn.Parameter(torch.zeros(1))
        net.patch_embed = nn.Linear(1, 1, bias=False)
        net.blocks = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(2))
        self.backbone = nn.Module()
        self.backbone.net = net
        self.head = nn.Linear(1, 1, bias=False)


def test_earlier_blocks_learn_more_slowly():
    model = Blocks()
    groups = decayed_by_layer(
        model, base_lr=1.0, decay=0.5, depth=2, overrides={"pos_embed": {"weight_decay": 0.0}}
    )
    names = {id(x): name for name, x in model.named_parameters()}
    rates = {names[id(x)]: group["lr"] for group in groups for x in group["params"]}
    # Behind the blocks 1; the last one half of it, the first a quarter, what is before an eighth.
    assert rates == {
        "backbone.net.pos_embed": 0.125,
        "backbone.net.patch_embed.weight": 0.125,
        "backbone.net.blocks.0.weight": 0.25,
        "backbone.net.blocks.1.weight": 0.5,
        "head.weight": 1.0,
    }
    (embedding,) = [group for group in groups if group.get("weight_decay") == 0.0]
    assert [names[id(x)] for x in embedding["params"]] == ["backbone.net.pos_embed"]
    assert len(torch.optim.AdamW(groups, lr=1.0).param_groups) == 5


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_load_and_read_images_as_their_weights_want(name):
    cfg = get_config(name)
    assert cfg.model.input_format == cfg.dataloader.train.mapper.image_format == "RGB"
    assert cfg.model.pixel_mean == [123.675, 116.28, 103.53]
    assert cfg.optimizer.params.weight_decay_norm == 0.0
    if not HAS_THEM:
        with pytest.raises(ValueError, match=r"has no \w+ .*older than 2022.*install_detectron2"):
            instantiate(cfg.model)
        return
    with torch.device("cpu"):
        model = instantiate(cfg.model)
    parts = sum(x.numel() for x in model.backbone.parameters())
    assert 25e6 < parts < 95e6
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    counted = sum(len(group["params"]) for group in optimizer.param_groups)
    assert counted == sum(x.requires_grad for x in model.parameters())


@pytest.mark.parametrize(
    "make", [swin, mvit, vit, lambda: simple_pyramid(net=nn.Identity(), out_channels=8)]
)
def test_an_old_detectron2_is_named(make, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(module.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"has no \w+ \(No module .*tools/install_detectron2.py"):
        make()
