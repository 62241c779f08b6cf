# SPDX-License-Identifier: Apache-2.0
"""The benchmark's SALT-Net rows on a small image."""

from typing import Any

import pytest
import torch

from d2_decouple import benchmark
from d2_decouple.benchmarks import salt

SIDES = {"SALT-Net": salt._salt, "GFL": salt._gfl}


@pytest.mark.parametrize("name", ["salt_inference", "salt_train_step"])
def test_both_sides_run(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(salt, "_SIZE", (128, 160))
    row = benchmark.ROWS[name]
    found = [side()() for side in (row.ours, row.reference)]
    if name.endswith("inference"):
        assert min(len(results[0]["instances"]) for results in found) > 20


@torch.no_grad()
def test_candidates_and_points() -> None:
    """Both sides select among as many candidates, and points lie apart as after a training.

    320 x 384 pixels are 40 x 48 = 1,920 cells of P3, 480, 120, 30 and 3 x 3 = 9 of the others. All
    but 1,000 of P3 are left, each with four planted classes.
    """
    counts: dict[str, int] = {}
    for name, build in SIDES.items():
        model: Any = build().eval()
        picture = torch.full((3, 320, 384), 120, dtype=torch.uint8)
        images, _, predictions = model.predict([{"image": picture}])
        (proposals,) = model.selection.propose(predictions, images.image_sizes)
        counts[name] = len(proposals)
        if name == "SALT-Net":
            points = predictions.extras["box_points"] - predictions.locations[:, None]
            spread = points.std(dim=2).mean(dim=1)[0] / predictions.strides.mean()
            assert spread.min() > 0.1
            sides = predictions.extras["coarse_boxes"][0, :, 2:] - predictions.locations
            assert (sides / predictions.strides[:, None]).median() == pytest.approx(4, abs=0.5)
    assert counts == dict.fromkeys(SIDES, 4 * (1000 + 480 + 120 + 30 + 9))


def test_targets() -> None:
    targets = {name: row.target for name, row in salt.ROWS.items()}
    assert targets == {"salt_inference": 1.30, "salt_train_step": 1.35}
