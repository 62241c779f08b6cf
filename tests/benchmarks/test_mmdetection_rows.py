# SPDX-License-Identifier: Apache-2.0
"""Rows whose reference is another library: our side runs, and a missing library is named."""

import pytest

from d2_decouple import benchmark
from d2_decouple.benchmarks import mmdetection
from d2_decouple.benchmarks.detectors import training


@pytest.mark.parametrize("host", ["atss", "gfl"])
def test_our_side_runs(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setattr(mmdetection, "_SIZE", (128, 160))
    step = training(lambda: mmdetection._ours(host), (128, 160))
    step()


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark.Row, "installed", False)
    with pytest.raises(SystemExit, match=r"'gfl_train_step'.*mmdetection's GFL.*pip install mmdet"):
        benchmark.main(["--only", "gfl_train_step"])

    assert "gfl_train_step" not in benchmark._selected(None, "cpu")
