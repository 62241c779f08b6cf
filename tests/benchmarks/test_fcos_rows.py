# SPDX-License-Identifier: Apache-2.0
"""The benchmark's FCOS rows on a small image."""

import pytest
import torch

from d2_decouple.benchmarks import fcos


@torch.no_grad()
def test_both_sides_of_the_fcos_rows_select_among_planted_candidates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Random weights detect nothing, which would hide the cost of selection."""
    monkeypatch.setattr(fcos, "_SIZE", (128, 160))
    (ours,) = fcos.ROWS["fcos_inference"].ours()()
    (theirs,) = fcos.ROWS["fcos_inference"].reference()()
    assert len(ours["instances"]) == len(theirs["scores"]) == 100
    for precision in ("float32", "bfloat16"):
        found = fcos._our_predictor(precision)()
        assert len(found) == 100
        assert found.image_size == (128, 160)
