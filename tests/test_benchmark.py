# SPDX-License-Identifier: Apache-2.0
"""The benchmark's table and JSON; what it measures is not a matter of tests."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from d2_decouple import benchmark
from d2_decouple.benchmarks.detectors import SizedRow


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
    peaks = {"ours": 12.5, "reference": 25.0}
    monkeypatch.setattr(benchmark, "_peak_in_child", lambda name, side, threads: peaks[side])
    threads = torch.get_num_threads()
    yield made
    torch.set_num_threads(threads)


def test_json_has_the_agreed_form_and_ratios_are_those_of_the_times(rows, tmp_path, capsys):
    file = tmp_path / "result.json"
    assert benchmark.main(["--json", str(file), "--repeats", "3"]) == 0
    result = json.loads(file.read_text())
    assert result["machine"].keys() >= {"cpus", "threads", "torch", "extension"}
    fast, slow = result["rows"]
    assert fast.keys() >= {
        *("name", "ours_ms", "reference", "reference_ms", "ratio", "target", "met", "peak_mib")
    }
    assert (fast["peak_mib"], fast["reference_peak_mib"]) == (12.5, 25.0)
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


@pytest.mark.parametrize("option", ["--repeats", "--threads"])
def test_at_least_one_run_and_one_thread(option, rows, capsys):
    with pytest.raises(SystemExit):
        benchmark.main([option, "0"])
    assert f"{option} is 0; wanted is at least 1" in capsys.readouterr().err


def test_list_names_target_reference_and_setting(capsys):
    assert benchmark.main(["--list"]) == 0
    printed = capsys.readouterr().out
    for name in ("fcos_inference", "fcos_train_step", "fcos_predictor", "fcos_predictor_bfloat16"):
        assert name in printed
    assert "0.75 x torchvision FCOS as shipped" in printed
    for name, target in (("pdnet_inference", "1.05"), ("pdnet_train_step", "1.1")):
        assert name in printed
        assert f"{target} x our FCOS" in printed
    for row, other in (("1_inference <= 1.03", "Faster"), ("3_train_step <= 0.9", "Cascade")):
        assert f"decoupled_rcnn_{row} x Detectron2's {other} R-CNN" in " ".join(printed.split())
    assert "800x1216" in printed


@pytest.mark.parametrize(("peak_target", "met"), [(None, True), (0.5, True), (0.49, False)])
def test_a_target_of_memory_counts(rows, peak_target, met):
    """Ours needs half of what the reference does, and is fast enough."""
    rows["fast"] = dataclasses.replace(rows["fast"], peak_target=peak_target)
    assert benchmark._result("fast", repeats=1, threads=1)["met"] is met


@pytest.mark.parametrize(("size_target", "met"), [(None, True), (0.5, True), (0.4, False)])
def test_what_memory_is_for_is_printed_and_its_target_counts(
    rows, size_target, met, tmp_path, capsys
):
    rows["fast"] = SizedRow(
        **vars(rows["fast"]),
        sizes=lambda: {"parameters": (9.0, 6.0), "saved": (2.0, 4.0)},
        size_targets={"saved": size_target} if size_target else {},
    )
    file = tmp_path / "result.json"
    assert benchmark.main(["--json", str(file), "--repeats", "1"]) == 0
    fast, slow = json.loads(file.read_text())["rows"]
    saved = {"of": "saved", "ours_mib": 2, "reference_mib": 4, "ratio": 0.5}
    assert [size["of"] for size in fast["sizes"]] == ["peak", "parameters", "saved"]
    assert fast["sizes"][2] == {**saved, "target": size_target or None}
    assert fast["met"] is met
    assert "sizes" not in slow
    table = capsys.readouterr().out.split("Of the memory")[1]
    assert "parameters" in table
    assert "slow" not in table


@pytest.mark.parametrize(("floor_target", "met"), [(None, True), (1e6, True), (1.0, False)])
def test_a_row_that_knows_its_bytes_is_held_against_a_copy(
    rows, floor_target, met, tmp_path, capsys
):
    """To copy 2 MB takes less than the 5 ms of the step, and 16 bytes take some time."""
    rows["fast"] = dataclasses.replace(
        rows["fast"], least_bytes=2_000_000, floor_target=floor_target
    )
    file = tmp_path / "result.json"
    assert benchmark.main(["--json", str(file), "--repeats", "3", "--threads", "1"]) == 0
    fast, slow = json.loads(file.read_text())["rows"]
    assert fast["least_mb"] == 2
    assert fast["copy_gb_per_s"] == pytest.approx(2 / fast["floor_ms"], rel=0.1, abs=0.06)
    assert fast["above_floor"] == pytest.approx(fast["ours_ms"] / fast["floor_ms"], rel=0.1)
    assert fast["met"] is met
    assert "floor_ms" not in slow
    table = capsys.readouterr().out.split("A copy that moves as many bytes")[1]
    assert "fast" in table
    assert "slow" not in table


def test_a_copy_moves_the_bytes_it_is_said_to():
    assert benchmark._copy(1000, "cpu")().nbytes == 500  # read and written


def test_rows_of_the_other_device_are_left_out_unless_named(rows, monkeypatch, capsys):
    rows["gpu"] = dataclasses.replace(rows["fast"], device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark._selected(None, "cpu") == ["fast", "slow"]
    for arguments in (["--only", "fast,gpu"], ["--device", "cuda"]):
        with pytest.raises(SystemExit, match=r"'gpu' runs on a GPU.*finds none.*collect_env"):
            benchmark.main(arguments)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="another system's peak memory")
def test_peak_memory_is_of_the_side_that_was_asked_for(rows):
    """Neither side's 64 MiB are seen in the other's process, since each has one of its own."""
    held = 2**26
    code = (
        "import torch\n"
        "from d2_decouple import benchmark\n"
        "def fill(): torch.ones({size}, dtype=torch.uint8)\n"
        "row = benchmark.Row(ours=lambda: fill, reference=lambda: int, reference_name='',\n"
        "                    target=1, setting='')\n"
        "benchmark.ROWS['memory'] = row\n"
        "before = benchmark._peak_mib('memory', 'reference', 1)\n"
        "print(benchmark._peak_mib('memory', 'ours', 1) - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code.format(size=held)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(held / 2**20, abs=8)
