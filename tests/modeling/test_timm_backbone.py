# SPDX-License-Identifier: Apache-2.0
"""Networks of timm as backbones: names, strides, frozen parts, whole detectors, clear refusals."""

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from detectron2.utils.events import EventStorage
from torch import nn
from util import loss_sum, random_input, tiny, without_gradient

from d2_decouple.checkpoint import Checkpointer
from d2_decouple.config import configs_root, get_config
from d2_decouple.modeling import timm_backbone
from d2_decouple.modeling.timm_backbone import TimmBackbone, timm_pixels

timm = pytest.importorskip("timm")

NET = "test_resnet"  # 32 channels at stride 2, then 32, 48, 192, 96
CONVNEXT = "test_convnext"  # 24, 32, 48, 64 from stride 4 on


def test_options_of_a_recipe_may_be_lists():
    net = instantiate(L(TimmBackbone)(name=CONVNEXT, options=dict(depths=[1, 2, 1, 1])))
    assert [len(stage.blocks) for stage in net.net.children() if hasattr(stage, "blocks")] == [
        *(1, 2, 1, 1)
    ]


def test_maps_have_names_by_stride_and_are_timms_own():
    torch.manual_seed(0)
    ours = TimmBackbone(name=NET).eval()
    assert ours.output_shape() == {
        "res2": ShapeSpec(channels=32, stride=4),
        "res3": ShapeSpec(channels=48, stride=8),
        "res4": ShapeSpec(channels=192, stride=16),
        "res5": ShapeSpec(channels=96, stride=32),
    }
    plain = timm.create_model(NET, features_only=True).eval()
    plain.load_state_dict(ours.net.state_dict())
    image = torch.randn(2, 3, 64, 96)
    maps = ours(image)
    assert list(maps) == ["res2", "res3", "res4", "res5"]
    for got, want in zip(maps.values(), plain(image)[1:], strict=True):
        assert torch.equal(got, want)
    for name, shape in ours.output_shape().items():
        assert maps[name].shape == (2, shape.channels, 64 // shape.stride, 96 // shape.stride)


def test_what_is_behind_the_coarsest_map_is_not_built():
    whole = TimmBackbone(name=NET)
    part = TimmBackbone(name=NET, out_features=["res4", "res3"])
    assert list(part.output_shape()) == list(part(torch.randn(1, 3, 64, 64))) == ["res3", "res4"]
    names = {name for name, _ in part.named_parameters()}
    assert not any(name.startswith("net.layer4.") for name in names)
    assert names < {name for name, _ in whole.named_parameters()}


def test_channels_last_maps_are_turned():
    # Windows of 7 cells on P5 of a 224 x 224 image: each map is whole windows.
    options = {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    net = TimmBackbone(name="swin_tiny_patch4_window7_224", options=options).eval()
    shapes = {name: tuple(x.shape) for name, x in net(torch.randn(1, 3, 224, 224)).items()}
    assert shapes == {
        "res2": (1, 12, 56, 56),
        "res3": (1, 24, 28, 28),
        "res4": (1, 48, 14, 14),
        "res5": (1, 96, 7, 7),
    }
    with pytest.raises(ValueError, match=r"cannot take images of \(64, 96\) pixels .*dynamic_img"):
        net(torch.randn(1, 3, 64, 96))
    net = TimmBackbone(
        name="swin_tiny_patch4_window7_224", options={**options, "dynamic_img_size": True}
    )
    assert net(torch.randn(1, 3, 64, 96))["res3"].shape == (1, 24, 8, 12)


def frozen_of(net):
    """Leading names of parameters without and with gradients."""
    parts = {True: set(), False: set()}
    for name, parameter in net.net.named_parameters():
        parts[parameter.requires_grad].add(name.split(".")[0])
    return parts[False], parts[True]


@pytest.mark.parametrize(
    ("name", "freeze_at", "frozen"),
    [
        (NET, 0, set()),
        (NET, 1, {"conv1"}),  # bn1 becomes a frozen one, without parameters
        (NET, 2, {"conv1", "layer1"}),
        (NET, 4, {"conv1", "layer1", "layer2", "layer3"}),
        (CONVNEXT, 1, {"stem_0", "stem_1"}),
        (CONVNEXT, 3, {"stem_0", "stem_1", "stages_0", "stages_1"}),
        ("test_efficientnet", 1, {"conv_stem", "blocks"}),  # blocks.0 has stride 2
    ],
)
def test_frozen_stages(name, freeze_at, frozen):
    net = TimmBackbone(name=name, freeze_at=freeze_at)
    found, learning = frozen_of(net)
    assert found == frozen
    if name != "test_efficientnet":
        assert not found & learning
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(x.requires_grad for norm in norms for x in norm.parameters())


def test_frozen_stages_and_norms_stay_as_they_are():
    net = TimmBackbone(name=NET, freeze_at=2, freeze_norms=False).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    sum(x.square().mean() for x in net(torch.randn(2, 3, 64, 64)).values()).backward()
    optimizer.step()
    after = net.state_dict()
    changed = {key.split(".")[1] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"layer2", "layer3", "layer4"}
    frozen = TimmBackbone(name=NET, freeze_norms=True)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    assert frozen.state_dict().keys() <= before.keys()


def test_norms_that_hold_an_activation_keep_it_when_frozen():
    image = torch.randn(1, 3, 64, 64)
    plain = TimmBackbone(name="test_efficientnet").eval()
    frozen = TimmBackbone(name="test_efficientnet", freeze_norms=True).eval()
    frozen.load_state_dict(plain.state_dict(), strict=False)
    for got, want in zip(frozen(image).values(), plain(image).values(), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("freeze_at", [6, 7, -1])
def test_a_stage_that_there_is_not(freeze_at):
    with pytest.raises(ValueError, match=rf"freeze_at is {freeze_at}; {NET} has the stages \[1, 2"):
        TimmBackbone(name=NET, freeze_at=freeze_at)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(name="test_resne"), r"timm has no network 'test_resne'; did you mean 'test_resnet'"),
        (dict(name="resnet18.a1_in"), r"no weights 'a1_in' of resnet18; did you mean 'a1_in1k'"),
        (dict(name="test_vit"), r"strides \[16, 16, 16\], which are no pyramid.*docs/backbones.md"),
        (
            dict(name=NET, out_features=["res6"]),
            r"has the maps .* wanted are \['res6'\]; .*out_fea",
        ),
        (dict(name=NET, out_features=[]), r"wanted are none; .*out_features"),
        (dict(name=NET, options={"checkpoint_path": "x"}), r"\['checkpoint_path'\], .*init_check"),
        (dict(name=NET, options={"no_such": 1}), r"timm cannot build test_resnet .*no_such"),
    ],
)
def test_what_cannot_be_built(options, message):
    with pytest.raises(ValueError, match=message):
        TimmBackbone(**options)


def test_without_timm(monkeypatch):
    def without(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(timm_backbone.importlib, "import_module", without)
    for call in (lambda: TimmBackbone(name=NET), lambda: timm_pixels(NET)):
        with pytest.raises(ValueError, match=r'needs the package timm .*"d2-decouple\[timm\]"'):
            call()


def test_pretrained_is_timms_business(monkeypatch):
    asked = []
    create = timm.create_model

    def keep(name, *, pretrained, **options):
        asked.append((name, pretrained))
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", keep)
    TimmBackbone(name=NET, pretrained=True)
    TimmBackbone(name=NET)
    assert asked == [(NET, True), (NET, False)]


def test_pixels_of_timms_weights():
    # 255 * 0.485 = 123.675, 255 * 0.229 = 58.395
    assert timm_pixels("resnet18.a1_in1k") == {
        "pixel_mean": [123.675, 116.28, 103.53],
        "pixel_std": [58.395, 57.12, 57.375],
        "input_format": "RGB",
    }
    assert timm_pixels("resnet18.a1_in1k", "BGR")["pixel_mean"] == [103.53, 116.28, 123.675]
    assert timm_pixels("test_convnext.r160_in1k")["pixel_std"] == [127.5, 127.5, 127.5]
    with pytest.raises(ValueError, match="input_format is 'L'; wanted is RGB or BGR"):
        timm_pixels("resnet18.a1_in1k", "L")


def on_timm(recipe, name, channels):
    """A small detector of a recipe on a network of timm, by the recipes' own function."""
    file = configs_root() / "common" / "models" / "backbones.py"
    cfg = tiny(get_config(recipe))
    LazyConfig.load(str(file), "put_under")(cfg.model, L(TimmBackbone)(name=name), channels)
    return cfg


def test_a_detector_trains_and_evaluates():
    cfg = on_timm("tscode_fcos_R_50_FPN_1x", CONVNEXT, 24)
    model = instantiate(cfg.model)
    assert model.input_format == "RGB"
    assert model.head.context.finer_channels == 24
    for objects in (3, 0):
        model.zero_grad()
        with EventStorage():
            losses = model([random_input((64, 96), objects), random_input((101, 67), 0)])
        assert all(torch.isfinite(loss) for loss in losses.values())
        loss_sum(losses).backward()
        assert without_gradient(model) == []
    with torch.no_grad():
        (result,) = model.eval()([random_input((75, 90), 0)])
    assert result["instances"].image_size == (75, 90)


@pytest.mark.parametrize("wrapped", [False, True])
def test_timms_own_file_loads(tmp_path, wrapped):
    plain = timm.create_model(CONVNEXT)
    state = plain.state_dict()
    file = tmp_path / "convnext.pth"
    torch.save({"state_dict": state} if wrapped else state, file)
    model = instantiate(on_timm("fcos_R_50_FPN_1x", CONVNEXT, 24).model)
    Checkpointer(model).load(str(file))
    ours = model.backbone.bottom_up.net.state_dict()
    assert torch.equal(
        ours["stages_1.blocks.0.mlp.fc1.weight"], state["stages.1.blocks.0.mlp.fc1.weight"]
    )
    assert all(torch.equal(value, state[_their_name(name)]) for name, value in ours.items())


def _their_name(name):
    head, _, rest = name.partition(".")
    return f"{head.replace('_', '.')}.{rest}"
