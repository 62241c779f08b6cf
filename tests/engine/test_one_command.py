# SPDX-License-Identifier: Apache-2.0
"""``--dataset FOLDER --method NAME``: one command from labelled images to pictures."""

import json
import shlex
import sys

import pytest
import torch
from detectron2.config import LazyConfig
from util import tiny
from yolo_folders import yolo_shapes

from d2_decouple.config import get_config
from d2_decouple.demo import main as demo
from d2_decouple.engine.own_data import best_checkpoint
from d2_decouple.train import main

SHORT = [
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "dataloader.train.mapper.augmentations.0.short_edge_length=64",
    "dataloader.train.total_batch_size=1",
]


@pytest.fixture
def small(monkeypatch):
    """Recipes as they are, but with the tests' network."""
    monkeypatch.setattr("d2_decouple.train.get_config", lambda name: tiny(get_config(name)))


@pytest.fixture
def folder(tmp_path):
    return yolo_shapes(tmp_path / "toys", images=6, size=(64, 80))


def command(folder, output, *options):
    return ["--dataset", str(folder), *options, *SHORT, f"train.output_dir={output}"]


def scores(monkeypatch, *values):
    """Evaluations answer with these numbers, one after the other; how many are left."""
    left = list(values)
    loop = sys.modules["d2_decouple.engine.train"]  # the package has a function of this name
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: {"bbox": {"AP": left.pop(0)}})
    return left


def test_from_labels_to_pictures(folder, tmp_path, capsys, monkeypatch):
    output = tmp_path / "my out"
    scores(monkeypatch, 10.0, 30.0, 20.0)
    options = command(folder, output, "--method", "pdnet")
    assert main([*options, "train.max_iter=3", "train.eval_period=1"]) == 0
    said = capsys.readouterr().out
    for part in (
        f"{folder}: YOLO, 3 classes",
        "recipe: pdnet_R_18_FPN_bccd",
        "chosen for these data",
        "short side of the images: 64 pixels; typed",
        "learning rate: 0.0025; the recipe's is 0.01 for 4 images",
        "iterations: 3; typed",
        "best AP on the test images: 30.00, after 2 of 3 iterations",
        "early stopping: 5 evaluations",
    ):
        assert part in said
    cfg = LazyConfig.load(str(output / "config.yaml"))
    assert cfg.optimizer.lr == 0.0025
    assert cfg.dataloader.test.mapper.augmentations[0].short_edge_length == 64
    assert cfg.train.early_stopping.patience == 5
    assert best_checkpoint(str(output)) == (output / "model_best.pth", 30.0, 2, 3)

    typed = next(line for line in said.splitlines() if "tools/demo.py" in line)
    arguments = shlex.split(typed)[2:]
    assert arguments[-1] == "found"
    arguments[-1] = str(tmp_path / "found")
    assert demo([*arguments, "--json"]) == 0
    found = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert len(found["images"]) == 2
    assert found["classes"] == ["circle", "rectangle", "triangle"]


@pytest.mark.usefixtures("small")
def test_the_best_checkpoint_is_what_is_measured_at_the_end(folder, tmp_path, monkeypatch):
    """The last weights are others than the best: the ones that are evaluated are the best's."""
    scores(monkeypatch, 30.0, 20.0)
    seen = []

    def look(recipe, model):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {}

    monkeypatch.setattr("d2_decouple.train.evaluate", look)
    options = command(folder, tmp_path / "out", "--method", "fcos")
    assert main([*options, "train.max_iter=2", "train.eval_period=1"]) == 0
    best, last = (
        torch.load(tmp_path / "out" / f"model_{name}.pth", weights_only=True)["model"]
        for name in ("best", "final")
    )
    (evaluated,) = seen
    assert all(torch.equal(value, best[name]) for name, value in evaluated.items())
    assert any(not torch.equal(value, last[name]) for name, value in evaluated.items())


@pytest.mark.usefixtures("small")
def test_the_last_checkpoint_is_not_measured_twice(folder, tmp_path, monkeypatch):
    scores(monkeypatch, 10.0, 20.0)
    monkeypatch.setattr("d2_decouple.train.evaluate", None)
    options = command(folder, tmp_path / "out", "--method", "fcos")
    assert main([*options, "train.max_iter=2", "train.eval_period=1"]) == 0


@pytest.mark.usefixtures("small")
def test_early_stopping_ends_well_and_stays_ended(folder, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    options = command(folder, output, "--method", "fcos")
    options += ["train.max_iter=9", "train.eval_period=1", "train.early_stopping.patience=2"]
    monkeypatch.setattr("d2_decouple.train.evaluate", lambda *_: {})
    left = scores(monkeypatch, 10.0, 9.0, 8.0, 99.0)
    assert main(options) == 0
    assert left == [99.0]
    assert "best AP on the test images: 10.00, after 1 of 3 iterations" in capsys.readouterr().out
    assert "stopped early after 3 of 9 iterations" in (output / "log.txt").read_text()
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    rows = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert rows[-1]["bbox/AP"] == 8.0

    weights = torch.load(output / "model_final.pth", weights_only=True)["model"]
    left = scores(monkeypatch, 8.0, 99.0)
    assert main(["--resume", *options]) == 0
    assert left == [99.0]
    again = torch.load(output / "model_final.pth", weights_only=True)
    assert again["iteration"] == 2
    assert again["trainer"]["hooks"]["Evaluating"]["without_better"] == 2  # not counted twice
    assert all(torch.equal(value, again["model"][name]) for name, value in weights.items())

    left = scores(monkeypatch, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0)  # it goes on if it shall
    assert main(["--resume", *options, "train.early_stopping.patience=0"]) == 0
    assert left == []
    assert torch.load(output / "model_final.pth", weights_only=True)["iteration"] == 8


@pytest.mark.usefixtures("small")
def test_a_recipe_does_not_stop_early_by_itself(folder, tmp_path, monkeypatch):
    left = scores(monkeypatch, 10.0, *[9.0] * 7)
    options = command(folder, tmp_path / "out", "train.max_iter=8", "train.eval_period=1")
    assert main(options) == 0
    assert left == []


@pytest.mark.parametrize("value", ["-1", "often", "1.5"])
def test_a_patience_that_is_none_is_named(value, folder, tmp_path, capsys):
    override = f"train.early_stopping.patience={value}"
    assert main([*command(folder, tmp_path / "out"), override]) == 1
    message = capsys.readouterr().err
    for part in ("train.early_stopping.patience", value, "0 to train to the end"):
        assert part in message


def test_patience_without_evaluations_is_refused(folder, tmp_path, capsys):
    options = ["train.early_stopping.patience=3", "train.eval_period=0"]
    assert main([*command(folder, tmp_path / "out"), *options]) == 1
    assert "needs train.eval_period above 0" in capsys.readouterr().err


def test_a_host_and_a_size(folder, tmp_path, capsys, monkeypatch):
    """No network of this size is built here."""
    seen = []
    monkeypatch.setattr("d2_decouple.train.train", lambda recipe, **_: seen.append(recipe) or {})
    options = command(folder, tmp_path / "out", "--method", "tscode", "--host", "ota")
    options[4:4] = ["--size", "l"]
    assert main([*options, "train.init_checkpoint="]) == 0
    said = capsys.readouterr().out
    assert "recipe: tscode_ota_R_50_FPN_1x" in said
    assert "weights: none; typed" in said
    assert seen[0].config.model.backbone.bottom_up.stages.depth == 101
    assert (seen[0].patience, seen[0].init_checkpoint) == (5, "")


def test_a_training_without_a_best_checkpoint_has_none(tmp_path):
    assert best_checkpoint(str(tmp_path)) is None
