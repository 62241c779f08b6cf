# SPDX-License-Identifier: Apache-2.0
"""The table on paper: hand-worked hours and memory, and what is counted of a step."""

from __future__ import annotations

import pytest
import torch
from helpers_of_faults import on_paper
from torch import nn

CASE = on_paper.Counted(gflop=1000, parameters=30.0, trained=25.0, kept_mib=2048, cpu_seconds=9)


def test_hours_are_the_hand_worked_ones():
    """1.44 million images of 1 TFLOP, at 0.5 of 100 TFLOP/s: 28,800 s of one GPU, or 8 hours."""
    gpu = on_paper.GPU(operations=100e12)
    one, eight, many = on_paper.CLUSTERS
    assert on_paper.hours(CASE, one, gpu, 0.5) == pytest.approx(8.0)
    # A ring of 8 sends 2 * 7/8 of 100 MB at 300 GB/s: 0.583 ms in each of 90,000 steps, 52.5 s.
    assert on_paper.hours(CASE, eight, gpu, 0.5) == pytest.approx(1.0 + 52.5 / 3600)
    # 2 * 63/64 of 100 MB at 25 GB/s: 7.875 ms in each of 22,500 steps, 177 s.
    assert on_paper.hours(CASE, many, gpu, 0.5) == pytest.approx(0.125 + 177.1875 / 3600)


def test_all_clusters_see_as_many_images():
    assert {each.images * each.iterations for each in on_paper.CLUSTERS} == {1_440_000}


def test_memory_is_the_hand_worked_one():
    """3 GiB, 4 * 30 + 8 * 25 = 320 MB of numbers (0.298 GiB), 2 GiB for each image."""
    gpu = on_paper.GPU()
    one, eight, many = on_paper.CLUSTERS
    assert on_paper.memory(CASE, one, gpu) == (pytest.approx(3.298 + 32, abs=1e-3), 1)
    assert on_paper.memory(CASE, eight, gpu) == (pytest.approx(3.298 + 4, abs=1e-3), 1)
    assert on_paper.memory(CASE, many, gpu) == (pytest.approx(3.298 + 2, abs=1e-3), 1)


def test_a_step_that_does_not_fit_is_several_batches():
    """16 images of 6 GiB are 96 GiB, more than 80; two batches of 8 are 48."""
    large = CASE._replace(kept_mib=6 * 1024)
    size, batches = on_paper.memory(large, on_paper.CLUSTERS[0], on_paper.GPU())
    assert (size, batches) == (pytest.approx(3.298 + 48, abs=1e-3), 2)
    row = on_paper.table({"model": large}).splitlines()[2]
    assert "| 51 (2 batches) |" in row


def test_the_table_goes_between_its_markers():
    text = f"before\n{on_paper.START}\nold\n{on_paper.END}\nafter\n"
    assert on_paper.with_table(text, "new") == text.replace("old", "new")
    for broken in (text.replace(on_paper.END, ""), text + on_paper.START):
        with pytest.raises(on_paper.ConfigError, match="needs one line"):
            on_paper.with_table(broken, "new")


class Small(nn.Module):
    """One convolution and a frozen one: FLOPs and bytes can be worked out by hand."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Conv2d(3, 4, 1, bias=False).requires_grad_(False)
        self.conv = nn.Conv2d(4, 2, 1, bias=False)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, batch):
        pixels = batch[0]["image"][None].float()
        return {"loss": (self.conv(self.frozen(pixels)).float() * self.gain).sum()}


def test_a_step_is_counted(monkeypatch):
    """10 x 20 pixels: forward 2 * 200 * (3 * 4 + 4 * 2) = 8,000; for the weights again 3,200.

    Its input needs no gradient. Kept are the 800 numbers that the convolution read, in bfloat16
    (1,600 bytes), its 8 weights, cast for it (16 bytes), and what is multiplied by the gain, 400
    numbers of float32 (1,600 bytes); not the gain, which is there anyhow.
    """
    monkeypatch.setattr(on_paper, "SIZE", (10, 20))
    monkeypatch.setattr(on_paper, "get_config", lambda name: type("Cfg", (), {"model": name}))
    monkeypatch.setattr(on_paper, "instantiate", lambda model: Small())
    monkeypatch.setattr(on_paper, "example", lambda: {"image": torch.ones(3, 10, 20)})
    kept = {}
    monkeypatch.setattr(
        on_paper, "round", lambda x, n: kept.setdefault(len(kept), x), raising=False
    )
    on_paper.count("small")
    assert kept[0] == pytest.approx(11_200 / 1e9)
    assert kept[1] == pytest.approx(21e-6)
    assert kept[2] == pytest.approx(9e-6)
    assert kept[3] * 2**20 == pytest.approx(3216)


def test_the_example_has_objects_of_all_sizes_inside_the_image():
    truth = on_paper.example()["instances"]
    sides = truth.gt_boxes.tensor[:, 2:] - truth.gt_boxes.tensor[:, :2]
    assert len(truth) == 7
    assert (sides.min().item(), sides.max().item()) == pytest.approx((40, 400), rel=1e-2)
    assert truth.gt_boxes.inside_box((800, 1333)).all()


def test_recipes_are_those_of_all_methods():
    names = on_paper.recipes()
    assert {"fcos_R_50_FPN_1x", "tscode_ota_R_50_FPN_1x", "decoupled_rcnn_R_50_FPN_1x"} <= {*names}
    assert len(names) == len(set(names)) == 19


def test_nothing_counted_and_unknown_recipes_are_named(tmp_path, capsys):
    options = ["--results", str(tmp_path / "none.json")]
    assert on_paper.main(options) == 1
    assert "type --measure all" in capsys.readouterr().err
    assert on_paper.main([*options, "--measure", "fcos_R_50"]) == 1
    assert "no recipe 'fcos_R_50'; did you mean" in capsys.readouterr().err


def test_what_was_counted_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(on_paper, "count", lambda name: CASE)
    file = tmp_path / "kept.json"
    document = tmp_path / "doc.md"
    document.write_text(f"{on_paper.START}\n{on_paper.END}\n")
    options = ["--results", str(file), "--write", str(document)]
    assert on_paper.main([*options, "--measure", "fcos_R_50_FPN_1x"]) == 0
    assert on_paper.read(file) == {"fcos_R_50_FPN_1x": CASE}
    assert "| `fcos_R_50_FPN_1x` | 1000 | 30.0 | 2048 | 9.0 | 35 |" in document.read_text()
