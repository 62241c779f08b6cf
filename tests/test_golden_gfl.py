# SPDX-License-Identifier: Apache-2.0
"""Golden numbers of ATSS and GFL: cases made by plain loops, the authors', and wrong ones."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_gfl_cases import write_assign_case, write_head_case, write_loss_case
from golden_tools import PUBLIC_CASES, TOOL, change_entry, exceeded, load, unnoticed
from torch import Tensor

from d2_decouple.layers import losses as loss_functions
from d2_decouple.modeling import (
    BestPairs,
    DenseHead,
    DistributionFocalTerm,
    GFLAssigner,
    GFLPredictor,
    GIoUTerm,
    HardNMS,
)

WRITERS: dict[str, Callable[[Path], Path]] = {
    "atss_assign": write_assign_case,
    "gfl_head": write_head_case,
    "gfl_loss": write_loss_case,
}


@pytest.fixture(scope="module")
def golden() -> Any:
    return load(TOOL)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("golden")
    return {kind: writer(folder) for kind, writer in WRITERS.items()}


@pytest.mark.parametrize("kind", WRITERS)
def test_right_case_passes(golden: Any, cases: dict[str, Path], kind: str) -> None:
    case = golden.load_case(cases[kind])
    assert all(row.share <= 1 for row in golden.verify(case))
    assert exceeded(golden, cases[kind]) == set()
    assert all(golden.ADAPTERS[kind].left_out(name) is None for name in case.outputs)


def test_cases_have_something_to_tell(golden: Any, cases: dict[str, Path]) -> None:
    """Positives of every object and on several levels, cells in an image's own padding."""
    case = golden.load_case(cases["atss_assign"])
    for scene, objects in (("s0", 5), ("s1", 2), ("s2", 0)):
        counts = case.array("", case.outputs[f"{scene}/positives_per_gt"])
        assert len(counts) == objects
        assert (counts > 0).all()
    assert -2 in case.array("", case.outputs["s1/assigned"])
    assert -2 not in case.array("", case.outputs["s2/assigned"])
    weights = np.load(cases["gfl_loss"].with_suffix(".npz"))["out/avg_factor/level"]
    assert (weights > 0).sum() >= 3
    assert (weights == 0).any()


@pytest.mark.parametrize("kind", WRITERS)
def test_the_authors_case_passes(golden: Any, kind: str) -> None:
    path = PUBLIC_CASES / f"{kind}_a.json"
    if not path.is_file():
        pytest.skip(f"no reference cases at {PUBLIC_CASES}; they are not part of a release")
    case = golden.load_case(path)
    assert all(row.share <= 1 for row in golden.verify(case))
    assert all(golden.ADAPTERS[kind].left_out(name) is None for name in case.outputs)


@pytest.mark.parametrize("kind", WRITERS)
def test_changed_number_is_noticed(golden: Any, cases: dict[str, Path], kind: str) -> None:
    assert unnoticed(golden, cases[kind]) == []


# What a package that does otherwise would give.


class AlikeWeights(GFLAssigner):
    """A positive counts 1, whatever its score."""

    def _weights(self, *known: Any) -> Any:
        weights, quality, minimum = super()._weights(*known)
        return weights.sign(), quality, minimum


class NoQuality(GFLAssigner):
    """The target of a positive's class is 1."""

    def _weights(self, *known: Any) -> Any:
        weights, quality, minimum = super()._weights(*known)
        return weights, quality.sign(), minimum


class AtLeastOne(GFLAssigner):
    """The sum of the weights counts as 1 where it is less."""

    def _weights(self, *known: Any) -> Any:
        return (*super()._weights(*known)[:2], 1.0)


class Unscaled(GFLPredictor):
    """All levels share their distributions' sharpness."""

    def forward(self, *known: Any) -> Any:
        self.scales.data.fill_(1)
        return super().forward(*known)


def detached_factor(logits: Tensor, labels: Tensor, quality: Tensor, *known: Any) -> Tensor:
    """The modulating factor passes no gradient."""
    whole = loss_functions.quality_focal_loss(logits, labels, quality, *known)
    cross = loss_functions.quality_focal_loss(logits, labels, quality, 0.0, *known[1:])
    return (whole / cross).detach() * cross


def biased_thresholds(overlaps: Tensor, exists: Tensor) -> Tensor:
    """The deviation is that of a whole population."""
    rows = [row[there] for row, there in zip(overlaps, exists, strict=True)]
    found = [row.mean() + row.std(correction=0) for row in rows]
    return torch.stack(found) if found else overlaps.new_zeros(0)


ADAPTER = "golden_adapters.gfl"
WRONG: dict[str, tuple[str, str, Any, str, set[str]]] = {
    # module, name, what is there instead, kind, outputs among those that must not pass
    "half a cell off": (
        ADAPTER,
        "DenseHead",
        lambda **x: DenseHead(**{**x, "offset": 0.5}),
        "gfl_head",
        {"boxes", "det_boxes/0"},
    ),
    "one scale for all": (ADAPTER, "GFLPredictor", Unscaled, "gfl_head", {"z/p3", "boxes"}),
    "best pairs": (ADAPTER, "BestLocations", BestPairs, "gfl_head", {"det_boxes/0"}),
    "another suppression": (
        ADAPTER,
        "HardNMS",
        lambda **_: HardNMS(test_nms_thresh=0.9),
        "gfl_head",
        {"det_boxes/0"},
    ),
    "alike weights": (
        ADAPTER,
        "GFLAssigner",
        AlikeWeights,
        "gfl_loss",
        {"avg_factor", "loss_bbox", "loss_dfl/raw"},
    ),
    "no quality": (ADAPTER, "GFLAssigner", NoQuality, "gfl_loss", {"loss_cls", "grad/p/p3"}),
    "divided by 1 at least": (
        ADAPTER,
        "GFLAssigner",
        AtLeastOne,
        "gfl_loss",
        {"avg_factor", "loss_bbox", "loss_dfl"},
    ),
    "another weight of boxes": (
        ADAPTER,
        "GIoUTerm",
        lambda **_: GIoUTerm(weight=1.0),
        "gfl_loss",
        {"loss_bbox", "total"},
    ),
    "a sum over sides": (
        ADAPTER,
        "DistributionFocalTerm",
        lambda **_: DistributionFocalTerm(weight=1.0),
        "gfl_loss",
        {"loss_dfl", "total"},
    ),
    "detached factor": (
        "d2_decouple.modeling.gfl",
        "quality_focal_loss",
        detached_factor,
        "gfl_loss",
        {"grad/p/p3", "grad/p/p5"},
    ),
    "distances not cut": (
        "d2_decouple.layers.losses",
        "_BELOW_LAST_BIN",
        1e-6,
        "gfl_loss",
        {"loss_dfl"},
    ),
    "deviation of a population": (
        "d2_decouple.modeling.atss",
        "adaptive_thresholds",
        biased_thresholds,
        "atss_assign",
        {"s0/thresholds", "s1/thresholds"},
    ),
    "outside its object": (
        "d2_decouple.modeling.atss",
        "_MIN_DISTANCE",
        -1000.0,
        "atss_assign",
        {"s1/assigned"},
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_other_ways_do_not_pass(
    golden: Any, cases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    module, name, instead, kind, noticed = WRONG[mistake]
    monkeypatch.setattr(sys.modules[module], name, instead)
    assert exceeded(golden, cases[kind]) >= noticed


# What cannot be compared says so.


@pytest.mark.parametrize(
    ("kind", "keys", "value", "named"),
    [
        ("atss_assign", ["config", "ignore_iof_thr"], 0.5, "'ignore_iof_thr' is '0.5'"),
        ("atss_assign", ["config", "min_center_distance_px"], 1, "'min_center_distance_px' is"),
        ("atss_assign", ["inputs", "s1/pad_hw", "value"], [64, 96], r"\[60, 50\].*\[64, 96\]"),
        ("gfl_head", ["config", "reg_topk"], 4, "'reg_topk' is '4'"),
        ("gfl_loss", ["inputs", "pad_hw", "value"], [[90, 120]] * 3, r"\[90, 120\]"),
    ],
)
def test_settings_without_counterpart_are_refused(
    golden: Any, tmp_path: Path, kind: str, keys: list[str], value: Any, named: str
) -> None:
    path = WRITERS[kind](tmp_path)
    change_entry(path, keys, value)
    with pytest.raises(golden.GoldenError, match=rf"(?s){kind}_small.*{named}"):
        golden.verify(golden.load_case(path))


def test_unknown_parameter_is_refused(golden: Any, cases: dict[str, Path]) -> None:
    case = golden.load_case(cases["gfl_head"])
    more = replace(case, weight_entries=[*case.weight_entries, ["dreams.weight", [1], 1.0, 0.0]])
    with pytest.raises(golden.GoldenError, match=r"dreams\.weight.*gfl_reg"):
        golden.verify(more)
