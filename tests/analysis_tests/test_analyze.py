# SPDX-License-Identifier: Apache-2.0
"""The command: two models and kept detections on a few real images, and what it refuses."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from util import excite, tiny_model

from d2_decouple.analyze import main

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "tests" / "data" / "bccd_mini"
CLASSES = ["RBC", "WBC", "Platelets"]
RECIPE = """
from util import tiny
from d2_decouple.config import get_config

cfg = tiny(get_config("fcos_R_18_FPN_bccd"), num_classes=3)
model, dataloader = cfg.model, cfg.dataloader
dataloader.test.mapper.augmentations[0].update(short_edge_length=96, max_size=160)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A recipe and weights."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "tiny.py").write_text(RECIPE)
    torch.manual_seed(0)
    detector = excite(tiny_model("fcos_R_18_FPN_bccd"), 0.7)
    torch.nn.init.normal_(detector.head.cls_score.bias, -2)
    torch.save({"model": detector.state_dict(), "classes": CLASSES}, folder / "model.pth")
    return [str(folder / "tiny.py"), str(folder / "model.pth")]


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command -> its exit status, what it printed, what it printed as errors."""

    def call(*arguments, dataset="bccd_mini_val", output="report.html"):
        common = ["--dataset", str(dataset), "--output", str(tmp_path / output)]
        status = main([*map(str, arguments), *common, "--device", "cpu"])
        return status, *capsys.readouterr()

    return call


def test_models_and_kept_detections(model, run, tmp_path):
    ids = sorted((MINI / "ImageSets" / "Main" / "val.txt").read_text().split())
    images = {ids[0]: [[1, 2, 90, 95, 0.5, 0]]}
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps({"images": images}))
    numbers = tmp_path / "numbers.json"
    few = ("--limit", 2, "--draws", 4, "--repeats", 1, "--json", numbers)
    models = ("--model", "one:1", *model, "--model", "two", *model, "--detections", "old", kept)
    status, out, err = run(*models, *few, "--compare", "two:one:1")
    assert (status, err) == (0, "")
    record = json.loads(numbers.read_text())
    assert (record["images"], record["draws"], record["dataset"]) == (2, 4, "bccd_mini_val")
    assert [item["name"] for item in record["models"]] == ["one:1", "two", "old"]
    assert record["models"][0]["source"] == ", ".join(model)
    assert record["models"][2]["source"] == str(kept)
    assert record["models"][2]["detections"] == 1
    first, second = (item["measures"] for item in record["models"][:2])
    assert first == second
    assert first["reached"]["value"] is not None
    (compared,) = record["differences"]
    assert (compared["name"], compared["less"]) == ("two", "one:1")
    assert compared["measures"]["AP50"] == {"value": 0, "low": 0, "high": 0}
    slots = [cost["slot"] for cost in record["models"][1]["costs"]]
    assert slots[0] == "backbone"
    assert slots[-3:] == ["assigner", "selection", "forward"]
    page = (tmp_path / "report.html").read_text()
    assert "two less one:1" in page
    assert "a CPU with" in page
    assert f"report: {tmp_path / 'report.html'}" in out
    assert "two: AP " in out
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "kept.json",
        "numbers.json",
        "report.html",
    ]


def test_without_compare_each_is_compared_with_the_first(run, tmp_path):
    ids = (MINI / "ImageSets" / "Main" / "val.txt").read_text().split()
    kept, numbers = tmp_path / "kept.json", tmp_path / "numbers.json"
    kept.write_text(json.dumps({"images": {ids[0]: [[1, 2, 90, 95, 0.5, 0]]}}))
    models = [word for name in "abc" for word in ("--detections", name, kept)]
    assert run(*models, "--draws", 2, "--json", numbers)[0] == 0
    differences = json.loads(numbers.read_text())["differences"]
    assert [(item["name"], item["less"]) for item in differences] == [("b", "a"), ("c", "a")]


def test_a_folder_of_ones_own(model, run, tmp_path):
    few = ("--limit", 1, "--draws", 2, "--repeats", 1)
    refused, _, err = run("--model", "m", *model, *few, dataset=MINI)
    assert refused == 1
    assert "m knows the classes RBC, WBC, Platelets, the data set has Platelets, RBC, WBC" in err
    weights = torch.load(model[1])
    torch.save({**weights, "classes": sorted(CLASSES)}, tmp_path / "own.pth")
    status, out, err = run("--model", "m", model[0], tmp_path / "own.pth", *few, dataset=MINI)
    assert (status, err) == (0, "")
    assert "Pascal VOC, 3 classes" in out


KEPT = ("--detections", "m", "{kept}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to analyze: give --model NAME CONFIG WEIGHTS, or --detections NAME FILE"),
        ((*KEPT, *KEPT), "two models are called 'm'; give each a name of its own"),
        ((*KEPT, "--compare", "m:m"), "--compare m:m: wanted NAME:HOST, two different names"),
        ((*KEPT, "--compare", "m:x"), "--compare m:x: wanted NAME:HOST"),
        ((*KEPT, "--json", "{folder}/no/f.json"), "there is no folder {folder}/no to write f.json"),
        (KEPT, "{kept} is not JSON"),
        (("--detections", "m", "{folder}/none.json"), "none.json"),
        (("--model", "m", "fcos_R_18_FPN_bccd", "{folder}/w.pth"), "there are no weights"),
    ],
)
def test_refusals(arguments, message, run, tmp_path):
    names = {"folder": str(tmp_path), "kept": str(tmp_path / "kept.json")}
    Path(names["kept"]).write_text("{")
    status, _, err = run(*(text.format(**names) for text in arguments))
    assert status == 1
    assert err.startswith("error: ")
    assert message.format(**names) in err
    assert not (tmp_path / "report.html").exists()


def test_unknown_dataset(run, tmp_path):
    kept = tmp_path / "kept.json"
    kept.write_text("{}")
    status, _, err = run("--detections", "m", kept, dataset="bccd_tset")
    assert status == 1
    assert "unknown dataset 'bccd_tset'" in err
    assert "bccd_test" in err


@pytest.mark.parametrize("value", ["0", "x", "-1"])
def test_numbers_are_counts(value, capsys):
    with pytest.raises(SystemExit):
        main(["--dataset", "d", "--output", "o", "--limit", value])
    assert f"wanted a whole number from 1, got {value}" in capsys.readouterr().err


def test_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["analyze_model.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "tools" / "analyze_model.py"), run_name="__main__")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "--detections NAME FILE" in shown
    assert "results/bccd/fcos_R_18_FPN_bccd_seed1.json" in shown
