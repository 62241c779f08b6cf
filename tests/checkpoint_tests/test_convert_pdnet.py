# SPDX-License-Identifier: Apache-2.0
"""The authors' PDNet under our names: all of it, in our order, or an error that says what not."""

import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import official_pdnet as official
import pytest
import torch
from detectron2.config import instantiate
from official_pdnet import BOUND, HEAD, PRED, R50, R101, SEMANTIC, TINY, X101, Network
from torch import Tensor
from util import tiny

from d2_decouple.checkpoint import Checkpointer, CheckpointError, DamagedCheckpointError
from d2_decouple.checkpoint.convert import CONVERTERS, convert_checkpoint, main
from d2_decouple.checkpoint.convert_pdnet import convert_pdnet
from d2_decouple.config import get_config
from d2_decouple.engine.predictor import Predictor

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"
RECIPE = """
from detectron2.config import LazyCall as L
from official_pdnet import TINY, narrow_resnet
from util import tiny
from d2_decouple.config import get_config

cfg = tiny(get_config("pdnet_R_50_FPN_2x_official"), convs=4)
model, dataloader, train = cfg.model, cfg.dataloader, cfg.train
model.backbone.bottom_up = L(narrow_resnet)()
model.backbone.top_block.in_channels = 8 * TINY.outputs
dataloader.test.mapper.augmentations[0].update(short_edge_length=96, max_size=160)
"""
MODELS = {
    "R-50": (R50, "pdnet_R_50_FPN_2x_official", 312, 36_438_938),
    "R-101": (R101, "pdnet_R_101_FPN_2x_official", 567, 55_378_842),
    "X-101-64x4d": (X101, "pdnet_X_101_64x4d_FPN_2x_official", 567, 94_187_418),
}
NUM_CONSTANTS = 104  # values of the two matrices: the authors' count of parameters has them


def empty_model(name: str, overrides: tuple[str, ...] = ()) -> Any:
    """A recipe's detector without memory for its values."""
    with torch.device("meta"):
        return instantiate(get_config(name, overrides).model)


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_has_its_place_and_every_place_its_tensor(name: str) -> None:
    network, recipe, entries, parameters = MODELS[name]
    state = official.numbered(network)
    model = empty_model(recipe)
    ours = model.state_dict()
    assert len(state) == entries
    assert sum(key.startswith(HEAD) for key in state) == 31
    tensors, description, advice = convert_pdnet(state)
    assert advice.endswith(f"--config-file {recipe} --eval-only train.init_checkpoint=FILE")
    assert {key: tuple(x.shape) for key, x in tensors.items()} == {
        key: tuple(x.shape) for key, x in ours.items()
    }
    # Each was filled with a number of its own.
    places = sorted(int(x.flatten()[0]) for x in tensors.values())
    assert places == [place for place, key in enumerate(state) if key not in official.CONSTANTS]
    assert description == f"{name}, 80 classes"
    frozen = re.compile(r".*(\.bn\d|\.downsample\.1)\..*")
    assert sum(x.numel() for key, x in state.items() if not frozen.match(key)) == parameters
    assert sum(x.numel() for x in model.parameters()) == parameters - NUM_CONSTANTS


RENAMED = {
    "backbone.body.stem.conv1.weight": "backbone.bottom_up.stem.conv1.weight",
    "backbone.body.stem.bn1.running_var": "backbone.bottom_up.stem.conv1.norm.running_var",
    "backbone.body.layer1.0.conv2.weight": "backbone.bottom_up.res2.0.conv2.weight",
    "backbone.body.layer3.5.bn3.bias": "backbone.bottom_up.res4.5.conv3.norm.bias",
    "backbone.body.layer4.0.downsample.0.weight": "backbone.bottom_up.res5.0.shortcut.weight",
    "backbone.body.layer2.0.downsample.1.running_mean": (
        "backbone.bottom_up.res3.0.shortcut.norm.running_mean"
    ),
    "backbone.fpn.fpn_inner2.weight": "backbone.fpn_lateral3.weight",
    "backbone.fpn.fpn_layer4.bias": "backbone.fpn_output5.bias",
    "backbone.fpn.top_blocks.p6.weight": "backbone.top_block.p6.weight",
    "backbone.fpn.top_blocks.p7.bias": "backbone.top_block.p7.bias",
    f"{HEAD}cls_conv_tower.0.weight": "head.cls_subnet.0.weight",
    f"{HEAD}reg_conv_tower.10.bias": "head.bbox_subnet.10.bias",
    f"{PRED}cls_map_pred.weight": "head.cls_score.weight",
    f"{PRED}cls_pred_collect.bias": "head.predictor.cls_score.bias",
}


def test_names() -> None:
    state = official.numbered(R50)
    tensors = convert_pdnet(state).tensors
    for theirs, ours in RENAMED.items():
        assert torch.equal(tensors[ours], state[theirs]), theirs


@pytest.mark.parametrize(("offsets", "modulated"), [(18, False), (27, True)])
def test_deformable_blocks(offsets: int, modulated: bool) -> None:
    network = Network(blocks=(3, 4, 23, 3), middle=256, groups=64, offsets=offsets)
    state = official.numbered(network)
    tensors, description, _ = convert_pdnet(state)
    name = "backbone.body.layer2.0.conv2"
    ours = "backbone.bottom_up.res3.0.conv2"
    assert torch.equal(tensors[f"{ours}_offset.weight"], state[f"{name}.offset.weight"])
    assert torch.equal(tensors[f"{ours}_offset.bias"], state[f"{name}.offset.bias"])
    assert torch.equal(tensors[f"{ours}.weight"], state[f"{name}.conv.weight"])
    assert description == "X-101-64x4d-DCN, 80 classes"
    stages = f"model.backbone.bottom_up.stages.deform_modulated={modulated}"
    model = empty_model("pdnet_X_101_64x4d_DCN_FPN_2xx", (stages,))
    assert {key: x.shape for key, x in tensors.items()} == {
        key: x.shape for key, x in model.state_dict().items()
    }


def test_rows_of_points_and_sides() -> None:
    """Theirs: top, left, bottom, right, and y before x."""
    state = dict(official.numbered(TINY))
    for name in ("dyn_pt_pred.weight", "dyn_pt_pred.bias", "reg_map_pred.weight"):
        shape = state[PRED + name].shape
        rows = torch.arange(float(len(state[PRED + name])))
        state[PRED + name] = rows.view(-1, *[1] * (len(shape) - 1)).expand(shape)
    tensors = convert_pdnet(state).tensors
    coarse, slides = [1, 0, 3, 2], [5, 4, 7, 6]
    points = [9, 8, 11, 10, 13, 12, 15, 14, 17, 16, 19, 18, 21, 20, 23, 22, 25, 24]
    levels = [28, 29, 26, 27, 32, 33, 30, 31]
    want = torch.tensor([*coarse, *slides, *points, *levels], dtype=torch.float32)
    found = tensors["head.predictor.point_pred.weight"]
    assert torch.equal(found, want[:, None, None, None].expand_as(found))
    assert torch.equal(tensors["head.predictor.point_pred.bias"], want)
    sides = tensors["head.predictor.bbox_pred.weight"]
    assert torch.equal(sides, torch.tensor([1.0, 0, 3, 2]).view(4, 1, 1, 1).expand_as(sides))


def save(content: Any, path: Path) -> str:
    torch.save(content, path)
    return str(path)


LAYOUTS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "trained on several GPUs": official.training_file,
    "model": lambda state: {"model": state},
    "bare": lambda state: state,
    "bare, module.": lambda state: {f"module.{name}": x for name, x in state.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_file(layout: str, tmp_path: Path, capsys: Any) -> None:
    state = official.numbered(R50)
    file = save(LAYOUTS[layout](state), tmp_path / "official.pth")
    out = tmp_path / "new" / "ours.pth"
    assert main(["pdnet", file, str(out)]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    for part in ("pdnet: 310 tensors", "R-50", "80 classes", file, str(out)):
        assert part in said
    content = torch.load(out, weights_only=True)
    want = convert_pdnet(state).tensors
    assert content["model"].keys() == want.keys()
    assert all(torch.equal(content["model"][name], x) for name, x in want.items())
    assert content.keys() == {"model", "converted"}
    assert [path.name for path in out.parent.iterdir()] == ["ours.pth"]


def test_a_converted_file_detects(tmp_path: Path, capsys: Any) -> None:
    """From the authors' file to boxes on a picture, in a network that is small but whole."""
    file = save(official.training_file(official.drawn(TINY)), tmp_path / "official.pth")
    out, recipe = tmp_path / "ours.pth", tmp_path / "tiny.py"
    recipe.write_text(RECIPE)
    assert main(["pdnet", file, str(out)]) == 0
    assert "R-50 (res2 8 wide), 3 classes" in capsys.readouterr().out
    classes = ["ant", "bee", "cat"]
    predictor = Predictor.from_config(recipe, out, classes=classes, device="cpu")
    picture = np.random.default_rng(0).integers(256, size=(75, 110, 3), dtype=np.uint8)
    found = predictor(picture)
    assert len(found) > 5
    boxes = found.pred_boxes.tensor
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes <= torch.tensor([110.0, 75, 110, 75])).all()
    assert len(found.pred_classes.unique()) > 1
    # As an evaluation loads it: nothing may stay random.
    model = instantiate(get_config(recipe).model)
    Checkpointer(model, complete=True).load(str(out), checkpointables=[])
    weights = model.state_dict()
    for name, value in convert_pdnet(official.drawn(TINY)).tensors.items():
        assert torch.equal(weights[name], value), name


def without(*names: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: {name: x for name, x in state.items() if name not in names}


def replaced(name: str, value: Any) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: {**state, name: value}


def moved(name: str, row: int) -> Callable[[dict[str, Tensor]], Any]:
    def change(state: dict[str, Tensor]) -> Any:
        matrix = state[name].clone()
        matrix[row] = 0.25
        return {**state, name: matrix}

    return change


def cut_off(state: dict[str, Tensor]) -> Any:
    """The last block of the third stage is gone."""
    return {name: x for name, x in state.items() if not name.startswith("backbone.body.layer3.5.")}


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], list[str]]] = {
    "missing": (
        without(f"{PRED}dyn_pt_pred.bias", "backbone.body.layer1.1.bn2.bias"),
        [
            "2 missing: backbone.body.layer1.1.bn2.bias (8)",
            f"{PRED}dyn_pt_pred.bias (34)",
            "of which there are 312",
        ],
    ),
    "unknown": (
        replaced("rpn.head.centerness.weight", torch.zeros(1, 64)),
        ["1 unknown (left over): rpn.head.centerness.weight (1, 64)"],
    ),
    "shape": (
        replaced(f"{HEAD}cls_conv_tower.3.weight", torch.zeros(64, 32, 3, 3)),
        [f"1 of another shape: {HEAD}cls_conv_tower.3.weight is (64, 32, 3, 3)", "(64, 64, 3, 3)"],
    ),
    "stem": (
        replaced("backbone.body.stem.conv1.weight", torch.zeros(15, 3, 7, 7)),
        ["backbone.body.stem.conv1.weight is (15, 3, 7, 7), wanted (16, 3, 7, 7)"],
    ),
    "classes": (
        replaced(f"{PRED}cls_pred_collect.bias", torch.zeros(4)),
        [f"{PRED}cls_map_pred.weight is (27, 64, 1, 1), wanted (36, 64, 1, 1)"],
    ),
    "one point for the class": (
        replaced(f"{PRED}cls_map_pred.weight", torch.zeros(3, 64, 1, 1)),
        [f"{PRED}cls_map_pred.weight is (3, 64, 1, 1), wanted (27, 64, 1, 1)"],
    ),
    "boundary points": (
        moved(BOUND, 5),
        [f"{BOUND} is [0.25, 0.25, 0.25, 0.25] in row 5, wanted [0.0, 0.5, 0.0, 0.5]"],
    ),
    "semantic points": (moved(SEMANTIC, 17), [SEMANTIC, "row 17, wanted [0.0, 0.0, 0.0, 1.0]"]),
    "no constants": (without(BOUND), [f"1 missing: {BOUND} (8, 4, 1, 1)"]),
    "a block too few": (cut_off, ["3+4+5+3 blocks", "3+4+6+3 (ResNet-50)", "(ResNet-101)"]),
    "another network": (
        lambda state: convert_pdnet(state).tensors,
        ["no backbone.body.layer1.0.conv1.weight", "its names are backbone.bottom_up.stem"],
    ),
    "empty": (lambda state: {}, ["its names are none"]),
    "no tensor": (replaced("epoch", 3), ["epoch is a int", "wanted are tensors by name"]),
    "beside model": (
        lambda state: {"model": state, "teacher": {}, "iteration": 3},
        ["it has teacher beside model; known are optimizer, scheduler, iteration"],
    ),
    "converted": (
        lambda state: {"model": convert_pdnet(state).tensors, "converted": {"method": "pdnet"}},
        ["it was converted already: type train.init_checkpoint=FILE"],
    ),
    "twice": (
        replaced("module.backbone.body.stem.bn1.bias", torch.zeros(16)),
        ["the same names with and without module."],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_pdnet_is_refused(fault: str, tmp_path: Path, capsys: Any) -> None:
    change, parts = FAULTS[fault]
    file = save(change(official.numbered(TINY)), tmp_path / "official.pth")
    assert main(["pdnet", file, str(tmp_path / "ours.pth")]) == 1
    said = capsys.readouterr().err
    for part in (f"error: {file} cannot be converted as weights of pdnet", *parts):
        assert part in said
    assert not (tmp_path / "ours.pth").exists()


class Harmful:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path("harm_done").touch, ())


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "ours.pth"
    (tmp_path / "text.pth").write_text("weights")
    with pytest.raises(DamagedCheckpointError, match=r"text\.pth cannot be read"):
        convert_checkpoint("pdnet", "text.pth", out)
    whole = Path(save(official.numbered(TINY), tmp_path / "whole.pth")).read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DamagedCheckpointError, match=r"half\.pth .* damaged, cut off"):
        convert_checkpoint("pdnet", "half.pth", out)
    save({"model": official.numbered(TINY), "optimizer": Harmful()}, tmp_path / "harm.pth")
    with pytest.raises(DamagedCheckpointError, match=r"harm\.pth .* holds more than tensors"):
        convert_checkpoint("pdnet", "harm.pth", out)
    assert not (tmp_path / "harm_done").exists()
    save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(DamagedCheckpointError, match="holds a Tensor; wanted is a dict"):
        convert_checkpoint("pdnet", "tensor.pth", out)
    assert not out.exists()


def test_files_that_exist_or_do_not(tmp_path: Path) -> None:
    file = save(official.numbered(TINY), tmp_path / "official.pth")
    before, out = Path(file).read_bytes(), tmp_path / "ours.pth"
    with pytest.raises(CheckpointError, match=r"there is no file .*absent\.pth"):
        convert_checkpoint("pdnet", tmp_path / "absent.pth", out)
    with pytest.raises(CheckpointError, match=r"no converter 'pdet'; there are: pdnet"):
        convert_checkpoint("pdet", file, out)
    out.write_text("mine")
    with pytest.raises(CheckpointError, match=r"ours\.pth exists; type --force to replace it"):
        convert_checkpoint("pdnet", file, out)
    assert out.read_text() == "mine"
    convert_checkpoint("pdnet", file, out, force=True)
    assert len(torch.load(out, weights_only=True)["model"]) == 310
    for force in (False, True):
        with pytest.raises(CheckpointError, match=r"is the file that is read; give OUT another"):
            convert_checkpoint("pdnet", file, file, force=force)
    assert Path(file).read_bytes() == before
    with pytest.raises(CheckpointError, match=r"is a folder; name a file, such as .*pdnet\.pth"):
        convert_checkpoint("pdnet", file, tmp_path, force=True)
    with pytest.raises(CheckpointError, match=r"got \.pkl; name it ours\.pth"):
        convert_checkpoint("pdnet", file, tmp_path / "ours.pkl")
    with pytest.raises(CheckpointError, match=r"folder .*ours\.pth cannot be made .*another one"):
        convert_checkpoint("pdnet", file, out / "below.pth")


def test_advice_for_other_networks() -> None:
    """Of another width; and of other classes, whose number is to be typed."""
    assert (
        "no recipe here is of R-50 (res2 8 wide)" in convert_pdnet(official.numbered(TINY)).advice
    )
    voc = official.numbered(replace(R50, classes=20))
    assert " model.num_classes=20 train.init_checkpoint=FILE" in convert_pdnet(voc).advice


def test_deeper_weights_are_not_evaluated_in_a_shallower_network(tmp_path: Path) -> None:
    """Each tensor of the small network is in the file of the large one."""
    model = instantiate(tiny(get_config("pdnet_R_50_FPN_1x")).model)
    weights = {**model.state_dict(), "backbone.bottom_up.res4.6.conv1.weight": torch.zeros(1)}
    torch.save({"model": weights}, tmp_path / "deeper.pth")
    with pytest.raises(CheckpointError, match=r"1 tensors .*another network .*res4\.6\.conv1"):
        Checkpointer(model, complete=True).load(str(tmp_path / "deeper.pth"), checkpointables=[])
    Checkpointer(model).load(str(tmp_path / "deeper.pth"), checkpointables=[])  # to train from


def test_the_script(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    file = save(official.numbered(TINY), tmp_path / "official.pth")
    monkeypatch.setattr(sys, "argv", ["tool", "pdnet", file, str(tmp_path / "ours.pth")])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(TOOL), run_name="__main__")
    assert (tmp_path / "ours.pth").is_file()
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["pdet", file, "ours.pth"])
    assert "choose from" in capsys.readouterr().err
    assert list(CONVERTERS) == ["pdnet", "decoupled_rcnn", "salt", "gflv2"]
