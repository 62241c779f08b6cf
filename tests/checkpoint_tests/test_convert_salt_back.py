# SPDX-License-Identifier: Apache-2.0
"""SALT-Net's and GFLv2's weights back in the authors' layout, bit for bit; and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import official_salt as official
import pytest
import torch
from official_salt import BINS, HEAD, R50, TINY, TINY_GFLV2, TINY_R2, TINYX, Network
from torch import Tensor
from util import tiny_model

from d2_decouple.checkpoint import CheckpointError, DamagedCheckpointError
from d2_decouple.checkpoint.convert import convert_checkpoint, main, revert_checkpoint
from d2_decouple.checkpoint.convert_salt import convert_salt, revert_salt, salt_left_out

CLS = f"{HEAD}salt_cls"
NETWORKS = {
    "salt": TINY,
    "deformable": TINYX,
    "Res2Net": TINY_R2,
    "gflv2": TINY_GFLV2,
    "no counters": replace(TINY, counters=False),
}


def save(content: Any, path: Path) -> str:
    torch.save(content, path)
    return str(path)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Names, shapes, types and bits."""
    return first.keys() == second.keys() and all(
        x.dtype == second[name].dtype and torch.equal(x, second[name]) for name, x in first.items()
    )


# There and back.


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_comes_back_bit_for_bit(name: str, tmp_path: Path, capsys: Any) -> None:
    network = NETWORKS[name]
    theirs = official.drawn(network)
    theirs[f"{HEAD}reg_conf.0.bias"][3] = -0.0  # which equals 0, but is another number of bits
    file = save(official.training_file(theirs), tmp_path / "theirs.pth")
    ours, back, again = (tmp_path / f"{x}.pth" for x in ("ours", "back", "again"))
    assert main([network.method, file, str(ours)]) == 0
    assert main(["--back", network.method, str(ours), str(back)]) == 0
    said = capsys.readouterr().out.splitlines()[1]
    assert said.startswith(f"{network.method}, back: {len(theirs)} tensors converted (R")
    assert "3 classes and the authors' last one)" in said
    content = torch.load(back, weights_only=True)
    assert content.keys() == {"meta", "state_dict"}
    assert same(content["state_dict"], theirs)
    assert content["state_dict"][f"{HEAD}reg_conf.0.bias"][3].signbit()
    # And from there to our file once more.
    assert main([network.method, str(back), str(again)]) == 0
    first, second = (torch.load(x, weights_only=True)["model"] for x in (ours, again))
    assert same(first, second)


def test_the_real_sizes_come_back() -> None:
    theirs = official.numbered(R50)
    back = revert_salt(convert_salt(theirs).tensors, salt_left_out(theirs)).tensors
    assert same(back, theirs)


def test_nothing_that_was_given_is_changed() -> None:
    theirs = official.drawn(TINY)
    copy = {name: x.clone() for name, x in theirs.items()}
    ours, kept = convert_salt(theirs).tensors, salt_left_out(theirs)
    before = {name: x.clone() for name, x in ours.items()}
    revert_salt(ours, kept)
    assert same(theirs, copy)
    assert same(ours, before)


@pytest.mark.parametrize("network", [TINY, TINYX, TINY_R2], ids=["plain", "DCNX", "Res2Net"])
def test_weights_that_were_trained_here(network: Network, tmp_path: Path, capsys: Any) -> None:
    """Their last class is made up, so that it is never found; and they come back."""
    model = official.detector(network)
    trained = {"model": model.state_dict(), "trainer": {"iteration": 9}, "classes": ["ant"]}
    file, back = save(trained, tmp_path / "model_final.pth"), tmp_path / "back.pth"
    assert main(["--back", "salt", file, str(back)]) == 0
    assert "the authors' last one, which is made up): " in capsys.readouterr().out
    theirs = torch.load(back, weights_only=True)["state_dict"]
    assert {name: tuple(x.shape) for name, x in theirs.items()} == official.shapes(network)
    assert theirs[BINS].tolist() == list(range(17))
    counters = [x for name, x in theirs.items() if name.endswith("num_batches_tracked")]
    assert len(counters) == sum(name.endswith("running_mean") for name in theirs)
    assert all(x.dtype == torch.int64 and x == 0 for x in counters)
    assert not theirs[f"{CLS}.weight"][3].any()
    # Below half of what float32 can add to any score.
    assert theirs[f"{CLS}.bias"][3].sigmoid() < 1e-40
    assert same(convert_salt(theirs).tensors, dict(model.state_dict()))


def test_averaged_weights_are_taken_where_there_are_some(tmp_path: Path, capsys: Any) -> None:
    raw = dict(official.detector(TINY).state_dict())
    averaged = {name: x + 1 if x.is_floating_point() else x for name, x in raw.items()}
    for ema, wanted, said in ((averaged, averaged, " (averaged)"), ({}, raw, "")):
        file = save({"model": raw, "ema": ema, "classes": ["ant"]}, tmp_path / "model_final.pth")
        assert main(["--back", "salt", "--force", file, str(tmp_path / "back.pth")]) == 0
        assert f" tensors{said} converted (" in capsys.readouterr().out
        theirs = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
        assert same(convert_salt(theirs).tensors, wanted)


def test_as_many_numbers_as_the_weights_have(tmp_path: Path) -> None:
    """The made-up class has the type of the others."""
    weights = {name: x.half() for name, x in official.detector(TINY).state_dict().items()}
    theirs = revert_salt(weights, {}).tensors
    assert theirs[f"{CLS}.weight"].dtype == theirs[f"{CLS}.bias"].dtype == torch.float16


# What is refused.


def without(*names: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: {name: x for name, x in state.items() if name not in names}


def replaced(name: str, value: Any) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: {**state, name: value}


def cut_off(state: dict[str, Tensor]) -> Any:
    """The last block of the third stage is gone."""
    return {name: x for name, x in state.items() if not name.startswith("backbone.layer3.5.")}


def half_deformed(state: dict[str, Tensor]) -> Any:
    """Only one of the towers is deformable."""
    offset = f"{HEAD}cls_convs.2.conv.conv_offset"
    more = {f"{offset}.weight": torch.zeros(27, 64, 3, 3), f"{offset}.bias": torch.zeros(27)}
    return {**state, **more}


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], list[str]]] = {
    "missing": (
        without(f"{HEAD}reg_init_out.scale_fs.bias", "backbone.layer1.1.bn2.bias"),
        [
            "2 missing: backbone.layer1.1.bn2.bias (8)",
            f"{HEAD}reg_init_out.scale_fs.bias (14)",
            "not SALT-Net's, of which there are 391",
        ],
    ),
    "a counter": (
        without("backbone.bn1.num_batches_tracked"),
        ["1 missing: backbone.bn1.num_batches_tracked ()"],
    ),
    "unknown": (
        replaced(f"{HEAD}atss_centerness.bias", torch.zeros(1)),
        [f"1 unknown (left over): {HEAD}atss_centerness.bias (1)"],
    ),
    "shape": (
        replaced(f"{CLS}.bias", torch.zeros(3)),
        [f"{CLS}.bias is (3), wanted (4)"],
    ),
    "more points": (
        replaced(f"{HEAD}salt_cls_refinement.proposal.weight", torch.zeros(50, 64, 3, 3)),
        ["proposal.weight is (50, 64, 3, 3), wanted (18, 64, 3, 3)"],
    ),
    "other bins": (
        replaced(BINS, 2 * torch.arange(17.0)),
        [f"{BINS} is [0.0, 2.0, 4.0", "wanted are the numbers 0 to 16", "other distances"],
    ),
    "one tower deformed": (
        half_deformed,
        [f"2 missing: {HEAD}reg_convs.2.conv.conv_offset.weight (27, 64, 3, 3)"],
    ),
    "a block too few": (cut_off, ["3+4+5+3 blocks", "3+4+6+3 (ResNet-50)"]),
    "GFLv2": (
        lambda state: official.numbered(TINY_GFLV2),
        [f"unknown (left over): {HEAD}cls_convs.3.conv.weight", f"missing: {HEAD}salt_cls.weight"],
    ),
    "ours": (
        lambda state: convert_salt(state).tensors,
        ["no backbone.layer1.0.conv1.weight, as the authors' SALT-Net has"],
    ),
    "converted": (
        lambda state: {"model": convert_salt(state).tensors, "converted": {"method": "salt"}},
        ["it was converted already: type train.init_checkpoint=FILE"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_salt_net_is_refused(fault: str, tmp_path: Path, capsys: Any) -> None:
    change, parts = FAULTS[fault]
    file = save(change(official.numbered(TINY)), tmp_path / "official.pth")
    assert main(["salt", file, str(tmp_path / "ours.pth")]) == 1
    said = capsys.readouterr().err
    for part in (f"error: {file} cannot be converted as weights of salt: ", *parts):
        assert part in said
    assert not (tmp_path / "ours.pth").exists()


def converted(method: str = "salt", **changes: Any) -> dict[str, Any]:
    """A file of ours, in which weights (by a name's last two parts) or the origin are changed."""
    state = official.numbered(TINY)
    model, kept = convert_salt(state).tensors, salt_left_out(state)
    return {"model": model, "converted": {"method": method, "left_out": {**kept, **changes}}}


def changed(name: str, value: Tensor | None) -> dict[str, Any]:
    content = converted()
    if value is None:
        del content["model"][name]
    else:
        content["model"][name] = value
    return content


BACK_FAULTS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "another method": (
        lambda: converted("gflv2"),
        ["it was converted as weights of gflv2: type that"],
    ),
    "theirs": (
        lambda: {"model": official.numbered(TINY)},
        ["no backbone.bottom_up.res2.0.conv1.weight, as our SALT-Net has"],
    ),
    "no model": (
        lambda: {"state_dict": official.numbered(TINY)},
        ["it has no weights under model, as the files of this package do"],
    ),
    "no tensor": (
        lambda: {"model": {"epoch": 3}},
        ["epoch is a int; wanted are tensors by name"],
    ),
    "without class vectors": (
        lambda: changed("head.aligner.vector_pred.weight", None),
        [
            "its tensors are not our SALT-Net's, of which there are 329",
            "1 missing: head.aligner.vector_pred.weight (18, 64, 3, 3)",
        ],
    ),
    "levels": (
        lambda: changed("head.aligner.scales", torch.ones(4)),
        ["head.aligner.scales is (4), wanted (5)"],
    ),
    "quality": (
        lambda: changed("head.predictor.reg_conf.0.weight", torch.ones(64, 10)),
        ["head.predictor.reg_conf.0.weight is (64, 10), wanted (64, 20)"],
    ),
    "classes": (
        lambda: changed("head.cls_score.bias", torch.ones(4)),
        ["head.cls_score.bias is (4), wanted (3)"],
    ),
    "left out": (
        lambda: converted(**{f"{CLS}.bias": torch.ones(2), "dreams": torch.ones(1)}),
        [
            "not what was left out of the authors' SALT-Net's, of which there are 56",
            f"{CLS}.bias is (2), wanted (1)",
            "1 unknown (left over): dreams (1)",
        ],
    ),
    "a small backbone": (
        lambda: {"model": tiny_model("salt_R_50_FPN_1x").state_dict()},
        ["1+1+1+1 blocks, wanted are 3+4+6+3 (ResNet-50)"],
    ),
}


@pytest.mark.parametrize("fault", BACK_FAULTS)
def test_what_is_not_ours_does_not_go_back(fault: str, tmp_path: Path, capsys: Any) -> None:
    make, parts = BACK_FAULTS[fault]
    file, out = save(make(), tmp_path / "ours.pth"), tmp_path / "back.pth"
    assert main(["--back", "salt", file, str(out)]) == 1
    said = capsys.readouterr().err
    for part in (f"error: {file} cannot be converted back to weights of salt: ", *parts):
        assert part in said
    assert "Give a file of this package" in said
    assert not out.exists()


def test_files_and_methods(tmp_path: Path, capsys: Any) -> None:
    file, out = save(converted(), tmp_path / "ours.pth"), tmp_path / "back.pth"
    with pytest.raises(CheckpointError, match=r"no way back 'pdnet'; there are: salt, gflv2"):
        revert_checkpoint("pdnet", file, out)
    assert main(["--back", "pdnet", file, str(out)]) == 1
    assert "error: there is no way back 'pdnet'" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"no file .*absent\.pth; give a checkpoint of this"):
        revert_checkpoint("salt", tmp_path / "absent.pth", out)
    with pytest.raises(CheckpointError, match=r"is a folder; name a file, such as .*salt\.pth"):
        revert_checkpoint("salt", file, tmp_path)
    out.write_text("mine")
    with pytest.raises(CheckpointError, match=r"back\.pth exists; type --force to replace it"):
        revert_checkpoint("salt", file, out)
    revert_checkpoint("salt", file, out, force=True)
    assert len(torch.load(out, weights_only=True)["state_dict"]) == 391


class Harmful:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path("harm_done").touch, ())


def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    state = official.numbered(TINY)
    save({"state_dict": state, "optimizer": Harmful()}, tmp_path / "harm.pth")
    with pytest.raises(DamagedCheckpointError, match=r"harm\.pth .* holds more than tensors"):
        convert_checkpoint("salt", "harm.pth", "out.pth")
    save({**converted(), "trainer": Harmful()}, tmp_path / "harm.pth")
    with pytest.raises(DamagedCheckpointError, match=r"harm\.pth .* holds more than tensors"):
        revert_checkpoint("salt", "harm.pth", "out.pth")
    assert not (tmp_path / "harm_done").exists()
    assert not (tmp_path / "out.pth").exists()
