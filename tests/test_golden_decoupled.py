# SPDX-License-Identifier: Apache-2.0
"""Golden numbers of Decoupled R-CNN: cases made by plain loops, the authors', and wrong ones."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_decoupled_cases import write_head_case, write_proposals_case
from golden_tools import PUBLIC_CASES, TOOL, exceeded, load, unnoticed
from torch import Tensor

from d2_decouple.layers.boxes import BoxTransform
from d2_decouple.modeling import DecoupledROIHeads, HardNMS
from d2_decouple.modeling.regions import Regions

WRITERS: dict[str, Callable[[Path], Path]] = {
    "decoupled_proposals": write_proposals_case,
    "decoupled_rcnn_head": write_head_case,
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
    """Proposals that one threshold alone keeps, on either side; positives that stages lose."""
    arrays = {kind: np.load(path.with_suffix(".npz")) for kind, path in cases.items()}
    kept = [{*arrays["decoupled_proposals"][f"out/keep_{name}/full"].tolist()} for name in "ab"]
    assert kept[0] - kept[1]
    assert len(kept[1] - kept[0]) > 10
    head = arrays["decoupled_rcnn_head"]
    counts = [int(head[f"out/stage{stage}/num_pos_reg"]) for stage in range(3)]
    assert 20 > counts[0] > counts[1] >= counts[2] > 2


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


def test_a_changed_case_fails_the_command(
    golden: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_proposals_case(tmp_path)
    with np.load(path.with_suffix(".npz")) as stored:
        arrays = {name: stored[name] for name in stored.files}
    arrays["out/counts"][2] += 1
    np.savez(path.with_suffix(".npz"), **arrays)
    assert golden.main([str(tmp_path), "--only", "decoupled_proposals"]) == 1
    lines = [x for x in capsys.readouterr().out.splitlines() if x.endswith("EXCEEDED")]
    assert [line.split()[0] for line in lines] == ["counts"] * 2


# What a package that does otherwise would give.


class UpperClamp(BoxTransform):
    """Detectron2's: a side may shrink to nothing."""

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        limit = deltas.new_tensor([1e9, 1e9, self.scale_clamp, self.scale_clamp])
        bounded = torch.minimum(
            deltas.unflatten(1, (-1, 4)), limit * deltas.new_tensor(self.weights)
        )
        free = BoxTransform(weights=self.weights, scale_clamp=1e9)
        return free.apply_deltas(bounded.flatten(1), boxes)


class Unclipped(DecoupledROIHeads):
    """Boxes may leave the image between the stages of a training."""

    def refined(self, stage: int, sample: Any, change: Tensor) -> Regions:
        found = super().refined(stage, sample, change)
        positive = sample.gt_classes < self.num_classes
        learned = sample.regions.boxes[positive]
        moved = self.box_branches[stage].transform.apply_deltas(change.detach(), learned)
        found.boxes[positive] = moved
        return found


class MovedNegatives(DecoupledROIHeads):
    """Regions without an object move, too: to the right."""

    def refined(self, stage: int, sample: Any, change: Tensor) -> Regions:
        found = super().refined(stage, sample, change)
        found.boxes[sample.gt_classes == self.num_classes, 2] += 1
        return found


class SameSample(DecoupledROIHeads):
    """Regions that a stage has moved off their object go on being its positives."""

    def match_again(self, regions: Regions, targets: Any, *stage: int) -> Any:
        found = super().match_again(regions, targets, *stage)
        lost = found.gt_classes == self.num_classes
        found.gt_classes[lost] = 0
        found.gt_boxes[lost] = found.regions.boxes[lost] + 1
        return found


class FirstClass(DecoupledROIHeads):
    """The first stage moves regions by the change of class 0 at test."""

    def refine(self, maps: Any, regions: Regions, logits: Tensor, *known: Any) -> list[Tensor]:
        first = torch.zeros_like(logits)
        first[:, 0] = 1
        return super().refine(maps, regions, first, *known)


class OtherWeights(DecoupledROIHeads):
    """Of the stages: as many as in Eq. 8, 1 each."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "stage_loss_weights": [1.0, 1.0, 1.0]})


HEAD = "decoupled_rcnn_head"
WRONG: dict[str, tuple[str, Any, str, set[str]]] = {
    # name in the adapter, what is there instead, kind, outputs among those that must not pass
    "no ground truth in the class branch": (
        "DecoupledROIHeads",
        lambda **x: DecoupledROIHeads(**x, proposal_append_gt=False),
        HEAD,
        {"stage0/loss_cls", "stage0/n_cls"},
    ),
    "half the weight": (
        "DecoupledROIHeads",
        lambda **x: DecoupledROIHeads(**{**x, "box_loss_weight": 0.25}),
        HEAD,
        {f"stage{k}/loss_bbox" for k in range(3)} | {"grad/bbox_head.1.fc_reg.bias"},
    ),
    "stages weigh the same": (
        "DecoupledROIHeads",
        OtherWeights,
        HEAD,
        {"stage1/loss_bbox", "stage2/loss_bbox", "total"},
    ),
    "negatives move": ("DecoupledROIHeads", MovedNegatives, HEAD, {"stage0/refined/0"}),
    "not cut between stages": ("DecoupledROIHeads", Unclipped, HEAD, {"stage0/refined/1"}),
    "positives stay positives": ("DecoupledROIHeads", SameSample, HEAD, {"stage1/loss_bbox"}),
    "class 0 at test": ("DecoupledROIHeads", FirstClass, HEAD, {"test/boxes/0"}),
    "another suppression": (
        "HardNMS",
        lambda **_: HardNMS(test_nms_thresh=0.9),
        HEAD,
        {"test/det_boxes/0"},
    ),
    "cut above alone": ("BoxTransform", UpperClamp, HEAD, {"coder/decoded/0"}),
    "levels suppress each other": (
        "suppress_levels",
        lambda scores, levels, limit: sys.modules[
            "d2_decouple.modeling.decoupled_rpn"
        ].suppress_levels(scores, [torch.cat(list(levels))], limit),
        "decoupled_proposals",
        {"keep_a/full", "keep_b/full"},
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_other_ways_do_not_pass(
    golden: Any, cases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    name, instead, kind, noticed = WRONG[mistake]
    monkeypatch.setattr(sys.modules["golden_adapters.decoupled_rcnn"], name, instead)
    assert exceeded(golden, cases[kind]) >= noticed


def test_unknown_parameter_is_refused(golden: Any, cases: dict[str, Path], tmp_path: Path) -> None:
    for suffix in (".json", ".npz"):
        shutil.copy(cases[HEAD].with_suffix(suffix), tmp_path)
    path = tmp_path / cases[HEAD].name
    text = path.read_text(encoding="utf-8").replace("bbox_head.2.fc_reg", "bbox_head.3.fc_reg")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(golden.GoldenError, match=r"(?s)cannot be run.*box_branches\.2"):
        golden.verify(golden.load_case(path))
