# SPDX-License-Identifier: Apache-2.0
"""SALT-Net's recipes: what they change of a host, and what the fact sheet says of them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone import BasicStem
from omegaconf import OmegaConf
from torch import nn
from util import loss_sum, random_input, tiny, tiny_model, without_gradient

from d2_decouple.config import config_names, configs_root, find_config, get_config
from d2_decouple.layers.deform import DeformConv, OffsetDeformConv
from d2_decouple.layers.res2net import DeepStem
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
# Their networks: channels of res3's 3x3 convolutions, stages that deform, and numbers in offsets.
# Of a convolution of C channels these are 9 * C * 18 weights and 18 biases; res3, res4 and res5
# have 4, 23 and 3 blocks, with 256, 512 and 1,024 such channels, or three times 52, 104 and 208.
LARGE: dict[str, tuple[int, list[str], int]] = {
    "X_101_32x4d_DCN": (256, ["res4", "res5"], 23 * 82962 + 3 * 165906),
    "X_101_32x4d_DCNX": (256, ["res3", "res4", "res5"], 4 * 41490 + 23 * 82962 + 3 * 165906),
    "R2_101_DCN": (52, ["res4", "res5"], 3 * (23 * 16866 + 3 * 33714)),
    "R2_101_DCNX": (52, ["res3", "res4", "res5"], 3 * (4 * 8442 + 23 * 16866 + 3 * 33714)),
}
OPTIONS = {  # Tables 1 and 2
    "rpoints": SALTOptions(class_points="box", use_skip=False),
    "cpoints": SALTOptions(class_points="free", use_skip=False),
    "noskip": SALTOptions(use_skip=False),
    "sum": SALTOptions(class_points="sum"),
}
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
        *("salt_R_50_FPN_2x_ms", "salt_dpe_R_50_FPN_1x", "salt_R_101_FPN_2x_ms"),
        *(f"salt_{kind}_FPN_2x_ms" for kind in LARGE),
        *(f"salt_R_50_FPN_1x_{kind}" for kind in OPTIONS),
        *("salt_R_50_FPN_1x_s1", "salt_R_50_FPN_1x_nosdr_s1"),
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
        kind = name.removeprefix("salt_R_50_FPN_1x_")
        assert model.head.aligner.options == OPTIONS.get(kind, SALTOptions())
    assert model.losses["loss_box_coarse"] == GIoUTerm(weight=1.0, boxes=coarse_boxes)
    without = name.endswith(("_free", *OPTIONS)) or any(
        kind in name for kind in ("fcos", "atss", "nosdr")
    )
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


# The large backbones.


def parameters_of(module: nn.Module, ending: str = "") -> int:
    return sum(x.numel() for name, x in module.named_parameters() if ending in name)


@pytest.mark.parametrize("kind", LARGE)
def test_large_backbones(kind: str) -> None:
    """Sheet 9: deformable convolutions of the first version, in these stages alone."""
    width, deformed, offsets = LARGE[kind]
    bottom_up = full_size(f"salt_{kind}_FPN_2x_ms").backbone.bottom_up
    for stage, blocks in (("res2", 3), ("res3", 4), ("res4", 23), ("res5", 3)):
        assert len(getattr(bottom_up, stage)) == blocks
        for block in getattr(bottom_up, stage):
            inner = list(block.convs) if kind.startswith("R2") else [block.conv2]
            assert block.conv1.stride == (1, 1)
            assert {isinstance(conv, DeformConv) for conv in inner} == {stage in deformed}
            assert {x.in_channels // 2 ** int(stage[3]) for x in inner} == {width // 8}
            assert {x.groups for x in inner} == {1 if kind.startswith("R2") else 32}
    assert not any(getattr(x, "modulated", False) for x in bottom_up.modules())
    assert not any(getattr(x, "deform_modulated", False) for x in bottom_up.modules())
    assert parameters_of(bottom_up, "offset") == offsets
    assert type(bottom_up.stem) is (DeepStem if kind.startswith("R2") else BasicStem)
    norms = [x for x in bottom_up.modules() if type(x).__name__.endswith("BatchNorm2d")]
    assert {type(x) for x in norms} == {FrozenBatchNorm2d}
    frozen = [name for name, x in bottom_up.named_parameters() if not x.requires_grad]
    assert {name.split(".")[0] for name in frozen} == {"stem", "res2"}


def test_convolutions_of_the_large_backbones() -> None:
    """As published, less their classifiers and norms: timm's 45,225,920 and 44,177,704.

    A norm has two numbers a channel; of 1,000 classes the classifier has 2,049,000. Channels with
    a norm are 59,594 in Res2Net-101, and in ResNeXt-101: 64 of the stem, (2 * 128 + 256) * 3,
    (2 * 256 + 512) * 4, (2 * 512 + 1024) * 23, (2 * 1024 + 2048) * 3 of the blocks and 256 + 512 +
    1024 + 2048 of the shortcuts, together 68,928.
    """
    for kind, published, channels in (
        ("R2_101_DCN", 45_225_920, 59_594),
        ("X_101_32x4d_DCN", 44_177_704, 68_928),
    ):
        bottom_up = full_size(f"salt_{kind}_FPN_2x_ms").backbone.bottom_up
        found = parameters_of(bottom_up) - LARGE[kind][2]
        assert found == published - 2_049_000 - 2 * channels


@pytest.mark.parametrize("kind", ["X_101_32x4d", "R2_101"])
def test_extended_recipes_have_norms_in_the_pyramid_and_towers_that_deform(kind: str) -> None:
    """Of the second version, with 27 * 9 * 256 + 27 numbers; 8 convolutions trade 256 for 512."""
    plain, extended = (full_size(f"salt_{kind}_{x}_FPN_2x_ms") for x in ("DCN", "DCNX"))
    assert parameters_of(plain.head) == 6329411
    assert parameters_of(extended.head) == 6329411 + 2 * 62235
    for tower in (extended.head.cls_subnet, extended.head.bbox_subnet):
        convs = [x for x in tower if hasattr(x, "kernel_size")]
        assert [isinstance(x, OffsetDeformConv) for x in convs] == [False, False, True]
        assert convs[-1].modulated
    sizes = [
        parameters_of(x.backbone) - parameters_of(x.backbone.bottom_up) for x in (plain, extended)
    ]
    assert sizes[1] - sizes[0] == 8 * 256
    pyramid = extended.backbone
    for conv in (*pyramid.lateral_convs, *pyramid.output_convs, *pyramid.top_block.children()):
        assert conv.bias is None
        assert conv.norm.num_groups == 32
        assert getattr(conv, "activation", None) is None
    assert not any(isinstance(x, nn.GroupNorm) for x in plain.backbone.modules())


@pytest.mark.parametrize("kind", ["R_101", *LARGE])
def test_large_recipes_change_only_the_network(kind: str) -> None:
    ours, base = get_config(f"salt_{kind}_FPN_2x_ms"), get_config("salt_R_50_FPN_2x_ms")
    weights = ours.train.init_checkpoint
    assert weights != base.train.init_checkpoint
    base.train.init_checkpoint = weights
    for key in ("dataloader", "optimizer", "lr_multiplier", "train"):
        assert plain(ours[key]) == plain(base[key])
    model, other = plain(ours.model), plain(base.model)
    for part in (model, other):
        del part["backbone"]["bottom_up"]
        part["backbone"].pop("norm", None)
        part["backbone"]["top_block"].pop("norm", None)
        del part["head"]["tower"]
    assert model == other


def test_p6_and_p7_with_norms() -> None:
    """Without a bias, and without a ReLU between them; drawn as without norms."""
    torch.manual_seed(0)
    block = LinearP6P7(64, 64, "p5", norm="GN")
    for conv in (block.p6, block.p7):
        nn.init.normal_(conv.norm.weight)
        nn.init.normal_(conv.norm.bias)
    x = torch.randn(2, 64, 9, 6)
    found = block(x)
    for conv, y, size in zip((block.p6, block.p7), found, ((5, 3), (3, 2)), strict=True):
        x = F.conv2d(x, conv.weight, None, 2, padding=1)
        groups = x.unflatten(1, (32, 2)).flatten(2)
        variance, mean = torch.var_mean(groups, 2, correction=0, keepdim=True)
        x = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(2, 64, *size)
        x = x * conv.norm.weight[:, None, None] + conv.norm.bias[:, None, None]
        torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-5)
    names = {f"{x}.{y}weight" for x in ("p6", "p7") for y in ("", "norm.")}
    assert set(block.state_dict()) == {*names, "p6.norm.bias", "p7.norm.bias"}
    # Uniform within sqrt(3 / (9 * 64)) of 0.
    assert block.p7.weight.abs().max() <= (3 / 576) ** 0.5
    assert block.p7.weight.std().item() == pytest.approx((1 / 576) ** 0.5, rel=0.05)
    assert block.in_feature == "p5"
    assert block.num_levels == 2


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
