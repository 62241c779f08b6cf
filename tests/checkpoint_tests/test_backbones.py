# SPDX-License-Identifier: Apache-2.0
"""A converted ResNet of torchvision or timm sees what it saw there, and misfits are named."""

import json
import logging
import re

import pytest
import torch
import torchvision
from backbone_models import (
    PIXEL_MEAN,
    STAGES,
    Detector,
    grey_levels,
    largest_difference,
    our_resnet,
    randomized,
    their_features,
    their_resnet,
)
from detectron2.modeling.backbone import Backbone, BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import nn

from d2_decouple.checkpoint.backbones import (
    IMAGENET,
    Normalization,
    _normalization,
    convert_resnet,
    fit_backbone,
    unwrap,
)
from d2_decouple.checkpoint.errors import CheckpointError

BGR_STD = [57.375, 57.120, 58.395]
INPUTS = {"bgr": ("BGR", 1.0), "bgr_std": ("BGR", BGR_STD), "rgb_std": ("RGB", BGR_STD[::-1])}


def load(detector, weights, filename=""):
    """Into the detector, nothing left over and nothing missing."""
    fitted = fit_backbone(unwrap(weights), detector, filename=str(filename))
    detector.load_state_dict(fitted["model"])
    return detector


@pytest.mark.parametrize("depth", [18, 34, 50])
@pytest.mark.parametrize("kind", INPUTS)
@torch.no_grad()
def test_features_are_torchvisions(kind, depth):
    theirs = their_resnet(depth)
    ours = load(Detector(our_resnet(depth), *INPUTS[kind]), theirs.state_dict())
    rgb = grey_levels()
    assert largest_difference(ours.features(rgb), their_features(theirs, rgb)) < 1e-4


@torch.no_grad()
def test_the_oracle_sees_an_order_or_scale_that_is_wrong():
    theirs, rgb = their_resnet(18), grey_levels()
    for wrong in (dict(input_format="RGB"), dict(pixel_std=BGR_STD)):
        given = dict(input_format="BGR", pixel_mean=PIXEL_MEAN[::-1], pixel_std=[1.0] * 3)
        ours = Detector(our_resnet(18))
        weights = convert_resnet(theirs.state_dict(), **{**given, **wrong})
        ours.load_state_dict(weights, strict=False)
        assert largest_difference(ours.features(rgb), their_features(theirs, rgb)) > 1e-2


@torch.no_grad()
def test_grouped_and_wide_blocks():
    """ResNeXt differs in the groups, a wide ResNet in the width of its 3x3 convolutions."""
    options = {
        "resnext50_32x4d": dict(num_groups=32, bottleneck_channels=128),
        "wide_resnet50_2": dict(bottleneck_channels=128),
    }
    rgb = grey_levels(64, 64)
    for name, option in options.items():
        theirs = randomized(torchvision.models.get_model(name, weights=None))
        ours = Detector(resnet_of_width(**option))
        load(ours, theirs.state_dict())
        assert largest_difference(ours.features(rgb), their_features(theirs, rgb)) < 1e-4
    with pytest.raises(CheckpointError, match=r"res2\.0\.conv1\.weight is \(128, .* \(64, "):
        load(Detector(our_resnet(50)), theirs.state_dict())


def resnet_of_width(*, bottleneck_channels, num_groups=1):
    stages, channels = [], 64
    for index, blocks in enumerate((3, 4, 6, 3)):
        wide = 256 * 2**index
        stages.append(
            ResNet.make_stage(
                BottleneckBlock,
                blocks,
                stride_per_block=[1 if index == 0 else 2] + [1] * (blocks - 1),
                in_channels=channels,
                out_channels=wide,
                bottleneck_channels=bottleneck_channels * 2**index,
                num_groups=num_groups,
                norm="FrozenBN",
                stride_in_1x1=False,
            )
        )
        channels = wide
    return ResNet(BasicStem(norm="FrozenBN"), stages, out_features=STAGES, freeze_at=0).eval()


@torch.no_grad()
def test_another_mean_is_evened_out_by_the_norm(tmp_path):
    """timm's config.json beside the file says it; close to the border a padded zero differs."""
    half = (0.5, 0.5, 0.5)
    theirs, rgb = their_resnet(18), grey_levels(160, 160)
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": dict(mean=half, std=half)}))
    ours = load(Detector(our_resnet(18)), theirs.state_dict(), tmp_path / "model.safetensors")
    maps, wanted = ours.features(rgb)[:1], their_features(theirs, rgb, half, half)[:1]
    assert largest_difference(maps, wanted) > 1e-3
    middle = [[x[..., 9:-9, 9:-9] for x in these] for these in (maps, wanted)]
    assert largest_difference(*middle) < 1e-4

    given = dict(input_format="BGR", pixel_mean=PIXEL_MEAN[::-1], pixel_std=[1.0] * 3)
    state = {name: x for name, x in theirs.state_dict().items() if "running" not in name}
    with pytest.raises(CheckpointError, match=r"pixel_mean=\[127\.50,127\.50,127\.50\]"):
        convert_resnet(state, **given, normalization=Normalization(half, half))


@pytest.mark.parametrize("text", ["[1]", "{", '{"mean": 3}', '{"pretrained_cfg": {"mean": [1]}}'])
def test_another_programs_config_is_passed_over(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    theirs = their_resnet(18).state_dict()
    plain = fit_backbone(unwrap(theirs), Detector(our_resnet(18)))["model"]
    beside = fit_backbone(
        unwrap(theirs), Detector(our_resnet(18)), filename=str(tmp_path / "weights.pth")
    )["model"]
    assert all(torch.equal(plain[name], beside[name]) for name in plain)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state", ""])
def test_wrappers_and_the_prefix_of_parallel_training(wrapper):
    theirs = their_resnet(18)
    state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    ours = load(Detector(our_resnet(18)), {wrapper: state} if wrapper else state)
    bias = ours.backbone.bottom_up.res3[0].shortcut.norm.bias
    assert torch.equal(bias, theirs.layer2[0].downsample[1].bias)


def test_what_is_left_out_is_said(caplog):
    with caplog.at_level(logging.INFO):
        load(Detector(our_resnet(18)), their_resnet(18).state_dict())
    assert "ResNet-18 with batch norm of torchvision or timm: 100 tensors" in caplog.text
    assert "BGR and pixel_std (1.0, 1.0, 1.0); left out: fc.weight, fc.bias" in caplog.text


def test_a_batch_norm_that_learns_gets_its_counters():
    theirs = their_resnet(18)
    theirs.bn1.num_batches_tracked.fill_(7)
    ours = load(Detector(our_resnet(18, norm="BN")), theirs.state_dict())
    assert ours.backbone.bottom_up.stem.conv1.norm.num_batches_tracked == 7


def test_strides_in_another_place_are_refused():
    state = their_resnet(50).state_dict()
    with pytest.raises(CheckpointError, match=r"stages\.stride_in_1x1=False.*STRIDE_IN_1X1 False"):
        load(Detector(our_resnet(50, in_1x1=True)), state)


def test_another_depth_or_norm_is_named():
    deep, shallow = their_resnet(34).state_dict(), their_resnet(18).state_dict()
    with pytest.raises(CheckpointError, match=r"file's ResNet-34 .*model's ResNet-18 .*res2\.2"):
        load(Detector(our_resnet(18)), deep)
    with pytest.raises(CheckpointError, match=r"the file has no res2\.2\.conv1\.weight.*\.depth"):
        load(Detector(our_resnet(34)), shallow)
    with pytest.raises(CheckpointError, match=r"with batch norm .* with group norm: .*\.norm"):
        load(Detector(our_resnet(18, norm="GN")), shallow)


def test_a_stem_or_block_of_another_kind_is_named():
    state = their_resnet(18).state_dict()
    deep_stem = {name.replace("conv1.weight", "conv1.0.weight", 1): x for name, x in state.items()}
    with pytest.raises(CheckpointError, match=r"conv1\.0\.weight.*supported are ResNet-18"):
        load(Detector(our_resnet(18)), deep_stem)
    state["layer1.0.se.fc1.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"layer1\.0\.se\.fc1\.weight.*not its resnet50d"):
        load(Detector(our_resnet(18)), state)


def test_input_without_colours_or_normalisation_is_named():
    state, detector = their_resnet(18).state_dict(), Detector(our_resnet(18))
    detector.input_format = "L"
    with pytest.raises(CheckpointError, match=r"input_format is 'L'.*model\.input_format=BGR"):
        load(detector, state)
    with pytest.raises(CheckpointError, match="ResNet has no pixel_mean"):
        load(our_resnet(18), state)


@pytest.mark.parametrize("known", ["", "bottom_up.", "backbone.bottom_up."])
def test_detectron2s_own_names_with_a_part_of_the_prefix(known):
    source = our_resnet(18)
    state = {known + name: value for name, value in source.state_dict().items()}
    ours = load(Detector(our_resnet(18)), state)
    found = ours.backbone.bottom_up.state_dict()
    assert all(torch.equal(found[name], value) for name, value in source.state_dict().items())


@torch.no_grad()
def test_detectron2s_copy_of_torchvision_is_fitted_too():
    theirs, rgb = their_resnet(18), grey_levels()
    # In RGB with this std the first convolution stays as it is, which is how the copy is made.
    given = dict(input_format="RGB", pixel_mean=PIXEL_MEAN, pixel_std=BGR_STD[::-1], prefix="")
    state = convert_resnet(theirs.state_dict(), **given)
    assert torch.allclose(state["stem.conv1.weight"], theirs.conv1.weight)
    arrays = {n: x.numpy() for n, x in state.items() if not n.endswith("num_batches_tracked")}
    copy = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    fitted = fit_backbone(copy, Detector(our_resnet(18)))
    assert "matching_heuristics" not in fitted
    ours = load(Detector(our_resnet(18)), copy)
    assert largest_difference(ours.features(rgb), their_features(theirs, rgb)) < 1e-4
    with pytest.raises(CheckpointError, match=r"ResNet-18 .* does not fit the model's ResNet-50"):
        fit_backbone(copy, Detector(our_resnet(50, in_1x1=True)))


def test_detectors_and_strangers_stay_as_they_are():
    detector = Detector(our_resnet(18))
    strange = unwrap({"encoder.weight": torch.zeros(1)})
    assert fit_backbone(strange, detector) == strange
    whole = {"model": detector.state_dict(), "iteration": 3}
    assert fit_backbone(whole, detector) == whole
    theirs = {"model": their_resnet(18).state_dict()}
    assert fit_backbone(theirs, nn.Linear(1, 1)) == theirs  # no ResNet to fit them to


# What timm calls the convolutions of a bottleneck block, and their norms.
TIMM_NORMS = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3", "downsample.0": "downsample.1"}


def test_names_of_timm():
    """Without timm: what ``timm.create_model("resnet50")`` calls its tensors."""
    values = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["conv1.weight", *(f"bn1.{value}" for value in values), "fc.weight", "fc.bias"]
    for stage in range(1, 5):
        for layer, norm in TIMM_NORMS.items():
            names.append(f"layer{stage}.0.{layer}.weight")
            names += [f"layer{stage}.0.{norm}.{value}" for value in values]
    state = {name: torch.zeros(3, 3, 1, 1) for name in names}
    given = dict(input_format="RGB", pixel_mean=PIXEL_MEAN, pixel_std=[1.0] * 3, prefix="")
    found = set(convert_resnet(state, **given))
    wanted = our_resnet(50, norm="BN").state_dict()
    assert found == {name for name in wanted if re.match(r"stem|res\d\.0\.", name)}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@torch.no_grad()
def test_features_are_timms(name, tmp_path):
    timm = pytest.importorskip("timm")
    theirs, rgb = randomized(timm.create_model(name, pretrained=False)), grey_levels()
    ours = load(Detector(our_resnet(int(name[6:]))), theirs.state_dict())
    assert largest_difference(ours.features(rgb), their_features(theirs, rgb)) < 1e-4
    other = timm.create_model("resnet18d", pretrained=False).state_dict()
    with pytest.raises(CheckpointError, match=r"conv1\.0\.weight"):
        load(Detector(our_resnet(18)), other)


def config_beside(folder, text):
    (folder / "config.json").write_text(text)
    return str(folder / "a.pth")


@pytest.mark.parametrize(
    "text", ["{", "[" * 100_000, "[]", '{"mean": 1, "std": 1}', '{"mean": [1], "std": [1]}']
)
def test_a_config_of_another_program_says_nothing(tmp_path, text):
    assert _normalization(config_beside(tmp_path, text)) == IMAGENET


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ("[NaN, 0, 0]", "[1, 1, 1]"),
        ("[0, Infinity, 0]", "[1, 1, 1]"),
        ("[0, 0, 0]", "[1, 1, 0]"),
        ("[0, 0, 0]", "[1, -0.5, 1]"),
        ("[0, 0, 0]", "[NaN, 1, 1]"),
        ("[0, 0, 0]", "[1, Infinity, 1]"),
        (f"[{10**400}, 0, 0]", "[1, 1, 1]"),
    ],
)
def test_a_normalisation_that_cannot_be_is_named(tmp_path, mean, std):
    file = config_beside(tmp_path, f'{{"pretrained_cfg": {{"mean": {mean}, "std": {std}}}}}')
    with pytest.raises(CheckpointError, match=r"config\.json says .* delete it and ImageNet's"):
        _normalization(file)


def test_a_backbone_without_tensors_takes_nothing_from_a_file():
    """Half of its none are there, and the file's would be thrown away."""

    class Empty(Backbone):
        def forward(self, image):
            return {}

    model = nn.ModuleDict({"backbone": Empty(), "head": nn.Linear(2, 3)})
    checkpoint = {"model": {"weight": torch.zeros(3, 2)}}
    assert fit_backbone(checkpoint, model) == checkpoint
