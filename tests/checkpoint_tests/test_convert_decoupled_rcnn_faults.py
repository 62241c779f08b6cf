# SPDX-License-Identifier: Apache-2.0
"""What is no file of the authors' Decoupled R-CNN is refused, by an error that says why."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import official_decoupled_rcnn as official
import pytest
import torch
from official_decoupled_rcnn import (
    COUNTER,
    HEAD,
    TINY,
    TINY_DOUBLE,
    TINY_SHARED,
    TINY_SINGLE,
    Network,
    save,
)
from torch import Tensor

from d2_decouple.checkpoint import CheckpointError, DamagedCheckpointError
from d2_decouple.checkpoint.convert import convert_checkpoint, main
from d2_decouple.checkpoint.convert_decoupled_rcnn import convert_decoupled_rcnn, roi_heads_name

METHOD = "decoupled_rcnn"


def without(*names: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: {name: x for name, x in state.items() if name not in names}


def replaced(name: str, value: Any) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: {**state, name: value}


def without_part(begin: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: {name: x for name, x in state.items() if not name.startswith(begin)}


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], list[str]]] = {
    "missing": (
        without("backbone.layer1.1.bn2.bias", f"{HEAD}2.fc_reg.bias"),
        [
            f"2 missing: backbone.layer1.1.bn2.bias (4), {HEAD}2.fc_reg.bias (4)",
            "tensors are not Decoupled R-CNN's, of which there are 364",
        ],
    ),
    "no counter": (without(f"backbone.bn1.{COUNTER}"), [f"1 missing: backbone.bn1.{COUNTER} ()"]),
    "no classifier": (
        without(f"{HEAD}0.fc_cls.weight", f"{HEAD}0.fc_cls.bias"),
        [f"2 missing: {HEAD}0.fc_cls.weight (4, 16), {HEAD}0.fc_cls.bias (4)"],
    ),
    "no heads": (without_part("roi_head."), ["12 missing: roi_head.bbox_head.cls_fcs.0.weight (F"]),
    "no middle stage": (
        without_part(f"{HEAD}1."),
        [f"6 missing: {HEAD}1.reg_fcs.0.weight (16, 392)", f"6 unknown (left over): {HEAD}2."],
    ),
    "unknown": (
        replaced("roi_head.mask_head.conv_logits.bias", torch.zeros(3)),
        ["1 unknown (left over): roi_head.mask_head.conv_logits.bias (3)"],
    ),
    "a second classifier": (
        replaced(f"{HEAD}1.fc_cls.bias", torch.zeros(4)),
        [f"1 unknown (left over): {HEAD}1.fc_cls.bias (4)"],
    ),
    "with and without a number": (
        replaced(f"{HEAD}fc_cls.bias", torch.zeros(4)),
        [f"1 unknown (left over): {HEAD}fc_cls.bias (4)"],
    ),
    "shape": (
        replaced("neck.fpn_convs.2.conv.weight", torch.zeros(8, 4, 3, 3)),
        ["1 of another shape: neck.fpn_convs.2.conv.weight is (8, 4, 3, 3), wanted (8, 8, 3, 3)"],
    ),
    "classes": (
        replaced(f"{HEAD}0.fc_cls.bias", torch.zeros(5)),
        [f"1 of another shape: {HEAD}0.fc_cls.bias is (5), wanted (4)"],
    ),
    "classes' weight": (
        replaced(f"{HEAD}0.fc_cls.weight", torch.zeros(5, 16)),
        [f"1 of another shape: {HEAD}0.fc_cls.weight is (5, 16), wanted (4, 16)"],
    ),
    "one change for all classes": (
        lambda state: {
            **state,
            f"{HEAD}0.fc_reg.weight": torch.zeros(4, 16),
            f"{HEAD}0.fc_reg.bias": torch.zeros(4),
        },
        [f"{HEAD}0.fc_reg.weight is (4, 16), wanted (12, 16)", "2 of another shape"],
    ),
    "a change for each class": (
        replaced(f"{HEAD}2.fc_reg.weight", torch.zeros(12, 16)),
        [f"{HEAD}2.fc_reg.weight is (12, 16), wanted (4, 16)"],
    ),
    "pooled to 5 cells": (
        replaced(f"{HEAD}0.cls_fcs.0.weight", torch.zeros(16, 200)),
        [f"{HEAD}0.cls_fcs.0.weight is (16, 200), wanted (16, 392)"],
    ),
    "anchors": (
        replaced("rpn_head.rpn_cls.weight", torch.zeros(9, 8, 1, 1)),
        ["rpn_head.rpn_cls.weight is (9, 8, 1, 1), wanted (3, 8, 1, 1)"],
    ),
    "a block too few": (
        without_part("backbone.layer3.5."),
        ["backbone.layer1 to layer4 have 3+4+5+3 blocks", "3+4+6+3 (ResNet-50)"],
    ),
    "another network": (
        lambda state: convert_decoupled_rcnn(state).tensors,
        ["no backbone.layer1.0.conv1.weight", "its names are backbone.bottom_up.stem"],
    ),
    "beside state_dict": (
        lambda state: {"meta": {}, "state_dict": state, "teacher": {}},
        ["it has teacher beside state_dict; known are optimizer, scheduler, iteration, meta"],
    ),
    "two of them": (
        lambda state: {"model": state, "state_dict": state},
        ["it has state_dict beside model"],
    ),
    "converted": (
        lambda state: {"model": state, "converted": {"method": METHOD}},
        ["it was converted already: type train.init_checkpoint=FILE"],
    ),
}
DOUBLE_FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], list[str]]] = {
    "no counter of a norm that counts": (
        without(f"{HEAD}1.res_block.conv1.bn.{COUNTER}"),
        [f"1 missing: {HEAD}1.res_block.conv1.bn.{COUNTER} ()"],
    ),
    "a fifth bottleneck": (
        replaced(f"{HEAD}0.conv_branch.4.conv1.weight", torch.zeros(4, 16, 1, 1)),
        [f"1 unknown (left over): {HEAD}0.conv_branch.4.conv1.weight (4, 16, 1, 1)"],
    ),
    "another width": (
        replaced(f"{HEAD}2.conv_branch.3.conv2.weight", torch.zeros(8, 8, 3, 3)),
        [f"{HEAD}2.conv_branch.3.conv2.weight is (8, 8, 3, 3), wanted (4, 4, 3, 3)"],
    ),
}


@pytest.mark.parametrize("fault", [*FAULTS, *DOUBLE_FAULTS])
def test_what_is_no_decoupled_rcnn_is_refused(fault: str, tmp_path: Path, capsys: Any) -> None:
    change, parts = {**FAULTS, **DOUBLE_FAULTS}[fault]
    state = official.numbered(TINY_DOUBLE if fault in DOUBLE_FAULTS else TINY)
    file = save(change(state), tmp_path / "epoch_24.pth")
    assert main([METHOD, file, str(tmp_path / "ours.pth")]) == 1
    said = capsys.readouterr().err
    for part in (f"error: {file} cannot be converted as weights of decoupled_rcnn", *parts):
        assert part in said
    assert not (tmp_path / "ours.pth").exists()


@pytest.mark.parametrize("network", [TINY, TINY_SINGLE, TINY_SHARED, TINY_DOUBLE])
def test_no_tensor_may_be_missing_or_misshapen(network: Network) -> None:
    state = official.numbered(network)
    for name, value in state.items():
        if re.match(r"backbone\.layer(\d\.[1-9]|[2-4])", name):
            continue  # as those of the first block
        known = rf"1 missing: {re.escape(name)} \("
        with pytest.raises(CheckpointError, match=known):
            convert_decoupled_rcnn(without(name)(state))
        for dim in range(max(value.dim(), 1)):
            shape = [size + (dim == index) for index, size in enumerate(value.shape)] or [1]
            known = rf"1 of another shape: {re.escape(name)} is .*, wanted .*"
            with pytest.raises(CheckpointError, match=known) as refusal:
                convert_decoupled_rcnn({**state, name: torch.zeros(shape)})
            assert str(refusal.value).endswith(f"wanted {shape_text(value)}")


def shape_text(value: Tensor) -> str:
    return "(" + ", ".join(map(str, value.shape)) + ")"


class Harmful:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path("harm_done").touch, ())


def test_a_file_that_holds_more_than_tensors_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    content = official.training_file(official.numbered(TINY))
    content["meta"]["hook_msgs"] = Harmful()
    save(content, tmp_path / "harm.pth")
    with pytest.raises(DamagedCheckpointError, match=r"harm\.pth .* holds more than tensors"):
        convert_checkpoint(METHOD, "harm.pth", tmp_path / "ours.pth")
    assert not (tmp_path / "harm_done").exists()
    assert not (tmp_path / "ours.pth").exists()


def test_a_folder_as_out_names_a_file_of_the_method(tmp_path: Path) -> None:
    file = save(official.numbered(TINY), tmp_path / "epoch_24.pth")
    with pytest.raises(CheckpointError, match=r"is a folder; .* such as .*decoupled_rcnn\.pth"):
        convert_checkpoint(METHOD, file, tmp_path)


@pytest.mark.parametrize("name", ["bbox_head.0.fc_box.weight", "bbox_head", "mask_head.convs.0"])
def test_a_name_that_no_head_has(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name} is no part of the authors' Decoupled R-CNN"):
        roi_heads_name(name)
