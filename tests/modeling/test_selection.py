# SPDX-License-Identifier: Apache-2.0
"""From predictions to detections: scores, candidates, clipping, suppression, limits."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from d2_decouple.layers.points import make_grid, squares
from d2_decouple.modeling import (
    BestLocations,
    BestPairs,
    HardNMS,
    Selection,
    class_score,
    clip_to_image,
    geometric_mean_score,
    product_score,
)
from d2_decouple.structures import DensePredictions

Found = list[tuple[float, int, int]]  # score, location, class


def rows(candidates: tuple[Tensor, Tensor, Tensor]) -> Found:
    scores, locations, classes = candidates
    assert len(scores) == len(locations) == len(classes)
    values = [round(x, 4) for x in scores.tolist()]
    return list(zip(values, locations.tolist(), classes.tolist(), strict=True))


# Two levels, of three locations and of two; two classes.
SCORES = torch.tensor([[0.9, 0.8], [0.7, 0.1], [0.55, 0.5], [0.5, 0.4], [0.3, 0.95]])
LEVELS = (3, 2)


def test_best_pairs_by_hand() -> None:
    """Level 0 has the pairs .9 .8 .7 .55 .5 .1, of which two stay; level 1 keeps .95 and .5."""
    found = rows(BestPairs(test_score_thresh=0.05, test_topk_candidates=2)(SCORES, LEVELS))
    assert found == [(0.9, 0, 0), (0.8, 0, 1), (0.95, 4, 1), (0.5, 3, 0)]


def test_best_locations_by_hand() -> None:
    """Two locations of each level by their best class, then all of their classes over .15.

    Location 1 comes in by its .7, the third among the pairs, although location 2 has the larger
    sum; its .1 does not.
    """
    chooser = BestLocations(test_score_thresh=0.15, test_topk_candidates=2)
    assert sorted(rows(chooser(SCORES, LEVELS)), reverse=True) == [
        (0.95, 4, 1),
        (0.9, 0, 0),
        (0.8, 0, 1),
        (0.7, 1, 0),
        (0.5, 3, 0),
        (0.4, 3, 1),
        (0.3, 4, 0),
    ]


def test_pairs_and_locations_agree_without_a_limit() -> None:
    scores = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    limits = {"test_score_thresh": 0.3, "test_topk_candidates": 1000}
    pairs = rows(BestPairs(**limits)(scores, (30, 15, 5)))  # type: ignore[arg-type]
    locations = rows(BestLocations(**limits)(scores, (30, 15, 5)))  # type: ignore[arg-type]
    assert sorted(pairs) == sorted(locations)
    want = (scores > 0.3).nonzero().tolist()
    assert sorted([location, label] for _, location, label in pairs) == want
    for score, location, label in pairs:
        assert scores[location, label].item() == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("chooser", [BestPairs, BestLocations])
def test_threshold_is_strict(chooser: Any) -> None:
    scores = torch.tensor([[0.25, 0.5], [0.5, 0.75]])  # exact in binary
    keep = chooser(test_score_thresh=0.5, test_topk_candidates=10)
    assert rows(keep(scores, (2,))) == [(0.75, 1, 1)]


@pytest.mark.parametrize("chooser", [BestPairs, BestLocations])
def test_limit_is_per_level(chooser: Any) -> None:
    scores = torch.tensor([[0.9], [0.8], [0.7], [0.1], [0.2], [0.3]])
    found = rows(chooser(test_score_thresh=0.0, test_topk_candidates=1)(scores, (3, 2, 1)))
    assert found == [(0.9, 0, 0), (0.2, 4, 0), (0.3, 5, 0)]


@pytest.mark.parametrize("chooser", [BestPairs, BestLocations])
def test_no_candidates(chooser: Any) -> None:
    keep = chooser(test_score_thresh=0.99, test_topk_candidates=10)
    scores, locations, classes = keep(SCORES, LEVELS)
    assert scores.shape == locations.shape == classes.shape == (0,)
    assert locations.dtype == classes.dtype == torch.int64


def predictions_of(
    boxes: list[list[float]], logits: Tensor, quality: Tensor | None = None
) -> DensePredictions:
    """Predictions of one image with the given boxes, all on one level."""
    count = len(boxes)
    grid = make_grid([(1, count)], [8], 0.5, device=torch.device("cpu"), dtype=torch.float32)
    return DensePredictions(
        logits=logits.reshape(1, count, -1),
        boxes=torch.tensor(boxes).reshape(1, count, 4),
        quality=None if quality is None else quality.reshape(1, count),
        locations=grid.locations,
        strides=grid.strides,
        priors=squares(grid.locations, grid.strides),
        level_sizes=grid.level_sizes,
        extras={},
    )


def test_scores_by_hand() -> None:
    """Class probability 0.8, quality 0.45: product 0.36, its root 0.6."""
    logits = torch.logit(torch.tensor([[0.8, 0.2]], dtype=torch.float64))
    quality = torch.logit(torch.tensor([0.45], dtype=torch.float64))
    predictions = predictions_of([[0, 0, 1, 1]], logits, quality)
    assert class_score(predictions).flatten().tolist() == pytest.approx([0.8, 0.2])
    assert product_score(predictions).flatten().tolist() == pytest.approx([0.36, 0.09])
    assert geometric_mean_score(predictions).flatten().tolist() == pytest.approx([0.6, 0.3])


@pytest.mark.parametrize("score", [product_score, geometric_mean_score])
def test_score_without_a_quality_branch(score: Any) -> None:
    predictions = predictions_of([[0, 0, 1, 1]], torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"no quality branch.*selection\.score=class_score"):
        score(predictions)


def test_clip_to_image() -> None:
    boxes = torch.tensor([[-5.0, -6.0, 50.0, 70.0], [1.0, 2.0, 3.0, 4.0], [-9.0, 70.0, -1.0, 80.0]])
    want = [[0, 0, 40, 60], [1, 2, 3, 4], [0, 60, 0, 60]]  # height 60, width 40
    assert clip_to_image(boxes, (60, 40)).tolist() == want
    assert clip_to_image(torch.zeros(0, 4), (60, 40)).shape == (0, 4)


def candidates_of(boxes: list[list[float]], scores: list[float], classes: list[int]) -> Instances:
    return Instances(
        (100, 100),
        pred_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)),
        scores=torch.tensor(scores),
        pred_classes=torch.tensor(classes, dtype=torch.int64),
        location_index=torch.arange(len(boxes)),
    )


def test_nms_is_per_class_and_strict() -> None:
    """A has overlap 0.5 with B and 0.25 with C, of one class; D equals A but is another class."""
    boxes = [
        [0.0, 0.0, 10.0, 10.0],
        [0.0, 0.0, 10.0, 5.0],
        [0.0, 0.0, 5.0, 5.0],
        [0.0, 0.0, 10.0, 10.0],
    ]
    candidates = candidates_of(boxes, [0.6, 0.9, 0.5, 0.7], [1, 1, 1, 0])

    def survivors(thresh: float) -> list[int]:
        return HardNMS(test_nms_thresh=thresh)(candidates).location_index.tolist()

    assert survivors(0.6) == [1, 3, 0, 2]
    assert survivors(0.5) == [1, 3, 0, 2]  # an overlap equal to the threshold stays
    assert survivors(0.45) == [1, 3]  # B drops A (0.5) and C (0.5)


def test_nms_does_not_mix_classes_of_boxes_outside_the_image() -> None:
    """One box in the image, one of another class left of and above it. They lie 1 pixel apart."""
    boxes = [[0.0, 0.0, 100.0, 100.0], [-101.0, -101.0, -1.0, -1.0]]
    candidates = candidates_of(boxes, [0.6, 0.9], [0, 1])
    assert HardNMS(test_nms_thresh=0.6)(candidates).location_index.tolist() == [1, 0]


def test_nms_is_as_exact_for_the_last_class_as_for_the_first() -> None:
    """[0, 3] and [d, 3 + d] overlap by (3 - d) / (3 + d): 0.6 at d = 3 / 4, less a little beyond.

    Far to the right, and shifted once more for class 79, float32 has steps of a hundredth.
    """
    for label in (0, 79):
        for shift, kept in ((0.7495, 1), (0.7505, 2)):
            boxes = [[1340.0, 0, 1343.0, 3], [1340.0 + shift, 0, 1343.0 + shift, 3]]
            candidates = candidates_of(boxes, [0.9, 0.8], [label, label])
            assert len(HardNMS(test_nms_thresh=0.6)(candidates)) == kept


@pytest.mark.parametrize(("side_offset", "kept"), [(0.0, 2), (1.0, 1)])
def test_nms_of_boxes_whose_ends_are_their_last_pixels(side_offset: float, kept: int) -> None:
    """[0, 3] and [1, 4] share 2 of 4 as lengths, but 3 of 5 as pixels."""
    candidates = candidates_of([[0, 0, 3, 3], [1, 0, 4, 3]], [0.9, 0.8], [0, 0])
    found = HardNMS(test_nms_thresh=0.55, side_offset=side_offset)(candidates)
    assert len(found) == kept
    assert found.pred_boxes.tensor[0].tolist() == [0, 0, 3, 3]  # as it was given


def make_selection(**changes: Any) -> Selection:
    arguments: dict[str, Any] = {
        "score": class_score,
        "candidates": BestPairs(test_score_thresh=0.05, test_topk_candidates=1000),
        "nms": HardNMS(test_nms_thresh=0.6),
    }
    return Selection(**{**arguments, **changes})


def random_predictions(images: int = 2) -> DensePredictions:
    generator = torch.Generator().manual_seed(4)
    sizes, strides = [(8, 10), (4, 5)], [8, 16]
    grid = make_grid(sizes, strides, 0.5, device=torch.device("cpu"), dtype=torch.float32)
    count = len(grid.locations)
    reach = torch.rand(images, count, 4, generator=generator) * 30
    at = torch.cat((grid.locations, grid.locations), -1)
    return DensePredictions(
        logits=torch.randn(images, count, 3, generator=generator) * 2 - 1,
        boxes=at + reach * torch.tensor([-1.0, -1.0, 1.0, 1.0]),
        quality=torch.randn(images, count, generator=generator),
        locations=grid.locations,
        strides=grid.strides,
        priors=squares(grid.locations, grid.strides),
        level_sizes=grid.level_sizes,
        extras={},
    )


SIZES = [(60, 75), (64, 80)]


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return width * height / (sum(area) - width * height)


def select_by_loops(
    scores: Tensor, boxes: Tensor, levels: Sequence[int], thresh: float, topk: int, limit: int
) -> Found:
    candidates: Found = []
    start = 0
    for size in levels:
        pairs = [
            (scores[row, label].item(), row, label)
            for row in range(start, start + size)
            for label in range(scores.shape[1])
        ]
        candidates += sorted((x for x in pairs if x[0] > thresh), reverse=True)[:topk]
        start += size
    kept: Found = []
    for score, row, label in sorted(candidates, reverse=True):
        rivals = [boxes[r].tolist() for _, r, k in kept if k == label]
        if all(overlap(boxes[row].tolist(), rival) <= 0.6 for rival in rivals):
            kept.append((score, row, label))
    return kept[:limit]


@pytest.mark.parametrize("score", [class_score, product_score, geometric_mean_score])
@pytest.mark.parametrize("clip", [None, clip_to_image])
def test_whole_selection_equals_loops(score: Any, clip: Any) -> None:
    predictions = random_predictions()
    selection = make_selection(
        score=score,
        candidates=BestPairs(test_score_thresh=0.2, test_topk_candidates=40),
        clip=clip,
        max_detections_per_image=25,
    )
    results = selection(predictions, SIZES)
    scores = score(predictions)
    for image, (result, size) in enumerate(zip(results, SIZES, strict=True)):
        boxes = predictions.boxes[image] if clip is None else clip(predictions.boxes[image], size)
        want = select_by_loops(scores[image], boxes, predictions.level_sizes, 0.2, 40, 25)
        assert result.image_size == size
        assert result.location_index.tolist() == [row for _, row, _ in want]
        assert result.pred_classes.tolist() == [label for _, _, label in want]
        assert result.scores.tolist() == pytest.approx([x for x, _, _ in want])
        assert torch.equal(result.pred_boxes.tensor, boxes[result.location_index])
        assert torch.equal(result.scores, scores[image][result.location_index, result.pred_classes])
        assert (result.scores.diff() <= 0).all()
        assert len(result) == 25


def test_two_steps_give_what_the_call_gives() -> None:
    predictions = random_predictions()
    selection = make_selection(score=product_score, max_detections_per_image=7)
    whole = selection(predictions, SIZES)
    proposals = selection.propose(predictions, SIZES)
    assert all(len(x) > 7 for x in proposals)
    for want, found in zip(whole, map(selection.suppress, proposals), strict=True):
        assert len(found) == 7
        for name, value in want.get_fields().items():
            other = found.get(name)
            both = [x.tensor if isinstance(x, Boxes) else x for x in (value, other)]
            assert torch.equal(*both), name


def test_proposals_can_be_merged_before_suppression() -> None:
    """What test-time augmentation does: the same candidates twice change nothing."""
    selection = make_selection(score=product_score)
    (proposals, _) = selection.propose(random_predictions(), SIZES)
    twice = selection.suppress(Instances.cat([proposals, proposals]))
    once = selection.suppress(proposals)
    assert torch.equal(twice.pred_boxes.tensor, once.pred_boxes.tensor)
    assert torch.equal(twice.scores, once.scores)


def test_boxes_are_a_slot() -> None:
    predictions = random_predictions()._replace(extras={"coarse": random_predictions().boxes + 1})
    results = make_selection(boxes=lambda x: x.extras["coarse"])(predictions, SIZES)
    for image, result in enumerate(results):
        want = predictions.extras["coarse"][image][result.location_index]
        assert torch.equal(result.pred_boxes.tensor, want)


@pytest.mark.parametrize("clip", [None, clip_to_image])
def test_nothing_found(clip: Any) -> None:
    predictions = random_predictions()
    predictions = predictions._replace(logits=torch.full_like(predictions.logits, -20))
    for result, size in zip(make_selection(clip=clip)(predictions, SIZES), SIZES, strict=True):
        assert len(result) == 0
        assert result.image_size == size
        assert result.pred_boxes.tensor.shape == (0, 4)
        assert result.scores.shape == result.pred_classes.shape == (0,)
        assert result.location_index.shape == (0,)


def test_one_empty_image_beside_a_full_one() -> None:
    predictions = random_predictions()
    predictions.logits[0] = -20
    first, second = make_selection()(predictions, SIZES)
    assert len(first) == 0
    assert len(second) > 0


@pytest.mark.parametrize("slot", ["score", "candidates", "nms", "boxes", "clip"])
def test_strings_are_refused(slot: str) -> None:
    """What ``selection.score=class_score`` on the command line would leave behind."""
    with pytest.raises(TypeError, match=rf"selection\.{slot} must be callable, got 'something'"):
        make_selection(**{slot: "something"})


def test_one_size_for_each_image() -> None:
    with pytest.raises(ValueError, match="zip"):
        make_selection()(random_predictions(2), SIZES[:1])
