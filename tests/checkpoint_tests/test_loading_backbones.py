# SPDX-License-Identifier: Apache-2.0
"""The checkpointer loads a backbone's weights from other projects into every kind of detector."""

import json
import logging
import pickle
import random

import numpy as np
import pytest
import torch
from backbone_models import STAGES, grey_levels, largest_difference, their_features, their_resnet
from detectron2.config import get_cfg, instantiate
from detectron2.modeling import build_model

from d2_decouple.checkpoint import Checkpointer, CheckpointError, DamagedCheckpointError
from d2_decouple.config import get_config

IN_3X3 = "model.backbone.bottom_up.stages.stride_in_1x1=False"


def ours(name="fcos_R_18_FPN_bccd", *overrides):
    return instantiate(get_config(name, overrides).model)


def detectron2s(name):
    """A ResNet-50-FPN detector of Detectron2's own, from its yacs config."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = name
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = STAGES
    cfg.MODEL.FPN.IN_FEATURES = STAGES[1:]
    if name == "RetinaNet":
        cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    else:
        cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
        levels = ["p3", "p4", "p5", "p6"]
        cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = levels
        cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
        cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
        cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 1, 8
    return build_model(cfg)


def difference(model, theirs):
    """Of all four stages, the input normalised by the model itself (BGR)."""
    rgb, backbone = grey_levels(), model.eval().backbone.bottom_up
    maps = backbone(model.preprocess_image([{"image": rgb.flip(0)}]).tensor)
    return largest_difference([maps[name] for name in STAGES], their_features(theirs, rgb))


MODELS = {
    "fcos_R_18": (18, lambda: ours()),
    "fcos_R_50": (50, lambda: ours("fcos_R_50_FPN_1x", IN_3X3)),
    "retinanet": (50, lambda: detectron2s("RetinaNet")),
    "faster_rcnn": (50, lambda: detectron2s("GeneralizedRCNN")),
}


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_torchvisions_weights_by_name(kind, tmp_path, monkeypatch, caplog):
    depth, build = MODELS[kind]
    theirs, asked = their_resnet(depth), []

    def download(url, dst, hash_prefix, progress):
        asked.append(url)
        torch.save(theirs.state_dict(), dst)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    model = build()
    with caplog.at_level(logging.INFO, logger="d2_decouple"):
        Checkpointer(model).load(f"torchvision://resnet{depth}")
    assert len(asked) == 1
    assert difference(model, theirs) < 1e-4
    assert f"ResNet-{depth} with batch norm of torchvision or timm" in caplog.text
    bottom_up = len(model.backbone.bottom_up.state_dict())
    assert f"Loaded {bottom_up} of {len(model.state_dict())} tensors" in caplog.text
    assert "have no place" not in caplog.text


@torch.no_grad()
def test_a_file_of_a_training_script(tmp_path):
    theirs, model = their_resnet(18), ours()
    content = {"epoch": 3, "arch": "resnet18", "state_dict": theirs.state_dict()}
    torch.save(content, tmp_path / "last.pth.tar")
    Checkpointer(model).load(str(tmp_path / "last.pth.tar"))
    assert difference(model, theirs) < 1e-4


@torch.no_grad()
def test_timms_file(tmp_path):
    """As on the hub: safetensors, and the normalisation beside it."""
    library = pytest.importorskip("safetensors.torch")
    theirs, model = their_resnet(18), ours()
    library.save_file(theirs.state_dict(), str(tmp_path / "model.safetensors"))
    said = {"pretrained_cfg": {"mean": [0.485, 0.456, 0.406], "std": [0.5, 0.5, 0.5]}}
    (tmp_path / "config.json").write_text(json.dumps(said))
    Checkpointer(model).load(str(tmp_path / "model.safetensors"))
    assert difference(model, theirs) > 1e-2
    theirs.conv1.weight *= torch.tensor([0.229, 0.224, 0.225]).view(-1, 1, 1) / 0.5
    assert difference(model, theirs) < 1e-4

    (tmp_path / "cut.safetensors").write_bytes(b"12345678abc")
    with pytest.raises(DamagedCheckpointError, match=r"cut\.safetensors cannot be read"):
        Checkpointer(model).load(str(tmp_path / "cut.safetensors"))


def test_what_would_be_worse_without_a_word_is_refused(tmp_path):
    torch.save(their_resnet(50).state_dict(), tmp_path / "resnet50.pth")
    with pytest.raises(CheckpointError, match=r"stages\.stride_in_1x1=False"):
        Checkpointer(ours("fcos_R_50_FPN_1x")).load(str(tmp_path / "resnet50.pth"))
    with pytest.raises(CheckpointError, match="ResNet-50 with batch norm does not fit the model's"):
        Checkpointer(ours()).load(str(tmp_path / "resnet50.pth"))


def test_a_backbone_is_not_enough_to_evaluate(tmp_path):
    torch.save(their_resnet(18).state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(CheckpointError, match="would keep random values"):
        Checkpointer(ours(), complete=True).load(str(tmp_path / "resnet18.pth"))


def test_a_name_that_does_not_exist():
    with pytest.raises(CheckpointError, match="'torchvision://resnet18'"):
        Checkpointer(ours()).load("torchvision://resnet8")


def test_a_whole_detector_keeps_its_values(tmp_path):
    """Not even the first convolution is touched when a checkpoint of our own is loaded."""
    source, model = ours(), ours()
    torch.save({"model": source.state_dict()}, tmp_path / "model_final.pth")
    Checkpointer(model, complete=True).load(str(tmp_path / "model_final.pth"))
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in source.state_dict().items())


@pytest.mark.parametrize("kind", ["zip", "old", "pkl"])
def test_whatever_is_wrong_with_a_file_is_called_damaged(kind, tmp_path):
    """Cut anywhere, or with bytes that another program wrote: never a bare KeyError."""
    model, path = torch.nn.Linear(2, 2), tmp_path / ("x.pkl" if kind == "pkl" else "x.pth")
    if kind == "pkl":
        path.write_bytes(pickle.dumps({"model": {"bias": np.zeros(2)}, "__author__": "somebody"}))
    else:
        state = {"model": model.state_dict()}
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    whole, draw, refused = path.read_bytes(), random.Random(0), 0
    for number in range(200):
        content = bytearray(whole)
        if number % 2:
            content = content[: draw.randrange(len(whole))]
        else:
            for _ in range(3):
                content[draw.randrange(len(whole))] = draw.randrange(256)
        path.write_bytes(content)
        try:
            Checkpointer(model)._load_file(str(path))
        except DamagedCheckpointError:
            refused += 1
    assert refused >= 100  # what only changes a number is not found
