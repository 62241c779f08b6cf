# SPDX-License-Identifier: Apache-2.0
"""The authors' Decoupled R-CNN under our names: all of it, or an error that says what not."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import official_decoupled_rcnn as official
import pytest
import torch
from detectron2.config import instantiate
from official_decoupled_rcnn import (
    COUNTER,
    HEAD,
    R50,
    R101,
    TINY,
    TINY_DOUBLE,
    TINY_SHARED,
    TINY_SINGLE,
    X101_32,
    X101_64,
    Network,
    save,
)
from torch import Tensor

from d2_decouple.checkpoint import Checkpointer
from d2_decouple.checkpoint.convert import main
from d2_decouple.checkpoint.convert_decoupled_rcnn import convert_decoupled_rcnn, roi_heads_name
from d2_decouple.config import get_config
from d2_decouple.engine.predictor import Predictor

METHOD = "decoupled_rcnn"
NONE = "no recipe here is of"
RECIPE = """
from official_decoupled_rcnn import TINY, model_of
from d2_decouple.config import get_config

cfg = get_config("decoupled_rcnn_R_18_FPN_bccd")
model, dataloader, train = model_of(TINY), cfg.dataloader, cfg.train
dataloader.test.mapper.augmentations[0].update(short_edge_length=96, max_size=160)
"""


def single(network: Network) -> Network:
    return replace(network, stages=1, numbered=False)


SINGLE = single(R50)
SHARED = replace(SINGLE, head="shared")
DOUBLE = replace(R50, head="double")
# Network, recipe (without its beginning), entries of the file, parameters of the heads.
MODELS: dict[str, tuple[Network, str | None, int, int]] = {
    "R-50, 3 stages": (R50, "R_50_FPN_2x", 364, 56_001_945),
    "R-101, 3 stages": (R101, "R_101_FPN_2x", 670, 56_001_945),
    "X-101-32x4d, 3 stages": (X101_32, "X_101_32x4d_FPN_2x", 670, 56_001_945),
    "X-101-64x4d, 3 stages": (X101_64, "X_101_64x4d_FPN_2x_ms", 670, 56_001_945),
    "R-50, 1 stage": (SINGLE, "R_50_FPN_1x_single", 352, 28_202_385),
    "R-101, 1 stage": (single(R101), "R_101_FPN_1x_single", 658, 28_202_385),
    "X-101-32x4d, 1 stage": (single(X101_32), "X_101_32x4d_FPN_1x_single", 658, 28_202_385),
    "X-101-64x4d, 1 stage": (single(X101_64), None, 658, 28_202_385),
    "R-50, 1 stage, shared FC": (SHARED, "R_50_FPN_1x_shared", 348, 14_306_705),
    "R-50, 1 stage, double head": (
        replace(SINGLE, head="double"),
        "R_50_FPN_1x_double",
        438,
        19_894_161,
    ),
    "R-50, 3 stages, double head": (DOUBLE, "R_50_FPN_1x_double_cascade", 622, 31_077_273),
    "R-101, 3 stages, double head": (replace(R101, head="double"), None, 928, 31_077_273),
}


def empty(model: Any) -> Any:
    """A detector without memory for its values."""
    with torch.device("meta"):
        return instantiate(model)


def shapes_of(tensors: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def is_dropped(name: str) -> bool:
    return name.startswith("backbone.") and name.endswith(COUNTER)


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_has_its_place_and_every_place_its_tensor(name: str) -> None:
    network, recipe, entries, parameters = MODELS[name]
    state = official.numbered(network)
    model = empty(official.model_of(network))
    assert len(state) == entries
    tensors, description, advice = convert_decoupled_rcnn(state)
    assert description == f"{name}, 80 classes"
    assert shapes_of(tensors) == shapes_of(model.state_dict())
    # Each was filled with a number of its own.
    places = sorted(int(x.flatten()[0]) for x in tensors.values())
    assert places == [place for place, key in enumerate(state) if not is_dropped(key)]
    assert sum(x.numel() for x in model.roi_heads.parameters()) == parameters
    buffers = re.compile(r".*(running_mean|running_var|num_batches_tracked)")
    theirs = {key: x for key, x in state.items() if key.startswith("roi_head.")}
    assert sum(x.numel() for key, x in theirs.items() if not buffers.match(key)) == parameters
    if recipe is None:
        assert advice.startswith(f"{NONE} {name}: write one on decoupled_rcnn_R_50_FPN_2x")
    else:
        recipe = f"decoupled_rcnn_{recipe}"
        several_sizes = "; if its name has 'mstrain', with --config-file " + recipe + "_ms"
        ending = several_sizes if name == "X-101-32x4d, 3 stages" else ""
        first = f"--config-file {recipe} --eval-only train.init_checkpoint=FILE"
        assert advice.endswith(first + ending)
        assert shapes_of(tensors) == shapes_of(empty(get_config(recipe).model).state_dict())


RPN, BRANCHES = "proposal_generator.rpn_head", "roi_heads.box_branches"
BODY = "backbone.bottom_up"
RENAMED = {
    "backbone.conv1.weight": f"{BODY}.stem.conv1.weight",
    "backbone.bn1.running_var": f"{BODY}.stem.conv1.norm.running_var",
    "backbone.layer1.0.conv2.weight": f"{BODY}.res2.0.conv2.weight",
    "backbone.layer3.5.bn3.bias": f"{BODY}.res4.5.conv3.norm.bias",
    "backbone.layer4.0.downsample.0.weight": f"{BODY}.res5.0.shortcut.weight",
    "backbone.layer2.0.downsample.1.running_mean": f"{BODY}.res3.0.shortcut.norm.running_mean",
    "neck.lateral_convs.0.conv.weight": "backbone.fpn_lateral2.weight",
    "neck.fpn_convs.3.conv.bias": "backbone.fpn_output5.bias",
    "rpn_head.rpn_conv.weight": f"{RPN}.conv.weight",
    "rpn_head.rpn_cls.bias": f"{RPN}.objectness_logits.bias",
    "rpn_head.rpn_reg.weight": f"{RPN}.anchor_deltas.weight",
}
HEADS: dict[str, tuple[Network, dict[str, str]]] = {
    "cascade": (
        TINY,
        {
            "0.cls_fcs.0.weight": "roi_heads.class_branch.head.fc1.weight",
            "0.cls_fcs.1.bias": "roi_heads.class_branch.head.fc2.bias",
            "0.fc_cls.weight": "roi_heads.class_branch.cls_score.weight",
            "0.reg_fcs.0.bias": f"{BRANCHES}.0.head.fc1.bias",
            "0.fc_reg.weight": f"{BRANCHES}.0.bbox_pred.weight",
            "1.reg_fcs.1.weight": f"{BRANCHES}.1.head.fc2.weight",
            "2.fc_reg.bias": f"{BRANCHES}.2.bbox_pred.bias",
        },
    ),
    "one stage": (
        TINY_SINGLE,
        {
            "cls_fcs.1.weight": "roi_heads.class_branch.head.fc2.weight",
            "reg_fcs.0.weight": f"{BRANCHES}.0.head.fc1.weight",
            "fc_reg.bias": f"{BRANCHES}.0.bbox_pred.bias",
        },
    ),
    "shared FC": (
        TINY_SHARED,
        {
            "shared_fcs.0.weight": "roi_heads.class_branch.head.fc1.weight",
            "shared_fcs.1.bias": "roi_heads.class_branch.head.fc2.bias",
            "fc_cls.bias": "roi_heads.class_branch.cls_score.bias",
            "fc_reg.weight": f"{BRANCHES}.0.bbox_pred.weight",
        },
    ),
    "double head": (
        TINY_DOUBLE,
        {
            "0.fc_branch.0.weight": "roi_heads.class_branch.head.fc1.weight",
            "0.res_block.conv1.conv.weight": f"{BRANCHES}.0.head.0.conv1.weight",
            "1.res_block.conv2.bn.weight": f"{BRANCHES}.1.head.0.conv2.norm.weight",
            "2.res_block.conv_identity.conv.weight": f"{BRANCHES}.2.head.0.shortcut.weight",
            "2.res_block.conv_identity.bn.bias": f"{BRANCHES}.2.head.0.shortcut.norm.bias",
            "1.conv_branch.0.conv3.weight": f"{BRANCHES}.1.head.1.conv3.weight",
            f"1.conv_branch.3.bn2.{COUNTER}": f"{BRANCHES}.1.head.4.conv2.norm.{COUNTER}",
            "1.fc_reg.weight": f"{BRANCHES}.1.bbox_pred.weight",
        },
    ),
}


@pytest.mark.parametrize("kind", HEADS)
def test_names(kind: str) -> None:
    network, heads = HEADS[kind]
    state = official.numbered(network)
    tensors = convert_decoupled_rcnn(state).tensors
    renamed = RENAMED | {HEAD + theirs: ours for theirs, ours in heads.items()}
    for theirs, ours in renamed.items():
        assert torch.equal(tensors[ours], state[theirs]), theirs
    for theirs, ours in heads.items():
        assert f"roi_heads.{roi_heads_name(f'bbox_head.{theirs}')}" == ours


@pytest.mark.parametrize("head", ["fc", "shared", "double"])
@pytest.mark.parametrize("stages", [1, 2, 11])
def test_any_number_of_stages(stages: int, head: str) -> None:
    network = replace(TINY, stages=stages, head=head)
    model = empty(official.model_of(network))
    state = official.numbered(network)
    tensors = convert_decoupled_rcnn(state).tensors
    assert shapes_of(tensors) == shapes_of(model.state_dict())
    last = f"{stages - 1}.fc_reg.bias"
    ours = f"{BRANCHES}.{last.replace('fc_reg', 'bbox_pred')}"
    assert torch.equal(tensors[ours], state[HEAD + last])


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "training": official.training_file,
    "training, module.": lambda state: official.training_file(state, "module."),
    "published": lambda state: {
        key: x for key, x in official.training_file(state).items() if key != "optimizer"
    },
    "bare": lambda state: state,
    "bare, module.": lambda state: {f"module.{name}": x for name, x in state.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_file(layout: str, tmp_path: Path, capsys: Any) -> None:
    state = official.numbered(R50)
    file = save(LAYOUTS[layout](state), tmp_path / "epoch_24.pth")
    out = tmp_path / "new" / "ours.pth"
    assert main([METHOD, file, str(out)]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    for part in ("decoupled_rcnn: 311 tensors", "R-50, 3 stages, 80 classes", file, str(out)):
        assert part in said
    content = torch.load(out, weights_only=True)
    want = convert_decoupled_rcnn(state).tensors
    assert content["model"].keys() == want.keys()
    assert all(torch.equal(content["model"][name], x) for name, x in want.items())
    assert content["converted"] == {"method": METHOD, "file": "epoch_24.pth"}


def test_a_converted_file_detects(tmp_path: Path, capsys: Any) -> None:
    """From the authors' file to boxes on a picture, in a network that is small but whole."""
    state = official.drawn(TINY)
    file = save(official.training_file(state), tmp_path / "epoch_24.pth")
    out, recipe = tmp_path / "ours.pth", tmp_path / "tiny.py"
    recipe.write_text(RECIPE)
    assert main([METHOD, file, str(out)]) == 0
    assert "R-50 (res2 4 wide), 3 stages, 3 classes" in capsys.readouterr().out
    classes = ["ant", "bee", "cat"]
    predictor = Predictor.from_config(recipe, out, classes=classes, device="cpu")
    picture = np.random.default_rng(0).integers(256, size=(75, 110, 3), dtype=np.uint8)
    found = predictor(picture)
    assert len(found) > 5
    boxes = found.pred_boxes.tensor
    assert (boxes <= torch.tensor([110.0, 75, 110, 75])).all()
    assert len(found.pred_classes.unique()) > 1
    # As an evaluation loads it: nothing may stay random.
    model = instantiate(get_config(recipe).model)
    Checkpointer(model, complete=True).load(str(out), checkpointables=[])
    weights = model.state_dict()
    for name, value in convert_decoupled_rcnn(state).tensors.items():
        assert torch.equal(weights[name], value), name


@pytest.mark.parametrize("network", [R101, SINGLE, SHARED, DOUBLE])
def test_other_classes_are_to_be_typed(network: Network) -> None:
    tensors, _, advice = convert_decoupled_rcnn(official.numbered(replace(network, classes=20)))
    recipe, _, *overrides, _ = advice.partition("--config-file ")[2].split()
    assert overrides == ["model.roi_heads.num_classes=20"]
    model = empty(get_config(recipe, overrides).model)
    assert shapes_of(tensors) == shapes_of(model.state_dict())


def test_advice_for_other_networks() -> None:
    others = {
        "R-50, 2 stages": replace(R50, stages=2),
        "R-50, 3 stages": replace(R50, hidden=512),
        "R-50, 3 stages, double head": replace(DOUBLE, wide=512),
        "R-50 (res2 4 wide), 1 stage": TINY_SINGLE,
        "R-152, 3 stages": replace(R50, blocks=(3, 8, 36, 3)),
    }
    for name, network in others.items():
        advice = convert_decoupled_rcnn(official.numbered(network)).advice
        assert advice.startswith(f"{NONE} {name}: write one on decoupled_rcnn_R_50_FPN_2x")
