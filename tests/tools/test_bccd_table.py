# SPDX-License-Identifier: Apache-2.0
"""The table of the small-data experiment, with trainings that are only pretended."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from d2_decouple.config import ConfigError, config_names
from d2_decouple.data import register_bccd
from d2_decouple.evaluation import BoxEvaluator, read_ground_truth, small_data
from d2_decouple.evaluation.small_data import ROWS, Row, Run

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bccd_table.py"
HOSTS = ROWS[:3]  # a table of few rows is made in less time
RETINA, OTHER, OURS = (row.recipe for row in HOSTS)
# A child that has trained copies what a real evaluation has left in a prepared folder.
PRETEND = """
import shutil, sys
from pathlib import Path
prepared, folder = map(Path, sys.argv[1:])
if not prepared.is_dir():
    sys.exit("no space left on device")
shutil.copytree(prepared, folder, dirs_exist_ok=True)
"""


def no_picture(*_, **__):
    """Drawing takes longer than all the rest."""


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """The script as a module; its trainings take what lies in ``tmp_path/prepared``."""
    spec = importlib.util.spec_from_file_location("bccd_table", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("DETECTRON2_DATASETS", "nowhere")

    def command(run, folder):
        prepared = tmp_path / "prepared" / run.name
        return [sys.executable, "-c", PRETEND, str(prepared), str(folder)]

    monkeypatch.setattr(module, "train_command", command)
    for holder in (module, small_data):
        monkeypatch.setattr(holder, "ROWS", HOSTS)
    monkeypatch.setattr("d2_decouple.evaluation.evaluator.plot_precision_recall", no_picture)
    return module


@pytest.fixture(scope="module")
def blood(tmp_path_factory):
    """A folder with BCCD's numbers of images; the annotations of the test images are made up."""
    root = tmp_path_factory.mktemp("blood") / "cells"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    ids = [f"i{number:03}" for number in range(364)]
    (root / "ImageSets/Main/trainval.txt").write_text("\n".join(ids[:292]))
    (root / "ImageSets/Main/test.txt").write_text("\n".join(ids[292:]) + "\n")
    generator = np.random.default_rng(0)
    Image.new("RGB", (640, 480)).save(root / "JPEGImages" / f"{ids[292]}.jpg")
    for number, name in enumerate(ids[292:]):
        items = ""
        for label in ("RBC", "RBC", "WBC", "Platelets")[: 1 + number % 4]:
            x, y = generator.integers(1, 300, 2)
            items += (
                f"<object><name>{label}</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin>"
                f"<xmax>{x + 90}</xmax><ymax>{y + 80}</ymax></bndbox></object>"
            )
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><size><width>640</width>"
            f"<height>480</height><depth>3</depth></size>{items}</annotation>"
        )
        if number:
            os.link(root / f"JPEGImages/{ids[292]}.jpg", root / f"JPEGImages/{name}.jpg")
    return root


def prepare(tmp_path, data, run, *, shift):
    """What a training leaves whose boxes are off by some pixels, and a false one in each image."""
    register_bccd()
    link = tmp_path / "sets" / "BCCD"
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(data)
    os.environ["DETECTRON2_DATASETS"] = str(link.parent)
    evaluator = BoxEvaluator(dataset_name="bccd_test", output_dir=tmp_path / "prepared" / run.name)
    generator = np.random.default_rng(run.seed)
    for image, item in read_ground_truth("bccd_test").images.items():
        boxes = item.boxes + generator.normal(scale=shift, size=item.boxes.shape).round(1)
        found = Instances((480, 640))
        boxes = np.concatenate((boxes, [[500, 400, 560, 460]]))
        found.pred_boxes = Boxes(torch.tensor(boxes))
        found.scores = torch.tensor(generator.uniform(0.1, 1, len(boxes)).round(4))
        found.pred_classes = torch.tensor([*item.classes, 0])
        evaluator.process([{"image_id": image}], [{"instances": found}])
    return evaluator.evaluate()["bbox"]


@pytest.fixture
def call(tool, blood, tmp_path):
    """Runs the tool on the pretended data; returns the exit status."""

    folders = ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    return lambda *arguments, data=blood: tool.main(["--data", str(data), *folders, *arguments])


def test_a_whole_table_then_nothing_is_trained_again(call, blood, tmp_path, capsys):
    shifts = {RETINA: 9.0, OTHER: 4.0, OURS: 2.0}
    runs = [Run(row.recipe, seed) for row in HOSTS for seed in row.seeds]
    reported = {run: prepare(tmp_path, blood, run, shift=shifts[run.recipe]) for run in runs}
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- bccd table -->\nold\n<!-- end -->\nbelow\n")
    assert call("--write-readme", str(readme)) == 0
    lines = readme.read_text().splitlines()
    assert lines[:2] == ["above", "<!-- bccd table -->"]
    assert lines[-2:] == ["<!-- end -->", "below"]
    assert "old" not in lines
    cells = {
        line.split("|")[1].strip(" `"): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in lines
        if line.startswith("| `")
    }
    assert list(cells) == [RETINA, OTHER, OURS]
    values = [metrics["AP"] for run, metrics in reported.items() if run.recipe == OURS]
    expected = f"{np.mean(values):.1f} ({min(values):.1f}–{max(values):.1f})"
    assert cells[OURS][:2] == ["1, 2, 3", expected]
    assert cells[RETINA][-1] == "–"
    first, second = cells[OURS][-1].split("<br>")
    theirs = [metrics["AP"] for run, metrics in reported.items() if run.recipe == RETINA]
    assert first.startswith(f"{np.mean(values) - np.mean(theirs):+.1f} (+")
    assert first.endswith(f"3 seeds) `{RETINA}`")
    assert second.endswith(f"`{OTHER}`")
    assert len(list((tmp_path / "results").iterdir())) == 9
    assert all(file.stat().st_size < 300_000 for file in (tmp_path / "results").iterdir())

    shutil.rmtree(tmp_path / "prepared")  # whoever trains now fails
    capsys.readouterr()
    assert call() == 0
    output = capsys.readouterr().out
    assert output.count("kept from before") == 9
    assert "\n".join(lines[2:-2]) in output


def test_a_kept_result_says_how_it_came_about(call, blood, tmp_path, capsys):
    metrics = prepare(tmp_path, blood, Run(OURS, 2), shift=3.0)
    status = call("--only", OURS, "--seeds", "2", "--threads", "1", "--no-table")
    assert (status, "| AP |" in capsys.readouterr().out) == (0, False)
    (file,) = (tmp_path / "results").iterdir()
    result = json.loads(file.read_text())
    assert file.name == f"{OURS}_seed2.json"
    assert (result["recipe"], result["seed"]) == (OURS, 2)
    assert result["metrics"]["AP"] == pytest.approx(metrics["AP"])
    assert result["classes"]["WBC"]["AP"] == pytest.approx(metrics["AP-WBC"])
    assert result["overrides"] == ["train.seed=2"]
    assert "OneStageDetector" in result["config"]
    assert result["machine"]["threads"] == 1
    assert result["commit"].keys() == {"id", "dirty"}
    assert result["seconds"] >= 0
    assert len(result["images"]) == 72


def test_a_half_finished_table_goes_on(call, blood, tmp_path, capsys):
    prepare(tmp_path, blood, Run(RETINA, 1), shift=9.0)
    arguments = ["--only", f"{RETINA},{OURS}", "--seeds", "1"]
    assert call(*arguments) == 1
    message = capsys.readouterr().err
    assert f"{OURS}_seed1 ended with status 1" in message
    assert "no space left on device" in message
    assert [file.name for file in (tmp_path / "results").iterdir()] == [f"{RETINA}_seed1.json"]

    prepare(tmp_path, blood, Run(OURS, 1), shift=2.0)
    shutil.rmtree(tmp_path / "prepared" / f"{RETINA}_seed1")
    (work,) = (tmp_path / "work").glob(f"{OURS}_seed1_*")
    (work / "last_checkpoint").write_text("model_0000199.pth")
    assert call(*arguments) == 0
    output = capsys.readouterr().out
    assert f"{RETINA}_seed1: kept from before" in output
    assert f"{OURS}_seed1: going on" in output
    # How long it took in all is not known any more, and so not said.
    kept = json.loads((tmp_path / "results" / f"{OURS}_seed1.json").read_text())
    assert kept["seconds"] is None
    assert "1 seed)" in output


def test_results_of_another_config_are_named_and_replaced_on_demand(call, blood, tmp_path, capsys):
    prepare(tmp_path, blood, Run(OURS, 1), shift=3.0)
    arguments = ["--only", OURS, "--seeds", "1"]
    assert call(*arguments) == 0
    file = tmp_path / "results" / f"{OURS}_seed1.json"
    kept = json.loads(file.read_text())
    other = kept["config"].replace("num_classes: 3", "num_classes: 4")
    assert other != kept["config"]
    file.write_text(json.dumps({**kept, "config": other}))
    assert call(*arguments) == 1
    message = capsys.readouterr().err
    assert str(file) in message
    assert "--rerun" in message
    assert call("--no-training") == 1
    assert f"left out, made with another config: {file}" in capsys.readouterr().err
    assert call(*arguments, "--rerun") == 0
    assert json.loads(file.read_text())["config"] == kept["config"]


def test_edited_results_are_refused(call, blood, tmp_path, capsys):
    prepare(tmp_path, blood, Run(OURS, 1), shift=3.0)
    assert call("--only", OURS, "--seeds", "1") == 0
    file = tmp_path / "results" / f"{OURS}_seed1.json"
    content = json.loads(file.read_text())
    content["metrics"]["AP"] += 1
    file.write_text(json.dumps(content))
    assert call("--no-training") == 1
    assert f"{OURS}_seed1: the kept detections give AP" in capsys.readouterr().err
    file.write_text('{"half')
    assert call("--no-training") == 1
    assert f"{file} is damaged" in capsys.readouterr().err


def test_another_length_is_never_kept(call, blood, tmp_path, capsys):
    prepare(tmp_path, blood, Run(OURS, 1, 2), shift=3.0)
    assert call("--only", OURS, "--seeds", "1", "--iterations", "2") == 0
    assert "No table" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
    assert Run(OURS, 1, 2).config().train.max_iter == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--only", "fcos_R_18_FPN_bcd"], ["'fcos_R_18_FPN_bcd'", "'fcos_R_18_FPN_bccd'"]),
        (["--seeds", "1,7"], ["[1, 2, 3]", "[7]"]),
        (["--seeds", "one"], ["'one'", "1,2,3"]),
        (["--no-training"], ["nothing is finished", "results"]),
    ],
)
def test_bad_arguments_are_named(call, arguments, named, capsys):
    assert call(*arguments) == 1
    message = capsys.readouterr().err
    assert all(word in message for word in named), message


def test_the_table_alone_in_a_process_of_its_own(blood, tmp_path):
    """Where nothing has registered the data before."""
    command = [sys.executable, str(TOOL), "--data", str(blood), "--no-training"]
    command += ["--results", str(tmp_path / "none"), "--work", str(tmp_path / "work")]
    path = os.pathsep.join([str(TOOL.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "nothing is finished" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_data_are_refused_with_their_counts(call, tmp_path, capsys):
    mini = Path(__file__).resolve().parents[1] / "data" / "bccd_mini"
    assert call(data=mini) == 1
    assert "trainval.txt is missing; --data wants the folder of BCCD" in capsys.readouterr().err
    other = tmp_path / "other"
    (other / "ImageSets/Main").mkdir(parents=True)
    (other / "ImageSets/Main/trainval.txt").write_text("a b c")
    (other / "ImageSets/Main/test.txt").write_text("d e")
    assert call(data=other) == 1
    message = capsys.readouterr().err
    assert f"{other} has 3 images in trainval and 2 in test; BCCD has 292 and 72" in message


def test_a_document_without_markers_is_left_alone(call, blood, tmp_path, capsys):
    prepare(tmp_path, blood, Run(OURS, 1), shift=3.0)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- end --> nothing <!-- bccd table -->")
    arguments = ["--only", OURS, "--seeds", "1", "--write-readme", str(readme)]
    assert call(*arguments) == 1
    assert "<!-- bccd table --> and <!-- end -->" in capsys.readouterr().err
    assert readme.read_text() == "<!-- end --> nothing <!-- bccd table -->"


def test_every_row_is_of_the_experiment():
    assert {row.recipe for row in ROWS} <= set(config_names())
    assert {host for row in ROWS for host in row.hosts} <= {row.recipe for row in ROWS}
    for row in ROWS:
        cfg = Run(row.recipe, 3).config()
        assert (cfg.train.max_iter, cfg.train.seed) == (800, 3)


def test_a_row_that_cheats_is_refused(monkeypatch):
    monkeypatch.setitem(small_data.REQUIRED, "train.max_iter", 801)
    monkeypatch.setitem(small_data.REQUIRED, "model.backbone.no_such_key", 5)
    with pytest.raises(ConfigError) as error:
        Run(OURS, 1).config()
    assert "train.max_iter is 800, wanted 801" in str(error.value)
    assert "model.backbone.no_such_key is None, wanted 5" in str(error.value)
    with pytest.raises(ConfigError, match="fcos_R_50_FPN_1x does not belong"):
        Run("fcos_R_50_FPN_1x", 1).config()


def test_rows_are_listed_without_data(tool, capsys):
    assert tool.main(["--list"]) == 0
    output = capsys.readouterr().out
    assert [line.split()[0] for line in output.splitlines()] == [row.recipe for row in HOSTS]
    assert f"against {RETINA}, {OTHER}" in output
    with pytest.raises(SystemExit):
        tool.main([])
    assert "--data DIR is missing" in capsys.readouterr().err


def test_what_stops_the_tool_stops_the_training_and_lets_it_save(tool, tmp_path, monkeypatch):
    code = (
        "import signal, sys, time\n"
        "def save(*_):\n    time.sleep(0.3)\n    print('saved', flush=True)\n    sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    log = tmp_path / "log.txt"

    def interrupt(*_):
        if log.is_file() and "ready" in log.read_text():
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            tool.run_training([sys.executable, "-c", code], log, 1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - start < 30
    assert log.read_text().split() == ["ready", "saved"]


def test_a_row_without_a_paired_seed_says_so(call, blood, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        small_data, "ROWS", (Row(recipe=RETINA), Row(recipe=OURS, hosts=(RETINA,), seeds=(1,)))
    )
    prepare(tmp_path, blood, Run(OURS, 1), shift=3.0)
    prepare(tmp_path, blood, Run(RETINA, 2), shift=3.0)
    assert call("--only", OURS, "--seeds", "1") == 0
    assert "no paired seed yet" in capsys.readouterr().out


@pytest.fixture
def tested(monkeypatch, tool):
    """Rows of which the second one tests what the first one trains."""
    rows = (
        Row(recipe="salt_R_18_FPN_bccd", seeds=(2,)),
        Row(recipe="salt_R_18_FPN_bccd_s1", weights="salt_R_18_FPN_bccd", seeds=(2,)),
    )
    for holder in (tool, small_data):
        monkeypatch.setattr(holder, "ROWS", rows)
    monkeypatch.setattr(
        tool, "test_command", lambda run, folder, weights: tool.train_command(run, folder)
    )
    return rows


def test_a_row_may_test_what_another_one_trained(call, blood, tmp_path, tested, capsys):
    trained, coarse = (Run(row.recipe, 2) for row in tested)
    for run in (trained, coarse):
        prepare(tmp_path, blood, run, shift=3.0)
    assert call("--only", coarse.recipe) == 1
    message = capsys.readouterr().err
    assert f"{coarse.name} tests what {trained.name} trained, and there is no" in message
    assert f"--only {trained.recipe},{coarse.recipe}" in message

    (tmp_path / "prepared" / trained.name / "model_final.pth").write_text("weights")
    assert call() == 0
    assert f"{coarse.name}: testing" in capsys.readouterr().out
    kept = json.loads((tmp_path / "results" / f"{coarse.name}.json").read_text())
    assert kept["seconds"] is None


def test_a_row_tests_nothing_that_was_trained_otherwise(call, monkeypatch, tool, tested, capsys):
    rows = (Row(recipe="gfl_R_18_FPN_bccd"), Row(recipe=OURS, weights="gfl_R_18_FPN_bccd"))
    for holder in (tool, small_data):
        monkeypatch.setattr(holder, "ROWS", rows)
    assert call("--only", OURS, "--seeds", "1") == 1
    assert "differs in ['model.assigner" in capsys.readouterr().err


def test_weights_are_tested_and_not_trained(tool, tmp_path):
    command = tool.test_command(Run(OURS, 2), tmp_path / "out", tmp_path / "model_final.pth")
    assert "--eval-only" in command
    assert "--resume" not in command
    assert f"train.init_checkpoint='{tmp_path / 'model_final.pth'}'" in command
