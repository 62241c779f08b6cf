# SPDX-License-Identifier: Apache-2.0
"""PDNet's assignment: by hand, against plain loops, and what must not upset it."""

from typing import Any

import pytest
import torch
from pdnet_parts import STRIDES
from pdnet_scenes import (
    K,
    assign,
    coarse_of,
    instances,
    level_sizes,
    positives,
    predictions_of,
    start,
)

from d2_decouple.modeling import PDNetAssigner, coarse_targets
from d2_decouple.structures import foreground


def test_hand_worked_image() -> None:
    """128x160: an object of 64x64 in legacy counting, so on P4, with priors as coarse boxes.

    (50, 50, 113, 113) has its middle at 81.5: cell 81.5 / 16 = 5.09, so (5, 5) of P4, whose prior
    is (48, 48, 112, 112) and 65 wide. They share 63^2 = 3969 of 65^2 + 64^2 - 3969 = 4352, which
    is 0.91. The cells beside it have priors that are moved by 16: (64, 48, 128, 112) shares
    50 * 63 = 3150 of 5171, 0.609: positive; (32, 48, 96, 112) shares 47 * 63 = 2961 of 5360,
    0.55: not. Moved in both directions they share 50^2 of 5821, 0.43: not.
    """
    padded = (128, 160)
    truth = [instances((128, 160), [[50.0, 50.0, 113.0, 113.0]], [2])]
    targets = assign(padded, truth, side_offset=1.0)
    first, width = start(padded, 1), 10
    best = first + 5 * width + 5
    assert positives(targets) == {best: 0, best + 1: 0, best + width: 0}
    assert positives(coarse_targets(targets)) == {best: 0}
    for part, count in ((targets, 3), (coarse_targets(targets), 1)):
        where = foreground(part.labels[0], K)
        assert part.labels[0][where].tolist() == [2] * count
        assert part.labels[0][~where].unique().tolist() == [K]
        assert part.boxes[0][where].tolist() == [[50, 50, 113, 113]] * count
        assert part.boxes[0][~where].eq(0).all()
        assert torch.equal(part.box_weights[0], where.float())
        assert torch.equal(part.cls_weights, torch.ones(1, len(where), 1))
        assert part.cls_normalizer.item() == part.box_normalizer.item() == count
        assert part.quality is None
    # Counted as here, it is 63 wide and belongs to P3: cell 81.5 / 8 = 10.19.
    plain = assign(padded, truth)
    assert positives(coarse_targets(plain)) == {10 * 20 + 10: 0}
    assert best in positives(plain)


@pytest.mark.parametrize(
    ("side", "level"),
    [(1, 0), (63.75, 0), (64, 1), (127.75, 1), (128, 2), (256, 3), (511.75, 3), (512, 4), (900, 4)],
)
def test_level_of_an_object(side: float, level: int) -> None:
    """By the square root of its area; the lower end belongs to the level."""
    padded = (1024, 1024)
    for offset in (0.0, 1.0):
        length = side - offset
        low = 512 - length / 2
        box = [low, low, low + length, low + length]
        found = coarse_targets(assign(padded, [instances(padded, [box])], side_offset=offset))
        cell, width = 512 // STRIDES[level], level_sizes(padded)[level][1]
        assert positives(found) == {start(padded, level) + cell * width + cell: 0}
    flat = [512 - side, 512 - side / 4, 512 + side, 512 + side / 4]  # the same area
    found = coarse_targets(assign(padded, [instances(padded, [flat])]))
    assert min(positives(found)) >= start(padded, level)


def test_middle_between_cells_has_both() -> None:
    """(44, 40) is 5.5 cells of 8 to the right: columns 5 and 6. (44, 44): four cells."""
    padded, width = (96, 128), 16
    for middle, cells in (
        ((44.0, 40.0), [(5, 5), (6, 5)]),
        ((40.0, 44.0), [(5, 5), (5, 6)]),
        ((44.0, 44.0), [(5, 5), (6, 5), (5, 6), (6, 6)]),
        ((44.25, 43.75), [(6, 5)]),
    ):
        x, y = middle
        truth = [instances(padded, [[x - 5, y - 6, x + 5, y + 6]])]
        found = positives(coarse_targets(assign(padded, truth)))
        assert sorted(found) == sorted(row * width + column for column, row in cells)


def test_nearest_middle_in_shares_of_the_object_has_the_cell() -> None:
    """Cell (5, 5) at (40, 40). The first object's middle is 3 pixels away, of 60: a 20th. The
    second's is 2 pixels away, of 10: a 5th. So the first, although it is further.
    """
    padded = (96, 128)
    large, small = [13.0, 10.0, 73.0, 70.0], [37.0, 35.0, 47.0, 45.0]
    found = coarse_targets(assign(padded, [instances(padded, [small, large], [0, 3])]))
    assert positives(found) == {5 * 16 + 5: 1}
    assert found.labels[0, 5 * 16 + 5] == 3
    # Twice the same object: the first has it, and the other has no coarse positive.
    for boxes in ([large, large], [large, large, small]):
        found = coarse_targets(assign(padded, [instances(padded, boxes)]))
        assert positives(found) == {5 * 16 + 5: 0}


def test_middle_beyond_the_cells_has_none() -> None:
    """Cells of P3 end at 120 of 128 pixels: 124 is half a cell beyond, and 125 more than that.
    So are -4 and -5 before the first one.
    """
    padded, row = (96, 128), 5 * 16
    for x, found in ((124.0, {row + 15: 0}), (125.0, {}), (-4.0, {row: 0}), (-5.0, {})):
        truth = [instances(padded, [[x - 2, 38.0, x + 2, 42.0]])]
        assert positives(coarse_targets(assign(padded, truth))) == found


def test_threshold_is_reached_at_equality() -> None:
    """A box of 10x6 in an object of 10x10 overlaps it by 0.6 exactly; 10x5 does not suffice."""
    padded = (64, 64)
    truth = [instances(padded, [[10.0, 10.0, 20.0, 20.0]])]
    whole, six, five = ([10.0, 10.0, 20.0, 10.0 + side] for side in (10, 6, 5))
    coarse = coarse_of(padded, {3: whole, 7: six, 9: five})
    for dtype in (torch.float32, torch.float64):
        assert positives(assign(padded, truth, coarse, dtype)) == {3: 0, 7: 0}
        assert positives(assign(padded, truth, coarse, dtype, iou_threshold=0.5)) == {
            3: 0,
            7: 0,
            9: 0,
        }


def test_each_object_has_what_overlaps_it_most() -> None:
    """However little that is, on any level, several of them if they tie, and even if they overlap
    another object more.
    """
    padded = (64, 64)
    first, second = [0.0, 0.0, 20.0, 20.0], [20.0, 0.0, 40.0, 20.0]
    truth = [instances(padded, [first, second], [1, 2])]
    low = {5: [0.0, 0.0, 4.0, 4.0], 80: [16.0, 16.0, 20.0, 20.0]}  # 0.04 of the first, each
    found = assign(padded, truth, coarse_of(padded, low))
    assert positives(found) == {5: 0, 80: 0}  # the second has none: nothing overlaps it
    # Location 9 is nearly the first object, which has a better one; the second has nothing else.
    boxes = {8: first, 9: [0.0, 0.0, 20.5, 20.0]}
    found = assign(padded, truth, coarse_of(padded, boxes))
    assert positives(found) == {8: 0, 9: 1}
    assert found.labels[0, [8, 9]].tolist() == [1, 2]
    # The best of both: it goes to the one that it overlaps more.
    found = assign(padded, truth, coarse_of(padded, {9: [0.0, 0.0, 25.0, 20.0]}))
    assert positives(found) == {9: 0}
    found = assign(padded, truth, coarse_of(padded, {9: [15.0, 0.0, 40.0, 20.0]}))
    assert positives(found) == {9: 1}


def test_object_that_nothing_overlaps() -> None:
    """All overlaps are its maximum, zero: that must not make every cell positive."""
    padded = (64, 64)
    truth = [instances(padded, [[2.0, 2.0, 12.0, 12.0]], [3])]
    for offset in (0.0, 1.0):
        found = assign(padded, truth, coarse_of(padded, {}), side_offset=offset)
        assert positives(found) == {}
        assert found.labels.unique().tolist() == [K]
        assert found.cls_normalizer.item() == found.box_normalizer.item() == 1
        assert len(positives(coarse_targets(found))) == 1  # that does not ask for predictions
    both = [instances(padded, [[2.0, 2.0, 12.0, 12.0], [40.0, 40.0, 50.0, 50.0]], [3, 1])]
    found = assign(padded, both, coarse_of(padded, {17: [40.0, 40.0, 48.0, 50.0]}))
    assert positives(found) == {17: 1}


def test_twice_the_same_object() -> None:
    padded = (64, 64)
    box = [8.0, 8.0, 24.0, 24.0]
    one = positives(assign(padded, [instances(padded, [box])]))
    assert one
    assert positives(assign(padded, [instances(padded, [box, box])])) == one


def test_inverted_boxes_match_nothing() -> None:
    padded = (64, 64)
    box = [8.0, 8.0, 24.0, 24.0]
    truth = [instances(padded, [box])]
    turned = {1: [24.0, 8.0, 8.0, 24.0], 2: [8.0, 24.0, 24.0, 8.0], 3: [24.0, 24.0, 8.0, 8.0]}
    for offset in (0.0, 1.0):
        found = assign(padded, truth, coarse_of(padded, turned), side_offset=offset)
        assert positives(found) == {}
        everywhere = torch.tensor([24.0, 24.0, 8.0, 8.0]).expand(1, start(padded, 5), 4)
        assert positives(assign(padded, truth, everywhere, side_offset=offset)) == {}
    # Inverted by less than the legacy pixel: still nothing. Without any width: one pixel.
    slight, flat = [9.0, 8.0, 8.5, 24.0], [8.0, 8.0, 8.0, 24.0]
    for location, shape, found in ((1, slight, {}), (2, flat, {2: 0})):
        coarse = coarse_of(padded, {location: shape})
        assert positives(assign(padded, truth, coarse, side_offset=1.0)) == found
        assert positives(assign(padded, truth, coarse)) == {}


def test_images_without_objects() -> None:
    padded = (64, 64)
    box = [8.0, 8.0, 24.0, 24.0]
    empty = assign(padded, [instances(padded, [])] * 2)
    for part in (empty, coarse_targets(empty)):
        assert part.labels.unique().tolist() == [K]
        assert part.boxes.eq(0).all()
        assert part.box_weights.eq(0).all()
        assert part.extras["gt_index"].unique().tolist() == [-1]
        assert part.cls_normalizer.item() == part.box_normalizer.item() == 1
    alone = assign(padded, [instances(padded, [box], [1])])
    truth = [instances(padded, []), instances(padded, [box], [1]), instances(padded, [])]
    mixed = assign(padded, truth)
    for part, wanted in ((mixed, alone), (coarse_targets(mixed), coarse_targets(alone))):
        assert torch.equal(part.labels[1], wanted.labels[0])
        assert torch.equal(part.boxes[1], wanted.boxes[0])
        assert torch.equal(part.extras["gt_index"][1], wanted.extras["gt_index"][0])
        assert part.labels[[0, 2]].unique().tolist() == [K]
        assert part.cls_normalizer == wanted.cls_normalizer


def test_more_padding_changes_nothing() -> None:
    """The same image in a batch with larger ones: only cells in its own padding are ignored."""
    truth = instances((120, 150), [[10.0, 8.0, 75.0, 70.0], [60.0, 50.0, 110.0, 100.0]], [1, 2])
    small, large = (128, 160), (192, 256)
    alone, among = assign(small, [truth]), assign(large, [truth, instances((190, 250), [])])
    rows = []
    for level, (height, width) in enumerate(level_sizes(large)):
        shown = [-(-side // STRIDES[level]) for side in small]
        index = torch.arange(height * width).view(height, width) + start(large, level)
        rows.append(index[: shown[0], : shown[1]].flatten())
    inside = torch.cat(rows)
    for part, wanted in ((among, alone), (coarse_targets(among), coarse_targets(alone))):
        assert torch.equal(part.labels[0, inside], wanted.labels[0])
        assert torch.equal(part.boxes[0, inside], wanted.boxes[0])
        assert torch.equal(part.extras["gt_index"][0, inside], wanted.extras["gt_index"][0])
        outside = torch.ones(part.labels.shape[1], dtype=torch.bool)
        outside[inside] = False
        assert (part.labels[0, outside] == -1).all()
        assert (part.labels[1] == K).all()
        assert part.box_normalizer == wanted.box_normalizer
        assert part.box_weights[0, outside].eq(0).all()


def test_padding_is_measured_in_the_divisor() -> None:
    """33 pixels are 64 with a divisor of 32 and 40 with one of 8: 8 and 5 cells of P3."""
    for divisor, cells in ((32, 8), (8, 5), (1, 5)):
        found = assign((64, 64), [instances((33, 64), [])], size_divisor=divisor)
        p3 = found.labels[0, : 8 * 8].view(8, 8)
        assert (p3[:cells] == K).all()
        assert (p3[cells:] == -1).all()


def test_ignored_cell_may_hold_the_best_box() -> None:
    """It takes part first, as in the authors' code, so the object is left without one."""
    padded = (64, 64)
    truth = [instances((32, 64), [[8.0, 8.0, 24.0, 24.0]])]
    hidden, shown = 6 * 8 + 2, 2 * 8 + 2  # rows 6 and 2 of P3; 32 pixels are 4 rows
    box = [8.0, 8.0, 24.0, 24.0]
    half = [8.0, 8.0, 24.0, 16.0]
    found = assign(padded, truth, coarse_of(padded, {hidden: box, shown: half}))
    assert positives(found) == {}
    assert found.labels[0, hidden] == -1
    assert found.extras["gt_index"][0, hidden] == -1
    found = assign(padded, truth, coarse_of(padded, {hidden: half, shown: half}))
    assert positives(found) == {shown: 0}


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no threshold": ({"iou_threshold": 0.0}, ["iou_threshold", "0.0", "0.6"]),
    "threshold above one": ({"iou_threshold": 1.5}, ["iou_threshold", "1.5", "at most 1"]),
    "threshold not a number": ({"iou_threshold": float("nan")}, ["iou_threshold", "nan"]),
    "no divisor": ({"size_divisor": 0}, ["size_divisor", "0", "pixels"]),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str) -> None:
    settings, named = BAD[case]
    with pytest.raises(ValueError, match="wanted") as raised:
        PDNetAssigner(num_classes=K, **settings)
    assert all(part in str(raised.value) for part in named), raised.value


def test_refuses_features_of_other_sizes() -> None:
    predictions = predictions_of((64, 64))
    features = [torch.zeros(1, 0, *size) for size in level_sizes((64, 96))]
    with pytest.raises(ValueError, match="do not fit") as raised:
        PDNetAssigner(num_classes=K)(features, predictions, [instances((64, 64), [])])
    assert "(8, 12)" in str(raised.value)
