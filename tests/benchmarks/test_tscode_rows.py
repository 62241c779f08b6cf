# SPDX-License-Identifier: Apache-2.0
"""The benchmark's TSCODE rows on a small image."""

from typing import Any

import pytest
import torch

from d2_decouple.benchmarks import tscode


@pytest.mark.parametrize("name", ["tscode_fcos_inference", "tscode_gfl_train_step"])
def test_both_sides_run(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(tscode, "_SIZE", (128, 160))
    row = tscode.ROWS[name]
    found = [side()() for side in (row.ours, row.reference)]
    if name.endswith("inference"):
        assert [len(results[0]["instances"]) for results in found] == [100, 100]


@torch.no_grad()
@pytest.mark.parametrize("host", ["fcos", "atss", "gfl"])
def test_both_sides_select_among_as_many_candidates(host: str) -> None:
    """Random weights detect nothing, which would hide the cost of selection."""

    def candidates(recipe: str) -> int:
        model: Any = tscode._model(recipe).eval()
        images, _, predictions = model.predict([{"image": torch.zeros(3, 128, 160)}])
        (proposals,) = model.selection.propose(predictions, images.image_sizes)
        return len(proposals)

    counts = [candidates(f"{plug_in}{host}_R_50_FPN_1x") for plug_in in ("", "tscode_")]
    assert counts[1] == pytest.approx(counts[0], rel=0.02)
    assert counts[0] > 1000
