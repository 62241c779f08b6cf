# SPDX-License-Identifier: Apache-2.0
"""The demonstration leaves what it promises, and a second call goes on from the first."""

import json

import cv2
import pytest

from d2_decouple.quickstart import main


def test_quickstart_leaves_what_it_promises(tmp_path, capsys):
    output = tmp_path / "quickstart"
    options = ["--output", str(output), "--pictures", "2"]
    assert main([*options, "--iterations", "2"]) == 0
    printed = capsys.readouterr().out
    assert "AP50" in printed
    assert f"2 in {output / 'pictures'}" in printed
    assert {"metrics.json", "log.txt", "config.yaml", "model_final.pth", "curves.png"} <= {
        path.name for path in output.iterdir()
    }
    assert cv2.imread(str(output / "curves.png")).shape[1] > 1000
    pictures = sorted((output / "pictures").iterdir())
    assert len(pictures) == 2
    for picture in pictures:
        assert cv2.imread(str(picture)).shape[1] > 1200  # ground truth beside predictions

    weights = (output / "model_final.pth").read_bytes()
    assert main([*options, "--iterations", "2"]) == 0
    assert "2 iterations is complete" in (output / "log.txt").read_text()
    assert (output / "model_final.pth").read_bytes() == weights


def test_restart_forgets_what_was_there(tmp_path):
    output = tmp_path / "again"
    output.mkdir()
    (output / "last_checkpoint").write_text("of_another_training.pth")
    (output / "metrics.json").write_text('{"iteration": 400, "total_loss": 1.0}\n')
    (output / "thesis.tex").write_text("all there is of it")
    (output / "model_0000399.pth").write_bytes(b"of another training")
    options = ["--output", str(output), "--pictures", "0", "--iterations", "1"]
    assert main([*options, "--restart"]) == 0
    assert (output / "thesis.tex").read_text() == "all there is of it"
    assert not (output / "model_0000399.pth").exists()
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert max(line["iteration"] for line in lines) == 0  # the only step


def test_an_output_that_is_a_file_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["--output", str(tmp_path / "file"), "--iterations", "1"]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_a_length_that_is_none_is_refused(value, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path), "--iterations", value])
    assert stop.value.code == 2
    assert "--iterations" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named_without_a_traceback(tmp_path, capsys):
    (tmp_path / "last_checkpoint").write_text("model_0000099.pth")
    (tmp_path / "model_0000099.pth").write_bytes(b"cut off")
    assert main(["--output", str(tmp_path), "--iterations", "200"]) == 1
    assert "model_0000099.pth cannot be read as a checkpoint" in capsys.readouterr().err
    assert (tmp_path / "model_0000099.pth").read_bytes() == b"cut off"
