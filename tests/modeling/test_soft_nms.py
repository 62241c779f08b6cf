# SPDX-License-Identifier: Apache-2.0
"""Soft-NMS: scores that sink with overlaps, one pick after the other."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from torch import Tensor
from util import excite, random_input, tiny

from d2_decouple.config import get_config
from d2_decouple.modeling import GaussianDecay, HardNMS, LinearDecay, SoftNMS

LINEAR = LinearDecay(test_nms_thresh=0.3)
GAUSSIAN = GaussianDecay(sigma=0.5)


def candidates_of(boxes: Any, scores: Any, classes: Any) -> Instances:
    return Instances(
        (100, 100),
        pred_boxes=Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        scores=torch.as_tensor(scores, dtype=torch.float32),
        pred_classes=torch.as_tensor(classes, dtype=torch.int64),
        location_index=torch.arange(len(scores)),
    )


def random_candidates(count: int, classes: int, seed: int = 0) -> Instances:
    """Crowded boxes, some of which leave the image on every side."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * 80 - 20
    reach = torch.rand(count, 2, generator=generator) * 60
    return candidates_of(
        torch.cat((low, low + reach), dim=1),
        torch.rand(count, generator=generator),
        torch.randint(classes, (count,), generator=generator),
    )


# Overlap 0.5 of the first with the second, 0.25 with the third, 0.5 of the second with the third.
NESTED = [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 5.0], [0.0, 0.0, 5.0, 5.0]]


@pytest.mark.parametrize(
    ("thresh", "want"),
    [
        (0.5, [(0, 0.9), (2, 0.6), (1, 0.8 * 0.5 * 0.5)]),  # an overlap equal to it counts
        (0.6, [(0, 0.9), (1, 0.8), (2, 0.6)]),
        (0.2, [(0, 0.9), (2, 0.6 * 0.75), (1, 0.8 * 0.5 * 0.5)]),
    ],
)
def test_linear_by_hand(thresh: float, want: list[tuple[int, float]]) -> None:
    """The third overtakes the second once the first has halved it, and halves it again."""
    nms = SoftNMS(decay=LinearDecay(test_nms_thresh=thresh), test_score_thresh=0.05)
    result = nms(candidates_of(NESTED, [0.9, 0.8, 0.6], [0, 0, 0]))
    assert result.location_index.tolist() == [index for index, _ in want]
    assert result.scores.tolist() == pytest.approx([score for _, score in want])


def test_gaussian_by_hand() -> None:
    """exp(-0.25 / 0.5) = 0.607 for half an overlap, exp(-0.0625 / 0.5) = 0.882 for a quarter."""
    nms = SoftNMS(decay=GAUSSIAN, test_score_thresh=0.05)
    result = nms(candidates_of(NESTED, [0.9, 0.8, 0.6], [0, 0, 0]))
    assert result.location_index.tolist() == [0, 2, 1]
    third = 0.6 * math.exp(-0.125)
    assert result.scores.tolist() == pytest.approx([0.9, third, 0.8 * math.exp(-1.0)])
    assert torch.equal(result.pred_boxes.tensor, torch.tensor(NESTED)[[0, 2, 1]])


def test_classes_do_not_touch_each_other() -> None:
    nms = SoftNMS(decay=GAUSSIAN, test_score_thresh=0.05)
    result = nms(candidates_of(NESTED, [0.9, 0.8, 0.6], [2, 0, 1]))
    assert result.scores.tolist() == pytest.approx([0.9, 0.8, 0.6])
    assert result.pred_classes.tolist() == [2, 0, 1]


def test_what_sinks_to_the_threshold_is_dropped() -> None:
    """0.5 is exact: a candidate at the threshold goes, as in the choice of candidates."""
    boxes = [NESTED[0], NESTED[1], [50.0, 50.0, 60.0, 60.0]]
    nms = SoftNMS(decay=LINEAR, test_score_thresh=0.25)
    result = nms(candidates_of(boxes, [0.75, 0.5, 0.25], [0, 0, 1]))
    assert result.location_index.tolist() == [0]


def overlap(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return width * height / (sum(area) - width * height) if width * height > 0 else 0.0


def by_loops(
    candidates: Instances, decay: Callable[[float], float], thresh: float
) -> list[tuple[int, float]]:
    boxes, classes = candidates.pred_boxes.tensor.tolist(), candidates.pred_classes.tolist()
    left = dict(enumerate(candidates.scores.tolist()))
    taken = []
    while left := {index: score for index, score in left.items() if score > thresh}:
        best = max(left, key=lambda index: left[index])
        taken.append((best, left.pop(best)))
        for index in left:
            if classes[index] == classes[best]:
                left[index] *= decay(overlap(boxes[index], boxes[best]))
    return taken


LOOPS: list[tuple[Any, Callable[[float], float]]] = [
    (LINEAR, lambda x: 1 - x if x >= 0.3 else 1.0),
    (GAUSSIAN, lambda x: math.exp(-x * x / 0.5)),
]


@pytest.mark.parametrize(("decay", "plain"), LOOPS, ids=["linear", "gaussian"])
@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("limit", [None, 7, 1000])
def test_equals_loops(
    decay: Any, plain: Callable[[float], float], classes: int, limit: int | None
) -> None:
    candidates = random_candidates(150, classes, seed=classes)
    nms = SoftNMS(decay=decay, test_score_thresh=0.02, max_detections=limit)
    result = nms(candidates)
    want = by_loops(candidates, plain, 0.02)[:limit]
    assert 0 < len(want) < 150
    assert result.location_index.tolist() == [index for index, _ in want]
    assert result.scores.tolist() == pytest.approx([score for _, score in want], rel=1e-4)
    assert (result.scores.diff() <= 0).all()


@pytest.mark.parametrize("classes", [1, 5])
def test_a_decay_to_zero_is_hard_suppression(classes: int) -> None:
    candidates = random_candidates(300, classes)
    soft = SoftNMS(decay=lambda overlaps: (overlaps <= 0.4).float(), test_score_thresh=0.0)
    hard = HardNMS(test_nms_thresh=0.4)(candidates)
    assert len(hard) < 280
    assert soft(candidates).location_index.tolist() == hard.location_index.tolist()
    assert torch.equal(soft(candidates).scores, hard.scores)


def test_equal_scores_are_taken_in_order() -> None:
    candidates = random_candidates(64, 3)
    candidates.scores = torch.full((64,), 0.5)
    nms = SoftNMS(decay=LINEAR, test_score_thresh=0.01)
    first = nms(candidates)
    assert first.location_index[0] == 0
    assert first.location_index.tolist() == [i for i, _ in by_loops(candidates, LOOPS[0][1], 0.01)]
    assert torch.equal(first.location_index, nms(candidates).location_index)


@pytest.mark.parametrize("decay", [LINEAR, GAUSSIAN])
def test_boxes_without_area_neither_sink_nor_break(decay: Any) -> None:
    boxes = [[5.0, 5.0, 5.0, 5.0], [5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 10.0, 10.0]]
    result = SoftNMS(decay=decay, test_score_thresh=0.05)(candidates_of(boxes, [0.9] * 3, [0] * 3))
    assert result.scores.tolist() == pytest.approx([0.9] * 3)


def test_input_is_not_changed_and_nothing_is_normal() -> None:
    nms = SoftNMS(decay=GAUSSIAN, test_score_thresh=0.05)
    candidates = random_candidates(20, 2)
    before = candidates.scores.clone()
    nms(candidates)
    assert torch.equal(candidates.scores, before)
    for empty in (candidates[[]], candidates_of(NESTED, [0.01] * 3, [0] * 3)):
        result = nms(empty)
        assert len(result) == 0
        assert result.pred_boxes.tensor.shape == (0, 4)
        assert result.scores.shape == result.location_index.shape == (0,)


def test_a_name_is_no_decay() -> None:
    with pytest.raises(TypeError, match=r"decay must be callable, got 'linear'.*LinearDecay"):
        SoftNMS(decay="linear", test_score_thresh=0.1)  # type: ignore[arg-type]


def test_in_a_recipe() -> None:
    """One line in a config, and the detector's best boxes are those of hard suppression."""
    cfg = tiny(get_config("fcos_R_50_FPN_1x"))
    cfg.model.selection.nms = L(SoftNMS)(decay=L(GaussianDecay)(sigma=0.5), test_score_thresh=0.05)
    torch.manual_seed(0)
    model = excite(instantiate(cfg.model)).eval()
    with torch.no_grad():
        (result,) = model([random_input((64, 96), 0)])
    found: Tensor = result["instances"].scores
    assert len(found) > 10
    assert (found.diff() <= 0).all()
    assert (found > 0.05).all()
