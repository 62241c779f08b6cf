# SPDX-License-Identifier: Apache-2.0
"""The benchmark's table and JSON; what it measures is not a matter of tests."""

import json
import time

import pytest
import torch

from d2_decouple import benchmark


def sleeper(seconds):
    return lambda: lambda: time.sleep(seconds)


@pytest.fixture
def rows(monkeypatch):
    """Two rows of known ratio; the peak memory would be measured in another process."""
    made = {
        name: benchmark.Row(
            ours=sleeper(ours),
            reference=sleeper(0.02),
            reference_name="a sleep",
            target=0.75,
            setting="none",
        )
        for name, ours in {"fast": 0.005, "slow": 0.03}.items()
    }
    monkeypatch.setattr(benchmark, "ROWS", made)
    monkeypatch.setattr(benchmark, "_peak_in_child", lambda name, threads: 12.5)
    threads = torch.get_num_threads()
    yield made
    torch.set_num_threads(threads)


def test_json_has_the_agreed_form_and_ratios_are_those_of_the_times(rows, tmp_path, capsys):
    file = tmp_path / "result.json"
    assert benchmark.main(["--json", str(file), "--repeats", "3"]) == 0
    result = json.loads(file.read_text())
    assert result["machine"].keys() >= {"cpus", "threads", "torch"}
    fast, slow = result["rows"]
    assert fast.keys() >= {
        *("name", "ours_ms", "reference", "reference_ms", "ratio", "target", "met", "peak_mib")
    }
    assert fast["name"] == "fast"
    assert fast["met"] is True
    assert slow["met"] is False
    assert fast["ratio"] == pytest.approx(fast["ours_ms"] / fast["reference_ms"], abs=2e-3)
    assert slow["ratio"] > 1 > fast["ratio"]
    assert "slow" in capsys.readouterr().out


def test_only_chooses_and_an_unknown_row_names_the_nearest(rows, tmp_path):
    file = tmp_path / "result.json"
    assert benchmark.main(["--only", "slow", "--json", str(file), "--repeats", "1"]) == 0
    assert [row["name"] for row in json.loads(file.read_text())["rows"]] == ["slow"]
    with pytest.raises(SystemExit, match=r"'slw'.*'slow'"):
        benchmark.main(["--only", "slw"])


def test_list_names_target_reference_and_setting(capsys):
    assert benchmark.main(["--list"]) == 0
    printed = capsys.readouterr().out
    for name in ("fcos_inference", "fcos_train_step", "fcos_predictor", "fcos_predictor_bfloat16"):
        assert name in printed
    assert "0.75 x torchvision FCOS as shipped" in printed
    assert "800x1216" in printed


@torch.no_grad()
def test_both_sides_of_the_fcos_rows_select_among_planted_candidates(monkeypatch):
    """Random weights detect nothing, which would hide the cost of selection."""
    monkeypatch.setattr(benchmark, "_SIZE", (128, 160))
    (ours,) = benchmark._our_inference(benchmark._our_fcos)()
    (theirs,) = benchmark._torchvision_inference(benchmark._torchvision_fcos)()
    assert len(ours["instances"]) == len(theirs["scores"]) == 100
    for precision in ("float32", "bfloat16"):
        found = benchmark._our_predictor(precision)()
        assert len(found) == 100
        assert found.image_size == (128, 160)
