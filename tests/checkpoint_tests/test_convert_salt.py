# SPDX-License-Identifier: Apache-2.0
"""The authors' SALT-Net and GFLv2 under our names: all of it, in our order, to detect with."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import official_salt as official
import pytest
import torch
from detectron2.config import instantiate
from official_salt import (
    BINS,
    GFLV2,
    HEAD,
    R2,
    R50,
    TINY,
    TINY_GFLV2,
    X101,
    X101X,
)
from torch import Tensor

from d2_decouple.checkpoint import Checkpointer
from d2_decouple.checkpoint.convert import CONVERTERS, main
from d2_decouple.checkpoint.convert_salt import convert_gflv2, convert_salt, salt_left_out
from d2_decouple.config import get_config
from d2_decouple.engine.predictor import Predictor

RECIPE = """
import official_salt as official
from detectron2.config import LazyCall as L
from util import tiny
from d2_decouple.config import get_config

cfg = tiny(get_config("salt_R_50_FPN_1x"), convs=3)
model, dataloader, train = cfg.model, cfg.dataloader, cfg.train
model.backbone.bottom_up = L(official.narrow_resnet)()
dataloader.test.mapper.augmentations[0].update(short_edge_length=96, max_size=160)
"""
COUNTERS_R50 = 53  # norms
# Of theirs those of the backbone count no frozen norm; the head's are the sheet's.
MODELS = {
    "salt": (R50, "salt_R_50_FPN_2x_ms", 391, 6_331_716),
    "gflv2": (GFLV2, "gflv2_R_50_FPN_1x", 372, None),
}


def empty_model(name: str) -> Any:
    """A recipe's detector without memory for its values."""
    with torch.device("meta"):
        return instantiate(get_config(name).model)


@pytest.mark.parametrize("method", MODELS)
def test_every_tensor_has_its_place_and_every_place_its_tensor(method: str) -> None:
    network, recipe, entries, parameters = MODELS[method]
    state = official.numbered(network)
    assert len(state) == entries
    head = sum(x.numel() for key, x in state.items() if key.startswith(HEAD) and key != BINS)
    assert parameters in (head, None)
    tensors, description, advice = CONVERTERS[method](state)
    model = empty_model(recipe)
    assert {key: tuple(x.shape) for key, x in tensors.items()} == {
        key: tuple(x.shape) for key, x in model.state_dict().items()
    }
    assert description == "R-50, 80 classes, without the authors' last one"
    assert advice == (
        f"evaluate it with --config-file {recipe} --eval-only train.init_checkpoint=FILE"
    )
    # Each was filled with a number of its own. Those of a level's factors are in one tensor.
    found = sorted({int(x) for x in torch.cat([x.flatten()[:5] for x in tensors.values()])})
    aside = [key for key in state if key.endswith("num_batches_tracked") or key == BINS]
    assert len(aside) == COUNTERS_R50 + 1
    assert found == [place for place, key in enumerate(state) if key not in aside]


def test_parameters_are_the_authors_but_a_class() -> None:
    """That is a row of 256 x 3 x 3 weights and a bias."""
    head = [x.numel() for key, x in empty_model("salt_R_50_FPN_1x").head.state_dict().items()]
    assert sum(head) == 6_331_716 - 256 * 9 - 1


RENAMED = {
    "backbone.conv1.weight": "backbone.bottom_up.stem.conv1.weight",
    "backbone.bn1.running_var": "backbone.bottom_up.stem.conv1.norm.running_var",
    "backbone.layer1.0.conv2.weight": "backbone.bottom_up.res2.0.conv2.weight",
    "backbone.layer3.5.bn3.bias": "backbone.bottom_up.res4.5.conv3.norm.bias",
    "backbone.layer4.0.downsample.0.weight": "backbone.bottom_up.res5.0.shortcut.weight",
    "backbone.layer2.0.downsample.1.bias": "backbone.bottom_up.res3.0.shortcut.norm.bias",
    "neck.lateral_convs.0.conv.weight": "backbone.fpn_lateral3.weight",
    "neck.fpn_convs.2.conv.bias": "backbone.fpn_output5.bias",
    "neck.fpn_convs.3.conv.weight": "backbone.top_block.p6.weight",
    "neck.fpn_convs.4.conv.bias": "backbone.top_block.p7.bias",
    f"{HEAD}cls_convs.0.conv.weight": "head.cls_subnet.0.weight",
    f"{HEAD}reg_convs.2.gn.bias": "head.bbox_subnet.7.bias",
    f"{HEAD}salt_reg.weight": "head.predictor.bbox_pred.weight",
    f"{HEAD}reg_conf.2.bias": "head.predictor.reg_conf.2.bias",
    f"{HEAD}reg_init_out.conv.weight": "head.aligner.coarse_subnet.0.weight",
    f"{HEAD}reg_init_out.bn.bias": "head.aligner.coarse_subnet.1.bias",
    f"{HEAD}reg_init_out.regression.weight": "head.aligner.coarse_pred.weight",
    f"{HEAD}salt_reg_conv.bn.weight": "head.aligner.box_align.norm.weight",
    f"{HEAD}salt_cls_refinement.conv.bias": "head.aligner.vector_subnet.0.bias",
    f"{HEAD}salt_cls_refinement.bn.weight": "head.aligner.vector_subnet.1.weight",
    f"{HEAD}salt_cls_conv.bn.weight": "head.aligner.cls_align.norm.weight",
}


def test_names() -> None:
    state = official.numbered(R50)
    tensors = convert_salt(state).tensors
    for theirs, ours in RENAMED.items():
        assert torch.equal(tensors[ours], state[theirs]), theirs
    for name, ours in (("scales", "predictor"), ("scales_init", "aligner")):
        want = torch.stack([state[f"{HEAD}{name}.{level}.scale"] for level in range(5)])
        assert torch.equal(tensors[f"head.{ours}.scales"], want)


LARGE = {
    "salt_X_101_32x4d_DCN_FPN_2x_ms": (X101, "X-101-32x4d-DCN"),
    "salt_X_101_32x4d_DCNX_FPN_2x_ms": (
        X101X,
        "X-101-32x4d-DCN, GN in the pyramid, DCN in the towers",
    ),
    "salt_R2_101_DCN_FPN_2x_ms": (R2, "R2-101-26w4s-DCN"),
    "salt_R2_101_DCNX_FPN_2x_ms": (
        replace(R2, deformed=(2, 3, 4), norms=True, deformed_towers=True),
        "R2-101-26w4s-DCN, GN in the pyramid, DCN in the towers",
    ),
}


@pytest.mark.parametrize("recipe", LARGE)
def test_large_networks(recipe: str) -> None:
    """DCN; DCNX has norms in the pyramid and deformable towers, too."""
    network, described = LARGE[recipe]
    state = official.numbered(network)
    tensors, description, advice = convert_salt(state)
    assert description == f"{described}, 80 classes, without the authors' last one"
    assert f" --config-file {recipe} " in advice
    model = empty_model(recipe)
    assert {key: tuple(x.shape) for key, x in tensors.items()} == {
        key: tuple(x.shape) for key, x in model.state_dict().items()
    }
    conv, inner = ("convs.2", "convs.2") if network.base_width else ("conv2", "conv2")
    offset = f"{inner}.conv_offset" if network.base_width else "conv2_offset"
    places = {
        f"backbone.layer3.0.{conv}.weight": f"backbone.bottom_up.res4.0.{inner}.weight",
        f"backbone.layer3.0.{conv}.conv_offset.bias": f"backbone.bottom_up.res4.0.{offset}.bias",
    }
    if network.base_width:
        places |= {
            "backbone.stem.3.weight": "backbone.bottom_up.stem.conv2.weight",
            "backbone.stem.7.bias": "backbone.bottom_up.stem.conv3.norm.bias",
            "backbone.layer2.3.bns.1.bias": "backbone.bottom_up.res3.3.convs.1.norm.bias",
            "backbone.layer2.0.downsample.1.weight": "backbone.bottom_up.res3.0.shortcut.weight",
        }
    if network.norms:
        places |= {
            "neck.lateral_convs.1.gn.bias": "backbone.fpn_lateral4.norm.bias",
            "neck.fpn_convs.3.gn.weight": "backbone.top_block.p6.norm.weight",
            f"{HEAD}reg_convs.2.conv.conv_offset.weight": "head.bbox_subnet.6.conv_offset.weight",
            f"{HEAD}cls_convs.2.conv.conv_offset.bias": "head.cls_subnet.6.conv_offset.bias",
        }
    for theirs, ours in places.items():
        assert torch.equal(tensors[ours], state[theirs]), theirs


def with_rows(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    """The state in which each row of these tensors is filled with its number."""
    rows = {}
    for name in names:
        shape = state[name].shape
        rows[name] = torch.arange(float(shape[0])).view(-1, *[1] * (len(shape) - 1)).expand(shape)
    return {**state, **rows}


def test_rows_of_points_and_fractions() -> None:
    """Theirs: y before x, points by taps, S0 to S3 of the left, top, right and bottom point."""
    layers = (f"{HEAD}salt_cls_refinement.proposal", f"{HEAD}reg_init_out.scale_fs")
    names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    tensors = convert_salt(with_rows(official.numbered(TINY), *names)).tensors
    # x and y of the points left (tap 3), top (1), right (5), bottom (7), then 0, 2, 4, 6, 8.
    vectors = [7, 6, 3, 2, 11, 10, 15, 14, 1, 0, 5, 4, 9, 8, 13, 12, 17, 16]
    # S5 is x and S4 y of point 0, S7 and S6 of point 2, and so on.
    fractions = [0, 1, 2, 3, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12]
    for name, rows in (("vector_pred", vectors), ("fraction_pred", fractions)):
        weight = tensors[f"head.aligner.{name}.weight"]
        want = torch.tensor(rows, dtype=torch.float32)
        assert torch.equal(tensors[f"head.aligner.{name}.bias"], want)
        assert torch.equal(weight, want.view(-1, 1, 1, 1).expand_as(weight))


def test_taps() -> None:
    state = dict(official.numbered(TINY))
    name = f"{HEAD}salt_reg_conv.conv.weight"
    state[name] = torch.arange(9.0).view(3, 3).expand(64, 64, 3, 3)
    found = convert_salt(state).tensors["head.aligner.box_align.conv.weight"]
    assert found[5, 7].tolist() == [[3, 1, 5], [7, 0, 2], [4, 6, 8]]


def test_the_last_class_is_left_out() -> None:
    names = (f"{HEAD}salt_cls.weight", f"{HEAD}salt_cls.bias")
    state = with_rows(official.numbered(TINY), *names)
    tensors, kept = convert_salt(state).tensors, salt_left_out(state)
    assert tensors["head.cls_score.bias"].tolist() == [0, 1, 2]
    assert tensors["head.cls_score.weight"][:, 0, 0, 0].tolist() == [0, 1, 2]
    assert kept[names[1]].tolist() == [3]
    assert torch.equal(kept[names[0]], torch.full((1, 64, 3, 3), 3.0))
    # What is written holds nothing of what is left out.
    for name in ("head.cls_score.bias", "head.cls_score.weight"):
        assert tensors[name].untyped_storage().nbytes() == 4 * tensors[name].numel()
    assert len(kept) == COUNTERS_R50 + 1 + 2


def test_without_counters() -> None:
    network = replace(TINY, counters=False)
    state = official.numbered(network)
    assert (
        convert_salt(state).tensors.keys() == convert_salt(official.numbered(TINY)).tensors.keys()
    )
    assert salt_left_out(state).keys() == {BINS, f"{HEAD}salt_cls.weight", f"{HEAD}salt_cls.bias"}


def save(content: Any, path: Path) -> str:
    torch.save(content, path)
    return str(path)


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "trained": official.training_file,
    "state_dict": lambda state: {"state_dict": state},
    "bare": lambda state: state,
    "bare, module.": lambda state: {f"module.{name}": x for name, x in state.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_file(layout: str, tmp_path: Path, capsys: Any) -> None:
    state = official.numbered(TINY)
    file = save(LAYOUTS[layout](state), tmp_path / "official.pth")
    out = tmp_path / "new" / "ours.pth"
    assert main(["salt", file, str(out)]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    for part in ("salt: 329 tensors", "R-50 (res2 8 wide)", "3 classes", file, str(out)):
        assert part in said
    content = torch.load(out, weights_only=True)
    want = convert_salt(state).tensors
    assert content["model"].keys() == want.keys()
    assert all(torch.equal(content["model"][name], x) for name, x in want.items())
    assert content.keys() == {"model", "converted"}
    assert content["converted"].keys() == {"method", "file", "left_out"}


def test_a_converted_file_detects(tmp_path: Path) -> None:
    """From the authors' file to boxes on a picture, in a network that is small but whole."""
    file = save(official.training_file(official.drawn(TINY)), tmp_path / "official.pth")
    out, recipe = tmp_path / "ours.pth", tmp_path / "tiny.py"
    recipe.write_text(RECIPE)
    assert main(["salt", file, str(out)]) == 0
    predictor = Predictor.from_config(recipe, out, classes=["ant", "bee", "cat"], device="cpu")
    picture = np.random.default_rng(0).integers(256, size=(75, 110, 3), dtype=np.uint8)
    found = predictor(picture)
    assert len(found) > 5
    assert len(found.pred_classes.unique()) > 1
    # As an evaluation loads it: nothing may stay random.
    model = instantiate(get_config(recipe).model)
    Checkpointer(model, complete=True).load(str(out), checkpointables=[])
    weights = model.state_dict()
    for name, value in convert_salt(official.drawn(TINY)).tensors.items():
        assert torch.equal(weights[name], value), name


def test_advice_for_other_networks() -> None:
    """Of another width; of other classes, whose number is to be typed; of no recipe."""
    assert "no recipe here is of R-50 (res2 8 wide): write one on gflv2_R_50_FPN_1x" in (
        convert_gflv2(official.numbered(TINY_GFLV2)).advice
    )
    voc = official.numbered(replace(R50, classes=20))
    assert " model.num_classes=20 train.init_checkpoint=FILE" in convert_salt(voc).advice
    narrow = convert_salt(official.numbered(replace(R50, channels=64))).advice
    assert narrow == "no recipe here is of R-50: write one on salt_R_50_FPN_2x_ms"
