# SPDX-License-Identifier: Apache-2.0
"""Golden numbers of SALT-Net: cases made by plain loops, the authors', and wrong ones."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_salt_cases import write_head_case, write_loss_case
from golden_tools import PUBLIC_CASES, TOOL, change_entry, exceeded, load, unnoticed
from torch import Tensor

from d2_decouple.modeling import GIoUTerm, class_score, point_alignment
from d2_decouple.modeling.salt import SALT, SALTOptions, boundary_aware_points

WRITERS: dict[str, Callable[[Path], Path]] = {
    "salt_head": write_head_case,
    "salt_loss": write_loss_case,
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


def test_another_number_of_greatest_shares_passes(golden: Any, tmp_path: Path) -> None:
    assert exceeded(golden, write_head_case(tmp_path, topk=2)) == set()


def test_cases_have_something_to_tell(golden: Any, cases: dict[str, Path]) -> None:
    """Sides of zero, points far outside, coarse losses on several levels."""
    case = golden.load_case(cases["salt_head"])
    maps = {name: case.array(name, entry) for name, entry in case.outputs.items()}
    assert (maps["d/p3"] == 0).any()
    assert (maps["d/p3"] > 0).mean() > 0.5
    assert (abs(maps["c_points/p7"]) > 1).any()  # of one cell
    assert abs(maps["c_points/p3"] - maps["r_points/p3"]).max() > 0.5
    case = golden.load_case(cases["salt_loss"])
    raw = case.array("", case.outputs["loss_bbox_init/raw"])
    assert (raw > 0).sum() >= 3
    assert (raw == 0).any()


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


def variant(**options: Any) -> Callable[..., SALT]:
    """SALT with other options."""
    return lambda **x: SALT(**x, options=SALTOptions(**options))


class Unscaled(SALT):
    """All levels share the scale of their coarse distances."""

    def _coarse_box(self, box_feature: Tensor, level: int) -> Any:
        distances, fractions = super()._coarse_box(box_feature, level)
        return distances / self.scales[level], fractions


def positive_vectors(self: SALT, cls_feature: Tensor, box_points: Tensor) -> Tensor:
    """A ReLU on the vectors, as the paper's Eq. 4 has it."""
    vectors = point_alignment.float32_rows(self.vector_pred, self.vector_subnet(cls_feature))
    return vectors.relu().unflatten(-1, (9, 2)).exp() * box_points


def crossed(distances: Tensor, fractions: Tensor) -> Tensor:
    """The extremes' fractions in another order."""
    order = [1, 0, 3, 2, *range(4, fractions.shape[-1])]
    return boundary_aware_points(distances, fractions[..., order])


def windowed(feature: Tensor, points: Tensor, weight: Tensor) -> Tensor:
    """Eq. 7 as the paper writes it: the window of an ordinary convolution is added."""
    taps = torch.tensor([(0, -1), (-1, 0), (0, 1), (1, 0), (-1, -1), (-1, 1), (0, 0), (1, -1)])
    window = torch.cat((taps, torch.ones(1, 2))).flip(-1).to(points)[:, :, None, None]
    return REAL_CONV(feature, points + window, weight)


def half_off(*size: Any, **like: Any) -> Tensor:
    """A cell stands for its middle."""
    return REAL_CELLS(*size, **like) + 0.5


REAL_CONV, REAL_CELLS = point_alignment.deformable_point_conv, point_alignment.grid_cells
PACKAGE = "d2_decouple.modeling."
ADAPTER = "golden_adapters.salt"
AFTER_CLASS_POINTS = {"p/p3", "det_boxes/0", "grad_p/salt_cls.bias"}
WRONG: dict[str, tuple[str, str, Any, str, set[str]]] = {
    # module, name, what is there instead, kind, outputs among those that must not pass
    "no skip": (
        *(ADAPTER, "SALT", variant(use_skip=False), "salt_head"),
        {"c_points/p3", *AFTER_CLASS_POINTS},
    ),
    "vectors added": (
        *(ADAPTER, "SALT", variant(class_points="sum"), "salt_head"),
        {"c_points/p3", "c_points/p7", *AFTER_CLASS_POINTS},
    ),
    "vectors alone": (
        *(ADAPTER, "SALT", variant(class_points="free"), "salt_head"),
        {"c_points/p3", *AFTER_CLASS_POINTS},
    ),
    "one scale for all": (
        *(ADAPTER, "SALT", Unscaled, "salt_head"),
        {"d/p3", "r_points/p3", "z/p3", "c_points/p3", "grad_d/reg_init_out.regression.bias"},
    ),
    "fractions crossed": (
        *(PACKAGE + "salt", "boundary_aware_points", crossed, "salt_head"),
        {"r_points/p3", "c_points/p3", "z/p3", "p/p3"},
    ),
    "a window added": (
        *(PACKAGE + "point_alignment", "deformable_point_conv", windowed, "salt_head"),
        {"z/p3", "p/p3", "boxes"},
    ),
    "another quality": (
        *(ADAPTER, "product_score", class_score, "salt_head"),
        {"p/p3", "det_boxes/0"},
    ),
    "another weight of coarse boxes": (
        *(ADAPTER, "GIoUTerm", lambda **x: GIoUTerm(boxes=x["boxes"], weight=2.0), "salt_loss"),
        {"loss_bbox_init", "total", "grad/d/p3"},
    ),
    "final boxes twice": (
        *(ADAPTER, "GIoUTerm", lambda **x: GIoUTerm(weight=x["weight"]), "salt_loss"),
        {"loss_bbox_init/raw", "total", "grad/d/p3"},
    ),
    "half a cell off": (
        *(PACKAGE + "point_alignment", "grid_cells", half_off, "salt_head"),
        {"z/p3", "p/p3"},
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_other_ways_do_not_pass(
    golden: Any, cases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    module, name, instead, kind, noticed = WRONG[mistake]
    monkeypatch.setattr(sys.modules[module], name, instead)
    assert exceeded(golden, cases[kind]) >= noticed


def test_a_relu_on_vectors_does_not_pass(
    golden: Any, cases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SALT, "_class_points", positive_vectors)
    assert exceeded(golden, cases["salt_head"]) >= {"c_points/p3", *AFTER_CLASS_POINTS}


# What cannot be compared says so.


def test_another_padding_is_refused(golden: Any, tmp_path: Path) -> None:
    path = write_loss_case(tmp_path)
    change_entry(path, ["inputs", "pad_hw", "value"], [[90, 120]] * 3)
    with pytest.raises(golden.GoldenError, match=r"(?s)salt_loss_small.*\[90, 120\]"):
        golden.verify(golden.load_case(path))


def test_unknown_parameter_is_refused(golden: Any, cases: dict[str, Path]) -> None:
    case = golden.load_case(cases["salt_head"])
    more = replace(case, weight_entries=[*case.weight_entries, ["dreams.weight", [1], 1.0, 0.0]])
    with pytest.raises(golden.GoldenError, match=r"dreams\.weight.*salt_cls_refinement"):
        golden.verify(more)
