# SPDX-License-Identifier: Apache-2.0
"""The benchmark's PDNet rows on a small image."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from d2_decouple.benchmarks import pdnet


@pytest.mark.parametrize("name", ["pdnet_inference", "pdnet_train_step"])
def test_both_sides_run(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(pdnet, "_SIZE", (128, 160))
    row = pdnet.ROWS[name]
    found = [side()() for side in (row.ours, row.reference)]
    if name == "pdnet_inference":
        assert [len(results[0]["instances"]) for results in found] == [100, 100]


@torch.no_grad()
def test_both_sides_select_among_as_many_candidates_on_the_same_pyramid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Random weights detect nothing, which would hide the cost of selection."""
    monkeypatch.setattr(pdnet, "_SIZE", (128, 160))

    def candidates(build: Callable[[], nn.Module]) -> tuple[int, dict[str, Any]]:
        model: Any = build().eval()
        image = torch.zeros(3, 128, 160)
        images, _, predictions = model.predict([{"image": image}])
        (proposals,) = model.selection.propose(predictions, images.image_sizes)
        shapes = {name: x.shape for name, x in model.backbone.state_dict().items()}
        return len(proposals), shapes

    ours, theirs = (candidates(build) for build in (pdnet._pdnet, pdnet._fcos))
    assert ours[0] == theirs[0] > 1000
    assert ours[1] == theirs[1]
