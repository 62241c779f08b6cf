# SPDX-License-Identifier: Apache-2.0
"""Detectron2's usual start, MSRA's ResNet-50 in Caffe2's names, through our checkpointer."""

import logging
import pickle

import numpy as np
import pytest
import torch
from backbone_models import Detector, our_resnet
from detectron2.config import instantiate

from d2_decouple.checkpoint import Checkpointer
from d2_decouple.checkpoint.backbones import fit_backbone
from d2_decouple.config import get_config

BLOCKS = {2: 3, 3: 4, 4: 6, 5: 3}
# Caffe2's names of the convolutions of a block; the short names of norms are of Detectron's days.
BRANCHES = {"branch1": "shortcut", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}
LONG = {"weight": "gamma", "bias": "beta", "running_mean": "running_mean"}
LONG["running_var"] = "running_var"
SHORT = {"weight": "s", "bias": "b"}


def caffe2_blobs(norm_names):
    """Arrays with random values as in such a file, and where Detectron2 has each of them."""
    shapes = our_resnet(50, in_1x1=True).state_dict()
    generator = np.random.default_rng(0)
    blobs, places = {}, {}

    def add(blob, place):
        blobs[blob] = generator.random(tuple(shapes[place].shape), dtype=np.float32)
        places[place] = blob

    add("conv1_w", "stem.conv1.weight")
    for value, short in norm_names.items():
        add(f"res_conv1_bn_{short}", f"stem.conv1.norm.{value}")
    for stage, count in BLOCKS.items():
        for block in range(count):
            for branch, layer in BRANCHES.items():
                if layer == "shortcut" and block:
                    continue
                caffe2, ours = f"res{stage}_{block}_{branch}", f"res{stage}.{block}.{layer}"
                add(f"{caffe2}_w", f"{ours}.weight")
                for value, short in norm_names.items():
                    add(f"{caffe2}_bn_{short}", f"{ours}.norm.{value}")
    # What the classifier had besides.
    blobs["conv1_b"] = np.zeros(64, np.float32)
    blobs["fc1000_w"], blobs["fc1000_b"] = np.zeros((1000, 2048), np.float32), np.zeros(1000)
    return blobs, places


@pytest.mark.parametrize("kind", ["detectron2", "detectron", "blobs"])
def test_all_tensors_of_the_backbone_land(kind, tmp_path, caplog):
    blobs, places = caffe2_blobs(LONG if kind == "detectron2" else SHORT)
    blobs["conv1_w_momentum"] = np.zeros(1, np.float32)
    content = {"blobs": blobs, "cfg": "MODEL: {}"} if kind == "blobs" else blobs
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content, protocol=2))

    model = instantiate(get_config("fcos_R_50_FPN_1x").model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level(logging.INFO, logger="d2_decouple"):
        Checkpointer(model).load(str(tmp_path / "R-50.pkl"))
    after = model.state_dict()
    for place, blob in places.items():
        found = after[f"backbone.bottom_up.{place}"]
        assert torch.equal(found, torch.from_numpy(blobs[blob])), place
    bottom_up = {name for name in after if name.startswith("backbone.bottom_up.")}
    if kind == "detectron2":
        assert bottom_up == {f"backbone.bottom_up.{place}" for place in places}
    else:  # merged norms, which only scale and shift
        statistics = {n for n in bottom_up if n.endswith(("running_mean", "running_var"))}
        assert bottom_up - statistics == {f"backbone.bottom_up.{place}" for place in places}
    rest = [name for name in after if name not in bottom_up]
    assert all(torch.equal(before[name], after[name]) for name in rest)
    assert "3 in the file have no place: fc1000.bias, fc1000.weight, stem" in caplog.text


def test_strides_in_another_place_are_doubted(caplog):
    blobs, _ = caffe2_blobs(LONG)
    checkpoint = {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}
    assert fit_backbone(checkpoint, Detector(our_resnet(50, in_1x1=True))) == checkpoint
    assert not caplog.records
    assert fit_backbone(checkpoint, Detector(our_resnet(50))) == checkpoint
    assert "stages.stride_in_1x1=True (yacs: MODEL.RESNETS.STRIDE_IN_1X1 True)" in caplog.text
