# SPDX-License-Identifier: Apache-2.0
"""ATSS's assignment against plain loops over boxes and cells, on scenes drawn from seeds."""

import random
from itertools import accumulate

import pytest
import torch
from atss_loops import (
    IGNORED,
    NONE,
    STRIDES,
    Box,
    K,
    Scene,
    Size,
    assign,
    cells_of,
    match,
    nearest,
    predictions_of,
    pyramid_sizes,
    random_scene,
)
from util import make_instances

from d2_decouple.modeling import ATSSAssigner
from d2_decouple.modeling.atss import nearest_candidates
from d2_decouple.modeling.matching import read_levels
from d2_decouple.structures import stack_ground_truth

SEEDS = range(24)
PYRAMIDS = [STRIDES, [4, 8], [16], [32, 64, 128]]


def compare(
    scene: Scene, strides: list[int], topk: int, offset: float, dtype: torch.dtype
) -> tuple[int, int]:
    """How many cells are positive, and how many are left out because rounding decides there."""
    sizes = pyramid_sizes(*scene.padded, strides)
    assigner = ATSSAssigner(num_classes=K, topk=topk)
    targets = assign(assigner, sizes, strides, scene.truth(), offset=offset, dtype=dtype)
    cells = cells_of(sizes, strides, offset)
    thresholds, positives, doubtful, counts, center = [], 0, 0, 0, 0.0
    for image, (size, boxes) in enumerate(scene.images):
        found = match(cells, boxes, size, topk)
        thresholds += found.thresholds
        sure = [k for k in range(len(cells)) if k not in found.doubtful]
        want = [found.objects[k] for k in sure]
        assert targets.extras["gt_index"][image, sure].tolist() == [max(x, NONE) for x in want]
        labels = [{NONE: K, IGNORED: -1}.get(x, x % K) for x in want]
        assert targets.labels[image, sure].tolist() == labels
        matched = [[0.0] * 4 if x < 0 else list(boxes[x]) for x in want]
        assert targets.boxes[image, sure].tolist() == matched
        weights = [0.0 if x < 0 else middle(cells[k], boxes[x]) for k, x in zip(sure, want)]  # noqa: B905
        for got in (targets.box_weights, targets.quality):
            assert got is not None
            assert got[image, sure].tolist() == pytest.approx(weights, abs=1e-5)
        doubtful += len(found.doubtful)
        positives += sum(x >= 0 for x in want)
        counts += max(int(((targets.labels[image] >= 0) & (targets.labels[image] < K)).sum()), 1)
        center += targets.box_weights[image].sum().item()
    assert targets.extras["iou_thresholds"].tolist() == pytest.approx(thresholds, abs=1e-6)
    assert targets.cls_normalizer.item() == counts
    assert targets.box_normalizer.item() == pytest.approx(max(center, 1))
    assert (targets.cls_weights == 1).all()
    return positives, doubtful


def middle(cell: object, box: Box) -> float:
    """Centerness."""
    x, y = cell.x, cell.y  # type: ignore[attr-defined]
    sides = [sorted((x - box[0], box[2] - x)), sorted((y - box[1], box[3] - y))]
    return (sides[0][0] / sides[0][1] * sides[1][0] / sides[1][1]) ** 0.5


@pytest.mark.parametrize("seed", SEEDS)
def test_equals_plain_loops(seed: int) -> None:
    scene = random_scene(seed)
    compare(scene, STRIDES, 9, 0.0, torch.float64)
    compare(scene, STRIDES, 9, 0.0, torch.float32)


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("topk", [1, 2, 4, 9, 20])
@pytest.mark.parametrize("strides", PYRAMIDS, ids=str)
def test_equals_plain_loops_on_other_pyramids(strides: list[int], topk: int, offset: float) -> None:
    for seed in range(100, 103):
        compare(random_scene(seed), strides, topk, offset, torch.float64)


def test_equals_plain_loops_in_a_crowd() -> None:
    """200 boxes of a few sizes on a raster, so that cells are claimed many times."""
    draw = random.Random(5)
    boxes = []
    for _ in range(200):
        x, y, half = 4 * draw.randrange(48), 4 * draw.randrange(32), draw.choice([12, 20, 33, 50])
        boxes.append([x - half, y - half, x + half, y + draw.choice([half, half + 8])])
    scene = Scene((128, 192), [((128, 192), boxes), ((96, 100), boxes[:60])])
    positives, doubtful = compare(scene, STRIDES, 9, 0.0, torch.float64)
    assert positives > 150
    assert doubtful < 10


def test_random_scenes_have_something_to_tell() -> None:
    """Every kind of outcome, and next to none that rounding decides."""
    positives = doubtful = 0
    seen = set()
    for seed in SEEDS:
        scene = random_scene(seed)
        found = compare(scene, STRIDES, 9, 0.0, torch.float64)
        positives, doubtful = positives + found[0], doubtful + found[1]
        cells = cells_of(pyramid_sizes(*scene.padded), STRIDES, 0.0)
        for size, boxes in scene.images:
            objects = match(cells, boxes, size).objects
            seen |= {"no objects"} if not boxes else set()
            seen |= {"ignored"} if IGNORED in objects else set()
            seen |= {"twins"} if len({tuple(box) for box in boxes}) < len(boxes) else set()
            seen |= {"without cells"} if len({*objects} - {NONE, IGNORED}) < len(boxes) else set()
            levels = {cells[k].level for k, x in enumerate(objects) if x >= 0}
            seen |= {f"level {level}" for level in levels}
    assert {"no objects", "ignored", "twins", "without cells"} <= seen
    assert {"level 0", "level 1", "level 2", "level 3", "level 4"} <= seen
    assert positives > 300
    assert doubtful < positives / 20


# --- candidates ---------------------------------------------------------------------------------


def candidates(
    sizes: list[Size], strides: list[int], boxes: list[Box], size: Size, topk: int
) -> list[list[int]]:
    predictions = predictions_of(sizes, strides, 1)
    levels = read_levels(predictions, sizes)
    truth = stack_ground_truth([make_instances(size, boxes, [0] * len(boxes))])
    truth = truth._replace(boxes=truth.boxes.double())
    total = sum(predictions.level_sizes)
    found = nearest_candidates(truth, levels, levels.extent[None], topk, (1, total))
    assert torch.equal(found.exists, found.indices < total)
    return [
        [k for k, exists in zip(row, known, strict=True) if exists]
        for row, known in zip(found.indices.tolist(), found.exists.tolist(), strict=True)
    ]


@pytest.mark.parametrize("topk", [*range(1, 13), 30])
def test_candidates_are_the_nearest_and_the_first_of_equals(topk: int) -> None:
    """Middles on cells, on the lines and points between them, at borders and far away."""
    draw = random.Random(topk)
    for height, width in [(9, 11), (1, 12), (12, 1), (1, 1), (2, 3), (5, 40)]:
        sizes, strides = [(height, width), ((height + 1) // 2, (width + 1) // 2)], [8, 16]
        boxes: list[Box] = []
        for _ in range(40):
            x = draw.randrange(-8, 16 * width, draw.choice([1, 2, 4, 8])) / 2
            y = draw.randrange(-8, 16 * height, draw.choice([1, 2, 4, 8])) / 2
            x, y = draw.choice([(x, y), (x, y), (x, -500.0), (9999.0, y), (-300.0, -300.0)])
            boxes.append([x - 8, y - 8, x + 8, y + 8])
        size = (8 * height, 8 * width)
        cells = cells_of(sizes, strides, 0.0)
        want = [nearest(cells, range(len(cells)), box, topk) for box in boxes]
        assert candidates(sizes, strides, boxes, size, topk) == want


def test_candidates_lie_in_the_images_own_padding() -> None:
    """A box at the border of a small image in a large batch: nothing right of 64 pixels counts."""
    sizes = pyramid_sizes(128, 192)
    starts = [0, *accumulate(height * width for height, width in sizes)]
    box = [40.0, 10.0, 90.0, 60.0]
    truth = [make_instances((60, 64), [box], [1]), make_instances((128, 192), [box], [1])]
    targets = assign(ATSSAssigner(num_classes=K), sizes, STRIDES, truth)
    labels = targets.labels[:, : starts[1]].view(2, 16, 24)
    assert (labels[0, 8:] == -1).all()
    assert (labels[0, :, 8:] == -1).all()
    assert not (labels[0, :8, :8] == -1).any()
    assert not (labels[1] == -1).any()
    assert not torch.equal(*targets.extras["iou_thresholds"])
    assert not targets.box_weights[0][targets.labels[0] == -1].any()
