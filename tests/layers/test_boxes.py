# SPDX-License-Identifier: Apache-2.0
"""Boxes as changes of boxes, against Detectron2's; cut, enlarged, and compared."""

import math
from typing import Any

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor

from d2_decouple.layers.boxes import BoxTransform, clip_to_sizes, enlarged, overlaps

DOUBLE = torch.float64
WEIGHTS = [[1, 1, 1, 1], [10, 10, 5, 5], [1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067]]


def random_boxes(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    corner = 200 * torch.rand(count, 2, dtype=dtype)
    return torch.cat((corner, corner + 1 + 100 * torch.rand(count, 2, dtype=dtype)), dim=-1)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("changes", [1, 3])
def test_equals_detectron2s_within_the_clamp(weights: list[float], changes: int) -> None:
    """dw and dh stay below log(62.5) = 4.14 times their weight, where it makes no difference."""
    ours, theirs = BoxTransform(weights=weights), Box2BoxTransform(tuple(map(float, weights)))
    boxes, others = random_boxes(50), random_boxes(50)
    deltas = torch.randn(50, changes, 4) * torch.tensor(weights)
    found = ours.apply_deltas(deltas.flatten(1), boxes)
    assert found.shape == (50, 4 * changes)
    torch.testing.assert_close(found, theirs.apply_deltas(deltas.flatten(1), boxes))
    torch.testing.assert_close(ours.get_deltas(boxes, others), theirs.get_deltas(boxes, others))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_changes_lead_from_one_box_to_another(weights: list[float]) -> None:
    """In float64 to nine digits: nothing falls back to float32 in between."""
    transform = BoxTransform(weights=weights)
    boxes, others = random_boxes(50, DOUBLE), random_boxes(50, DOUBLE)
    deltas = transform.get_deltas(boxes, others)
    assert deltas.dtype == DOUBLE
    torch.testing.assert_close(transform.apply_deltas(deltas, boxes), others, rtol=0, atol=1e-9)


def test_hand_worked_change() -> None:
    """20x10 around (20, 15) -> 40x5 around (25, 14): dx = 5 / 20, dy = -1 / 10, log 2, log 1/2."""
    box, other = torch.tensor([[10.0, 10, 30, 20]]), torch.tensor([[5.0, 11.5, 45, 16.5]])
    deltas = BoxTransform(weights=[10, 10, 5, 5]).get_deltas(box, other)
    wanted = [2.5, -1.0, 5 * math.log(2), -5 * math.log(2)]
    torch.testing.assert_close(deltas, torch.tensor([wanted]))


def test_a_side_shrinks_as_little_as_it_grows() -> None:
    """16 pixels become 1000 at most and 16 * 16 / 1000 = 0.256 at least; Detectron2's 0."""
    box = torch.tensor([[100.0, 100, 116, 116]])
    for weights in WEIGHTS:
        transform = BoxTransform(weights=weights)
        for change, side in ((1000.0, 1000.0), (-1000.0, 0.256)):
            x1, y1, x2, y2 = transform.apply_deltas(torch.tensor([[0, 0, change, change]]), box)[0]
            assert (x2 - x1).item() == pytest.approx(side, rel=1e-3)
            assert (y2 - y1).item() == pytest.approx(side, rel=1e-3)
            assert (x2 + x1).item() == pytest.approx(216, abs=1e-3)
    twice = BoxTransform(scale_clamp=math.log(2))
    moved = twice.apply_deltas(torch.tensor([[0.0, 0, 5, -5]]), box)
    torch.testing.assert_close(moved, torch.tensor([[92.0, 104, 124, 112]]))


def test_half_precision_is_computed_in_float32() -> None:
    """Coordinates of 2000 pixels are 8 apart in bfloat16."""
    box = torch.tensor([[2001.25, 1000.5, 2011.75, 1011.0]])
    for dtype in (torch.bfloat16, torch.float16):
        moved = BoxTransform().apply_deltas(torch.zeros(1, 4, dtype=dtype), box)
        assert moved.dtype == torch.float32
        torch.testing.assert_close(moved, box)
    assert BoxTransform().apply_deltas(torch.zeros(1, 4), box.double()).dtype == torch.float32
    assert BoxTransform().apply_deltas(torch.zeros(1, 4, dtype=DOUBLE), box).dtype == DOUBLE


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "three weights": ({"weights": [1, 1, 1]}, ["weights", "[1, 1, 1]", "four", "[10, 10, 5, 5]"]),
    "a weight of zero": ({"weights": [1, 1, 0, 1]}, ["weights", "[1, 1, 0, 1]"]),
    "a negative weight": ({"weights": [1, -1, 1, 1]}, ["weights", "-1"]),
    "an infinite weight": ({"weights": [math.inf, 1, 1, 1]}, ["weights", "inf"]),
    "a weight that is no number": ({"weights": [1, 1, 1, math.nan]}, ["weights", "nan"]),
    "no clamp": ({"scale_clamp": 0.0}, ["scale_clamp", "0.0", "4.135"]),
    "an infinite clamp": ({"scale_clamp": math.inf}, ["scale_clamp", "inf", "4.135"]),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str) -> None:
    settings, named = BAD[case]
    with pytest.raises(ValueError, match="wanted") as raised:
        BoxTransform(**settings)
    assert all(part in str(raised.value) for part in named), raised.value


def test_boxes_without_area_are_refused() -> None:
    """Whether flat, inverted or not a number; two of them are in a list of five."""
    fine = [[0.0, 0, 5, 5]] * 3
    for flat in ([4.0, 0, 4, 9], [9.0, 0, 4, 9], [0.0, 7, 4, 7], [0.0, 0, math.nan, 9]):
        boxes = torch.tensor([*fine, flat, flat])
        with pytest.raises(ValueError, match=r"^2 of 5 boxes.*leave them out"):
            BoxTransform().get_deltas(boxes, torch.ones(5, 4))
    # As a target one is let through: the RPN hands zeros for images without objects.
    deltas = BoxTransform().get_deltas(torch.tensor(fine), torch.zeros(3, 4))
    assert deltas[:, :2].isfinite().all()


def test_no_boxes() -> None:
    transform, none = BoxTransform(), torch.zeros(0, 4)
    assert transform.get_deltas(none, none).shape == (0, 4)
    assert transform.apply_deltas(torch.zeros(0, 12), none).shape == (0, 12)
    assert clip_to_sizes(none, torch.zeros(0, 2)).shape == (0, 4)
    assert clip_to_sizes(torch.zeros(0, 3, 4), torch.zeros(0, 2)).shape == (0, 3, 4)
    assert enlarged(none, 1.3).shape == (0, 4)
    assert overlaps(none, random_boxes(3)).shape == (0, 3)
    assert overlaps(random_boxes(3), none).shape == (3, 0)


def test_each_box_is_cut_to_its_own_image() -> None:
    """Sizes are (height, width): the first image is 20 wide, the second 100."""
    boxes = torch.tensor([[-5.0, -5, 200, 200], [90.0, 5, 120, 8]])
    sizes = torch.tensor([[50, 20], [10, 100]])
    cut = [[0.0, 0, 20, 50], [90.0, 5, 100, 8]]
    assert clip_to_sizes(boxes, sizes).tolist() == cut
    several = torch.stack((boxes, boxes + 1), dim=1)  # two boxes of each region
    found = clip_to_sizes(several, sizes)
    assert found[:, 0].tolist() == cut
    assert found[:, 1].tolist() == [[0, 0, 20, 50], [91, 6, 100, 9]]
    beside = clip_to_sizes(torch.tensor([[30.0, -9, 40, -4]]), sizes[:1])
    assert beside.tolist() == [[20, 0, 20, 0]]  # without area, on the border


def test_enlarged_around_the_middle() -> None:
    """10x20 around (15, 30): 13x26 around the same; it may leave the image."""
    box = torch.tensor([[10.0, 20, 20, 40]])
    torch.testing.assert_close(enlarged(box, 1.3), torch.tensor([[8.5, 17, 21.5, 43]]))
    torch.testing.assert_close(enlarged(box, 3.0), torch.tensor([[0.0, 0, 30, 60]]))


def test_overlaps() -> None:
    """2x2 and 2x2, moved by 1: 2 of 6. Boxes without area overlap nothing, not even each other."""
    gt_boxes = torch.tensor([[0.0, 0, 2, 2], [5.0, 5, 5, 5]])
    boxes = torch.tensor([[1.0, 0, 3, 2], [5.0, 5, 5, 5], [0.0, 0, 2, 2]])
    wanted = torch.tensor([[1 / 3, 0, 1], [0, 0, 0]])
    torch.testing.assert_close(overlaps(gt_boxes, boxes), wanted)
    gt_boxes, boxes = random_boxes(20), random_boxes(30)
    theirs = pairwise_iou(Boxes(gt_boxes), Boxes(boxes))
    assert (theirs > 0.3).any()
    torch.testing.assert_close(overlaps(gt_boxes, boxes), theirs)
    assert overlaps(gt_boxes.double(), boxes).dtype == DOUBLE
