# SPDX-License-Identifier: Apache-2.0
"""Regions of a batch: pooled as Detectron2 pools them, matched by hand, selected by hand."""

from typing import Any

import pytest
import torch
from decoupled_rcnn_parts import CHANNELS, STRIDES, pooler_of
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor
from util import make_instances

from d2_decouple.layers.boxes import enlarged
from d2_decouple.modeling import HardNMS, RegionSelection
from d2_decouple.modeling.regions import (
    Regions,
    draw_samples,
    match_regions,
    pool_both,
    pool_regions,
)

DOUBLE = torch.float64
SIZES = [(480, 640), (400, 500)]


def maps_of(strides: list[int] = STRIDES, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [
        torch.randn(2, CHANNELS, 480 // stride, 640 // stride, dtype=dtype).requires_grad_()
        for stride in strides
    ]


def boxes_of_every_level(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sides from 8 to 460 pixels; those of 112, 224 and 448 begin a level."""
    side = 8 * (460 / 8) ** torch.rand(count, 2, dtype=dtype)
    side[0] = 460
    corner = torch.rand(count, 2, dtype=dtype) * 100
    return torch.cat((corner, corner + side), dim=-1)


def regions_of(dtype: torch.dtype = torch.float32) -> Regions:
    return Regions.of([boxes_of_every_level(40, dtype), boxes_of_every_level(20, dtype)], SIZES)


def test_regions_know_their_images() -> None:
    """Also where an image in between has none."""
    boxes = [torch.rand(2, 4), torch.zeros(0, 4), torch.rand(1, 4)]
    regions = Regions.of(boxes, [(10, 20), (30, 40), (50, 60)])
    assert len(regions) == 3
    assert regions.image_index.tolist() == [0, 0, 2]
    assert regions.sizes.tolist() == [[10, 20], [10, 20], [50, 60]]
    last = regions.at(torch.tensor([2]))
    assert (last.image_index.tolist(), last.sizes.tolist()) == ([2], [[50, 60]])
    both = last.joined(regions)
    assert both.image_index.tolist() == [2, 0, 0, 2]
    assert torch.equal(both.boxes, torch.cat((boxes[2], boxes[0], boxes[2])))
    moved = regions.moved(torch.tensor([[-1.0, -1, 99, 99]] * 3))
    assert moved.boxes.tolist() == [[0, 0, 20, 10], [0, 0, 20, 10], [0, 0, 60, 50]]
    none = Regions.of([torch.zeros(0, 4)] * 2, SIZES)
    assert (len(none), none.sizes.shape) == (0, (0, 2))


def test_pools_as_detectron2() -> None:
    """Values and gradients, with regions on every level."""
    pooler, regions, maps = pooler_of(), regions_of(), maps_of()
    ours = pool_regions(pooler, maps, regions)
    theirs = pooler(maps, [Boxes(regions.boxes[:40]), Boxes(regions.boxes[40:])])
    assert torch.equal(ours, theirs)
    upstream = torch.randn_like(ours)
    gradients = torch.autograd.grad(ours, maps, upstream)
    assert all(x.abs().sum() > 0 for x in gradients)  # every level is in use
    for got, want in zip(gradients, torch.autograd.grad(theirs, maps, upstream), strict=True):
        torch.testing.assert_close(got, want)


def test_a_level_begins_where_detectron2s_begins() -> None:
    """Sides next to 112, 224 and 448 pixels: the last float32 below them belongs to the upper
    level there, by rounding.
    """
    ends = torch.tensor([112.0, 224.0, 448.0])
    sides = torch.cat((ends.nextafter(torch.zeros(3)), ends, ends.nextafter(2 * ends)))
    boxes = torch.stack((torch.zeros(9), torch.zeros(9), sides, sides), dim=-1)
    pooler, maps = pooler_of(), maps_of()
    theirs = pooler([x[:1] for x in maps], [Boxes(boxes)])
    assert torch.equal(pool_regions(pooler, maps, Regions.of([boxes], [(480, 640)])), theirs)


def test_enlarged_regions_keep_the_level_of_their_boxes() -> None:
    """100 pixels belong to the finest level, and 130, 1.3 times as many, to the next one."""
    box = torch.tensor([[150.0, 150, 250, 250]])
    larger = torch.tensor([[135.0, 135, 265, 265]])
    pooler, maps = pooler_of(), maps_of()
    found = pool_regions(pooler, maps, Regions.of([box], SIZES[:1]), 1.3)
    image = [x[:1] for x in maps]
    rois = torch.cat((torch.zeros(1, 1), larger), dim=1)
    finest, next_one = (pooler.level_poolers[level](image[level], rois) for level in (0, 1))
    torch.testing.assert_close(found, finest)
    torch.testing.assert_close(pooler(image, [Boxes(enlarged(box, 1.3))]), next_one)
    assert (found - next_one).abs().max() > 0.1
    same = pool_regions(pooler, maps, Regions.of([box], SIZES[:1]), 1.0)
    torch.testing.assert_close(same, pooler(image, [Boxes(box)]))


def test_no_regions() -> None:
    """The maps get a gradient all the same, which is zero."""
    maps = maps_of()
    pooled = pool_regions(pooler_of(), maps, Regions.of([torch.zeros(0, 4)] * 2, SIZES))
    assert pooled.shape == (0, CHANNELS, 7, 7)
    gradients = torch.autograd.grad(pooled.sum(), maps)
    assert all(x.eq(0).all() for x in gradients)


def test_one_level() -> None:
    regions, maps, pooler = regions_of(), maps_of([16]), pooler_of([16], output_size=3)
    theirs = pooler(maps, [Boxes(regions.boxes[:40]), Boxes(regions.boxes[40:])])
    assert torch.equal(pool_regions(pooler, maps, regions), theirs)


def test_coordinates_of_float64_count() -> None:
    """Detectron2's boxes are float32; here half of a 32-bit digit at 100 pixels is seen."""
    pooler, maps = pooler_of(), maps_of(dtype=DOUBLE)
    box = torch.tensor([[100.0, 100, 180, 180]], dtype=DOUBLE)
    moved = box + 2.0**-19
    assert torch.equal(box.float(), moved.float())
    pooled = [pool_regions(pooler, maps, Regions.of([x], SIZES[:1])) for x in (box, moved)]
    assert pooled[0].dtype == DOUBLE
    assert 0 < (pooled[0] - pooled[1]).abs().max() < 1e-4


def test_matched_by_hand() -> None:
    """Image 0: 10x10 objects of classes 2 and 1. A box of 10x5 in the first overlaps it by 0.5
    exactly and matches; moved by 4 pixels one shares 60 of 140 pixels: it does not. Image 1 has
    no objects, image 2 has one.
    """
    first, second, third = [0.0, 0, 10, 10], [50.0, 0, 60, 10], [0.0, 0, 4, 4]
    targets = [
        make_instances((20, 80), [first, second], [2, 1]),
        make_instances((20, 80), [], []),
        make_instances((20, 80), [third], [0]),
    ]
    boxes = [
        torch.tensor([[0.0, 0, 10, 5], [4.0, 0, 14, 10], second]),
        torch.tensor([first]),
        torch.tensor([[0.0, 0, 0, 4], third]),
    ]
    regions = Regions.of(boxes, [(20, 80)] * 3)
    found = match_regions(regions, targets, Matcher([0.5], [0, 1]), 3)
    assert found.regions is regions
    assert found.gt_classes.tolist() == [2, 3, 1, 3, 3, 0]
    matched = found.gt_classes < 3
    assert found.gt_boxes[matched].tolist() == [first, second, third]
    assert found.gt_index[matched].tolist() == [0, 1, 0]
    assert found.gt_boxes.isfinite().all()
    nothing = match_regions(
        Regions.of([torch.zeros(0, 4)] * 3, [(20, 80)] * 3), targets, Matcher([0.5], [0, 1]), 3
    )
    assert (len(nothing), nothing.gt_boxes.shape) == (0, (0, 4))


def test_ignored_overlaps_are_no_match() -> None:
    """A matcher may have a third label between: nothing is learned from such a region."""
    targets = [make_instances((20, 20), [[0.0, 0, 10, 10]], [1])]
    boxes = torch.tensor([[0.0, 0, 10, 8], [0.0, 0, 10, 5], [0.0, 0, 10, 2]])
    matcher = Matcher([0.4, 0.7], [0, -1, 1])
    found = match_regions(Regions.of([boxes], [(20, 20)]), targets, matcher, 3)
    assert found.gt_classes.tolist() == [1, 3, 3]


def test_positives_are_drawn_first_then_others() -> None:
    """Image 0 has 3 positives among 8 regions, image 1 none among 2, image 2 has 6 of 6."""
    counts, positives = (8, 2, 6), (3, 0, 6)
    truth = [0.0, 0, 10, 10]
    boxes, targets = [], []
    for image, (count, positive) in enumerate(zip(counts, positives, strict=True)):
        rows = torch.tensor([[50.0, 50, 60, 60]]).repeat(count, 1)
        rows[torch.randperm(count)[:positive]] = torch.tensor(truth)
        rows[:, 2] += (10 * image + torch.arange(count)) / 100  # each box has its own width
        boxes.append(rows)
        targets.append(make_instances((80, 80), [truth], [1]))
    regions = Regions.of(boxes, [(80, 80)] * 3)
    samples = match_regions(regions, targets, Matcher([0.5], [0, 1]), 3)
    everything = draw_samples(samples, 3, 99, 3)
    assert (everything.gt_classes == 1).tolist() == [True] * 3 + [False] * 7 + [True] * 6
    seen = set()
    for _ in range(40):
        drawn = draw_samples(samples, 3, 5, 3)
        assert drawn.regions.image_index.tolist() == [0] * 5 + [1] * 2 + [2] * 5
        assert (drawn.gt_classes == 1).tolist() == [True] * 3 + [False] * 4 + [True] * 5
        assert torch.equal(drawn.gt_boxes[:3], torch.tensor([truth] * 3))
        rows = [tuple(x) for x in drawn.regions.boxes.tolist()]
        assert len(set(rows)) == 12  # none twice
        seen |= set(rows)
    assert len(seen) == 16  # each has a chance


# Selection.


def nothing_suppressed(candidates: Any) -> Any:
    return candidates


def selection_of(**changes: Any) -> RegionSelection:
    settings = {"test_score_thresh": 0.25, "nms": nothing_suppressed, **changes}
    return RegionSelection(**settings)


SCORES = torch.tensor([[0.5, 0.3], [0.25, 0.2], [0.1, 0.9]])  # 0.25 is the threshold: too low
IMAGES = [(20, 30), (25, 35)]


def two_images() -> Regions:
    return Regions.of([torch.rand(2, 4), torch.rand(1, 4)], IMAGES)


def test_pairs_above_the_threshold_are_candidates() -> None:
    boxes = torch.arange(12.0).view(3, 4)
    place = torch.tensor([7, 8, 9])
    first, second = selection_of().propose(two_images(), boxes, SCORES, IMAGES, place=place)
    assert (first.image_size, second.image_size) == ((20, 30), (25, 35))
    assert first.pred_boxes.tensor.tolist() == [[0, 1, 2, 3]] * 2
    assert first.pred_classes.tolist() == [0, 1]
    torch.testing.assert_close(first.scores, torch.tensor([0.5, 0.3]))
    assert first.place.tolist() == [7, 7]
    assert second.pred_boxes.tensor.tolist() == [[8, 9, 10, 11]]
    assert (second.pred_classes.tolist(), second.place.tolist()) == ([1], [9])


def test_each_class_may_have_its_own_box() -> None:
    boxes = torch.arange(24.0).view(3, 2, 4)
    first, second = selection_of().propose(two_images(), boxes, SCORES, IMAGES)
    assert first.pred_boxes.tensor.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert second.pred_boxes.tensor.tolist() == [[20, 21, 22, 23]]


def test_which_regions_are_worth_refining() -> None:
    assert selection_of().worth_refining(SCORES).tolist() == [0, 2]
    assert selection_of(prune=False).worth_refining(SCORES).tolist() == [0, 1, 2]
    assert selection_of().worth_refining(SCORES[:0]).tolist() == []


def test_the_best_are_kept_after_suppression() -> None:
    """Of equal boxes one survives per class; then the limit counts."""
    boxes = torch.tensor([[0.0, 0, 9, 9]] * 3)
    regions = Regions.of([boxes], IMAGES[:1])
    for limit, scores in ((100, [0.9, 0.5]), (1, [0.9])):
        selection = selection_of(nms=HardNMS(test_nms_thresh=0.5), max_detections_per_image=limit)
        (candidates,) = selection.propose(regions, boxes, SCORES, IMAGES[:1])
        assert selection.suppress(candidates).scores.tolist() == pytest.approx(scores)


def test_suppression_must_be_callable() -> None:
    with pytest.raises(TypeError, match=r"selection\.nms must be callable.*HardNMS.*got 0\.5"):
        RegionSelection(test_score_thresh=0.1, nms=0.5)  # type: ignore[arg-type]


def test_two_sets_are_pooled_as_each_by_itself_and_equal_regions_once(monkeypatch):
    """Values and gradients; four of the second set's eight regions are in the first."""
    torch.manual_seed(2)
    maps = [torch.randn(2, 3, 32 // n, 40 // n, dtype=torch.float64) for n in (1, 2)]
    corners = torch.rand(9, 2, 2, dtype=torch.float64) * 100
    boxes = torch.cat((corners.amin(1), corners.amax(1) + 4), dim=1)
    sizes = [(128, 160), (128, 160)]
    first = Regions.of([boxes[:4], boxes[4:6]], sizes)
    # Of the second image those that the first image has count as others.
    second = Regions.of([boxes[[6, 1]], boxes[[5, 0, 5, 7, 8, 4]]], sizes)
    pooler = ROIPooler(7, [1 / 4, 1 / 8], 0, "ROIAlignV2", canonical_box_size=64, canonical_level=2)
    counts = []

    def counted(pooler, maps, regions, scale=1.0):
        counts.append(len(regions))
        return pool_regions(pooler, maps, regions, scale)

    def gradients(pooled):
        leaves = [x.clone().requires_grad_() for x in maps]
        mine, others = pooled(leaves)
        weights = torch.linspace(-1, 1, mine.numel(), dtype=torch.float64).view_as(mine)
        total = (mine * weights).sum() + (others.square() * torch.arange(8).view(-1, 1, 1, 1)).sum()
        return mine, others, torch.autograd.grad(total, leaves)

    apart = gradients(lambda x: [pool_regions(pooler, x, part) for part in (first, second)])
    monkeypatch.setattr("d2_decouple.modeling.regions.pool_regions", counted)
    together = gradients(lambda x: pool_both(pooler, x, first, second))
    torch.testing.assert_close(together, apart)
    assert counts == [6 + 4]  # boxes 6, 0, 7 and 8 are new


@pytest.mark.parametrize("counts", [(0, 0), (0, 2), (2, 0)])
def test_two_sets_of_which_one_is_empty(counts):
    boxes = [torch.tensor([[0.0, 0, 8, 8], [4, 4, 20, 12]])[:n] for n in counts]
    sets = [Regions.of([x], [(32, 32)]) for x in boxes]
    pooler = ROIPooler(7, [1 / 4], 0, "ROIAlignV2")
    mine, others = pool_both(pooler, [torch.randn(1, 3, 8, 8)], *sets)
    assert mine.shape == (counts[0], 3, 7, 7)
    assert others.shape == (counts[1], 3, 7, 7)
