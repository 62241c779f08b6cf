# SPDX-License-Identifier: Apache-2.0
"""A Res2Net's weights of its authors, timm or mmdetection are found, fitted and told apart."""

import logging
from typing import Any

import pytest
import torch
from backbone_models import (
    MEAN,
    STAGES,
    STD,
    Detector,
    grey_levels,
    largest_difference,
    our_resnet,
)
from detectron2.modeling.backbone import ResNet
from res2net_reference import BLOCKS, PLANES, features, random_state
from torch import Tensor

from d2_decouple.checkpoint.backbones import fit_backbone, unwrap
from d2_decouple.checkpoint.errors import CheckpointError
from d2_decouple.checkpoint.res2net import holds_res2net, res2net_name
from d2_decouple.checkpoint.sources import _RESNET
from d2_decouple.layers.res2net import DeepStem, DeformRes2NetBlock, Res2NetBlock


def our_res2net(block: Any = Res2NetBlock, blocks: tuple[int, ...] = BLOCKS) -> ResNet:
    stages = [
        ResNet.make_stage(
            block,
            number,
            in_channels=2 * PLANES * 2**index if index else 64,
            out_channels=4 * PLANES * 2**index,
            bottleneck_channels=PLANES * 2**index,
            stride_per_block=[2 if index else 1] + [1] * (number - 1),
            norm="FrozenBN",
        )
        for index, number in enumerate(blocks)
    ]
    return ResNet(DeepStem(norm="FrozenBN"), stages, out_features=STAGES).eval()


def fitted(state: dict[str, Tensor], detector: Detector) -> dict[str, Tensor]:
    return fit_backbone(unwrap(state), detector)["model"]  # type: ignore[no-any-return]


@torch.no_grad()
@pytest.mark.parametrize("stem", ["timm", "mmdetection"])
@pytest.mark.parametrize("given", [("BGR", 1.0), ("RGB", [58.395, 57.120, 57.375])])
def test_features_are_those_of_the_original(
    stem: str, given: tuple[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    state, rgb = random_state(stem), grey_levels()
    detector = Detector(our_res2net(), *given)
    with caplog.at_level(logging.INFO):
        detector.load_state_dict(fitted(state, detector))
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (MEAN, STD))
    want = features(state, ((rgb / 255 - mean) / std)[None], stem=stem, averages=False)
    assert largest_difference(detector.features(rgb), want) < 1e-4
    assert "Res2Net of 2+1+3+1 blocks with batch norm" in caplog.text
    assert "left out: fc.weight, fc.bias" in caplog.text


def test_offsets_keep_their_zeros() -> None:
    detector = Detector(our_res2net(DeformRes2NetBlock))
    missing, unexpected = detector.load_state_dict(fitted(random_state(), detector), strict=False)
    assert unexpected == []
    assert len(missing) == 2 * 3 * sum(BLOCKS)
    assert all("conv_offset" in name for name in missing)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("conv1.3.weight", "stem.conv2.weight"),
        ("stem.4.running_var", "stem.conv2.norm.running_var"),
        ("bn1.bias", "stem.conv3.norm.bias"),
        ("stem.7.bias", "stem.conv3.norm.bias"),
        ("layer3.22.convs.2.weight", "res4.22.convs.2.weight"),
        ("layer3.22.convs.2.conv_offset.bias", "res4.22.convs.2.conv_offset.bias"),
        ("layer1.0.bns.1.num_batches_tracked", "res2.0.convs.1.norm.num_batches_tracked"),
        ("layer4.1.bn3.running_mean", "res5.1.conv3.norm.running_mean"),
        ("layer2.0.downsample.1.weight", "res3.0.shortcut.weight"),
        ("layer2.0.downsample.2.weight", "res3.0.shortcut.norm.weight"),
        ("conv1.weight", None),
        ("conv1.2.weight", None),
        ("stem.5.weight", None),
        ("layer1.0.conv2.weight", None),
        ("layer1.0.downsample.0.weight", None),
        ("layer5.0.conv1.weight", None),
        ("fc.weight", None),
    ],
)
def test_names(theirs: str, ours: str | None) -> None:
    assert res2net_name(theirs) == ours


def test_other_networks_are_not_taken_for_one() -> None:
    assert holds_res2net(random_state())
    assert not holds_res2net(["conv1.weight", "layer1.0.conv2.weight", "head.convs.0.weight"])


def test_a_resnet_and_a_res2net_do_not_fit_each_other() -> None:
    state = random_state()
    with pytest.raises(CheckpointError, match=r"Res2Net of .* does not fit the model's ResNet-18"):
        fitted(state, Detector(our_resnet(18)))
    deeper = Detector(our_res2net(blocks=(2, 2, 3, 1)))
    with pytest.raises(CheckpointError, match=r"the file has no res3\.1\.conv1\.weight"):
        fitted(state, deeper)
    del state["layer1.1.convs.2.weight"]
    with pytest.raises(CheckpointError, match=r"the file has no res2\.1\.convs\.2\.weight"):
        fitted(state, Detector(our_res2net()))


def test_first_versions_are_named() -> None:
    """A stem of one convolution, and shortcuts that do not average."""
    state = random_state()
    state["conv1.weight"] = torch.zeros(64, 3, 7, 7)
    state["layer1.0.downsample.0.weight"] = torch.zeros(1)
    with pytest.raises(
        CheckpointError, match=r"conv1\.weight, layer1\.0\.downsample\.0\.weight.*res2net101d, not"
    ):
        fitted(state, Detector(our_res2net()))
    state = {k: v for k, v in random_state().items() if not k.startswith("conv1.")}
    with pytest.raises(CheckpointError, match="the first convolution is missing"):
        fitted(state, Detector(our_res2net()))


def test_timms_names() -> None:
    for name in ("res2net50d", "res2net101d", "resnet50", "resnext101_32x4d"):
        assert _RESNET.fullmatch(name)
    for name in ("res2net101_26w_4s", "res2next50", "resnet50d", "res2net50d_x"):
        assert not _RESNET.fullmatch(name)
