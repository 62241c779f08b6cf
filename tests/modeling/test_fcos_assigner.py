# SPDX-License-Identifier: Apache-2.0
"""FCOS's assignment: by hand, against plain loops, and what it may not cost."""

import math
from typing import Any

import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from d2_decouple.layers.points import make_grid, squares
from d2_decouple.modeling import FCOSAssigner, unit_weight
from d2_decouple.structures import DensePredictions, DenseTargets

K = 4  # classes, so 4 is background
STRIDES = [8, 16, 32, 64, 128]

Sizes = list[tuple[int, int]]


def pyramid_sizes(height: int, width: int, strides: list[int]) -> Sizes:
    return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in strides]


def blank_predictions(
    sizes: Sizes,
    strides: list[int],
    images: int,
    *,
    offset: float = 0.5,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> DensePredictions:
    grid = make_grid(sizes, strides, offset, device=torch.device(device), dtype=dtype)
    count = len(grid.locations)
    return DensePredictions(
        logits=torch.zeros(images, count, K, dtype=dtype, device=device),
        boxes=torch.zeros(images, count, 4, dtype=dtype, device=device),
        quality=None,
        locations=grid.locations,
        strides=grid.strides,
        priors=squares(grid.locations, grid.strides),
        level_sizes=grid.level_sizes,
        extras={},
    )


def instances(boxes: Tensor | list[list[float]], classes: Tensor | list[int]) -> Instances:
    boxes = torch.as_tensor(boxes).reshape(-1, 4)
    return Instances((0, 0), gt_boxes=Boxes(boxes), gt_classes=torch.as_tensor(classes).long())


def assign(
    assigner: FCOSAssigner,
    sizes: Sizes,
    strides: list[int],
    truth: list[Instances],
    **geometry: Any,
) -> DenseTargets:
    predictions = blank_predictions(sizes, strides, len(truth), **geometry)
    features = [torch.zeros(len(truth), 0, *size) for size in sizes]
    return assigner(features, predictions, truth)


def test_hand_worked_image() -> None:
    """Levels of 4x4 cells of 8 pixels and 2x2 of 16; one box of class 2 around (14, 16).

    Reference points at 4, 12, 20, 28. In x: inside (6, 22) lie 12 and 20, both less than
    1.5 * 8 = 12 pixels from 14. In y: inside (6, 26) lie 12 and 20, 4 pixels from 16. So the cells
    (1, 1), (2, 1), (1, 2), (2, 2) are positive: rows 5, 6, 9, 10. The largest distance is 14,
    which belongs to the finest level (up to 64), so the coarse level has nothing.
    """
    box = [6.0, 6.0, 22.0, 26.0]
    truth = [instances([box], [2])]
    targets = assign(FCOSAssigner(num_classes=K), [(4, 4), (2, 2)], [8, 16], truth)
    positive = [5, 6, 9, 10]
    labels = [2 if index in positive else K for index in range(20)]
    assert targets.labels.tolist() == [labels]
    assert targets.extras["gt_index"].tolist() == [[0 if k == 2 else -1 for k in labels]]
    assert targets.boxes[0].tolist() == [box if k == 2 else [0.0] * 4 for k in labels]
    # (left, top, right, bottom): (6, 6, 10, 14), (14, 6, 2, 14), (6, 14, 10, 6), (14, 14, 2, 6)
    x, y = [6 / 10, 2 / 14], [6 / 14, 6 / 14]
    center = torch.tensor([x[0] * y[0], x[1] * y[0], x[0] * y[1], x[1] * y[1]]).sqrt()
    assert targets.quality is not None
    torch.testing.assert_close(targets.quality[0, positive], center)
    torch.testing.assert_close(targets.box_weights[0, positive], center)
    assert targets.quality.count_nonzero() == targets.box_weights.count_nonzero() == 4
    assert targets.cls_weights.shape == (1, 20, 1)
    assert (targets.cls_weights == 1).all()
    assert targets.cls_normalizer.item() == 4
    torch.testing.assert_close(targets.box_normalizer, center.sum())


def test_center_region_is_open_and_cut_to_the_box() -> None:
    """Around (12, 12), radius 1 stride: 4 and 20 lie exactly 8 pixels away, which is too far."""
    big = [instances([[-40.0, -40.0, 64.0, 64.0]], [0])]
    targets = assign(FCOSAssigner(num_classes=K, radius=1), [(4, 4)], [8], big)
    assert (targets.labels == 0).nonzero().tolist() == [[0, 5]]
    wider = assign(FCOSAssigner(num_classes=K, radius=1.01), [(4, 4)], [8], big)
    assert (wider.labels == 0).sum() == 9
    # A border through the reference points 4 and 20 leaves them outside.
    bordered = [instances([[4.0, 4.0, 20.0, 20.0]], [0])]
    targets = assign(FCOSAssigner(num_classes=K, radius=1.5), [(4, 4)], [8], bordered)
    assert (targets.labels == 0).nonzero().tolist() == [[0, 5]]


@pytest.mark.parametrize(
    ("side", "level"),
    [
        (9.75, 0),  # right and bottom distance of the location that counts
        (10.0, 0),  # the upper limit is inclusive
        (10.25, 1),
        (20.0, 1),
        (20.25, None),
    ],
)
def test_level_ranges_are_inclusive(side: float, level: int | None) -> None:
    """A box from 3 pixels left of a level's only location to ``side`` right of it."""
    assigner = FCOSAssigner(num_classes=K, radius=9, size_ranges=[(0, 10), (10, 20)])
    for tried, middle in enumerate((4.0, 8.0)):
        box = [middle - 3, middle - 3, middle + side, middle + side]
        targets = assign(assigner, [(1, 1), (1, 1)], [8, 16], [instances([box], [1])])
        positive = targets.labels[0, tried].item() == 1
        both = side == 10.0  # the end of one range and the beginning of the next
        assert positive == (tried == level or both)


def test_default_ranges_are_four_to_eight_strides() -> None:
    """Boxes around one location of each level: half a side of 64 pixels belongs to both levels."""
    sizes, strides = [(64, 64), (32, 32), (16, 16)], [8, 16, 32]
    for half, levels in ((1, {0}), (64, {0, 1}), (65, {1}), (128, {1, 2}), (5000, {2})):
        # A box of this half around the middle of a cell of each level, one at a time.
        found = set()
        start = 0
        for level, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
            cell = size[0] // 2
            at = (cell + 0.5) * stride
            box = [at - half, at - half, at + half, at + half]
            targets = assign(FCOSAssigner(num_classes=K), sizes, strides, [instances([box], [0])])
            if targets.labels[0, start + cell * size[1] + cell] == 0:
                found.add(level)
            start += size[0] * size[1]
        assert found == levels, half


def test_smallest_box_wins_and_the_first_of_equals() -> None:
    middle = 4.0  # of cell (0, 0)

    def around(half_width: float, half_height: float) -> list[float]:
        x, y = half_width, half_height
        return [middle - x, middle - y, middle + x, middle + y]

    def winner(*boxes: list[float]) -> int:
        truth = [instances(list(boxes), list(range(len(boxes))))]
        targets = assign(FCOSAssigner(num_classes=K), [(1, 1)], [8], truth)
        assert targets.labels[0, 0] == targets.extras["gt_index"][0, 0]
        assert targets.boxes[0, 0].tolist() == list(boxes[int(targets.labels[0, 0])])
        return int(targets.labels[0, 0])

    assert winner(around(6, 6), around(4, 4), around(5, 5)) == 1
    assert winner(around(4, 4), around(6, 6)) == 0
    assert winner(around(6, 6), around(4, 4), around(4, 4)) == 1  # twins
    assert winner(around(8, 2), around(4, 4), around(2, 8)) == 0  # equal area, other shape
    assert winner(around(1, 9), around(4, 4), around(3, 3)) == 0  # by area, not by side
    # The smaller box does not claim the cell: the larger one keeps it.
    assert winner([5.0, 5.0, 7.0, 7.0], around(6, 6)) == 1


# --- against loops ------------------------------------------------------------------------------


def smallest_claim(
    x: float, y: float, stride: int, limits: tuple[float, float], radius: float, boxes: Any
) -> int | None:
    best, best_area = None, math.inf
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        sides = (x - x1, y - y1, x2 - x, y2 - y)
        far = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2))
        if min(sides) <= 0 or far >= radius * stride or not limits[0] <= max(sides) <= limits[1]:
            continue
        if (x2 - x1) * (y2 - y1) < best_area:
            best, best_area = index, (x2 - x1) * (y2 - y1)
    return best


def loop_over_cells(
    sizes: Sizes,
    strides: list[int],
    offset: float,
    radius: float,
    ranges: list[tuple[float, float]],
    boxes: list[list[float]],
) -> tuple[list[int], list[float]]:
    """Index of the matched box (-1: none) and centerness at each location, in float64."""
    matched, center = [], []
    for (height, width), stride, limits in zip(sizes, strides, ranges, strict=True):
        for i in range(height):
            for j in range(width):
                x, y = (j + offset) * stride, (i + offset) * stride
                best = smallest_claim(x, y, stride, limits, radius, boxes)
                matched.append(-1 if best is None else best)
                if best is None:
                    center.append(0.0)
                    continue
                x1, y1, x2, y2 = boxes[best]
                across = min(x - x1, x2 - x) / max(x - x1, x2 - x)
                down = min(y - y1, y2 - y) / max(y - y1, y2 - y)
                center.append(math.sqrt(across * down))
    return matched, center


def random_boxes(generator: torch.Generator, height: int, width: int) -> Tensor:
    """Boxes of all sorts with coordinates in quarters: ties with the limits do happen."""

    def uniform(count: int, low: float, high: float) -> Tensor:
        return torch.rand(count, 2, generator=generator) * (high - low) + low

    size = torch.tensor([width, height])
    kinds = [
        (uniform(4, 0, 1) * size, uniform(4, 4, 80)),  # ordinary
        (uniform(3, 0, 1) * size, uniform(3, 0, 6)),  # tiny, between the locations or without area
        (uniform(2, 0.2, 0.8) * size, uniform(2, 100, 400)),  # beyond the image
        (uniform(2, -1, 0) * size, uniform(2, 10, 200)),  # middle left of and above the image
        (uniform(1, 1.1, 2) * size, uniform(1, 10, 300)),  # middle right of and below the image
        (uniform(1, 0.4, 0.6) * size, uniform(1, 1000, 5000)),  # huge
    ]
    boxes = torch.cat([torch.cat((at - half / 2, at + half / 2), -1) for at, half in kinds])
    boxes = torch.cat((boxes, boxes[[0, 4]]))  # twins
    chosen = torch.randperm(len(boxes), generator=generator)
    count = int(torch.randint(0, len(boxes) + 1, (), generator=generator))
    return (boxes[chosen[:count]] * 4).round() / 4


PYRAMIDS: dict[str, tuple[list[int], list[tuple[float, float]] | None]] = {
    "p3-p7": (STRIDES, None),
    "p2-p4": ([4, 8, 16], None),
    "one level": ([16], [(0, math.inf)]),
    "tens": ([10, 20, 30], [(0, 40), (30, 90), (90, 1e8)]),  # ranges that overlap
}


def defaults(strides: list[int]) -> list[tuple[float, float]]:
    last = len(strides) - 1
    return [
        (4 * s if level else 0, 8 * s if level < last else math.inf)
        for level, s in enumerate(strides)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("radius", [0.7, 1.0, 1.5, 2.5])
@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_equals_loops_over_boxes_and_cells(pyramid: str, radius: float, dtype: torch.dtype) -> None:
    strides, ranges = PYRAMIDS[pyramid]
    generator = torch.Generator().manual_seed(int(radius * 10) + len(strides))
    positives = 0
    for scene, (height, width) in enumerate([(97, 131), (64, 64), (33, 150), (8, 8)] * 5):
        offset = (0.5, 0.0)[scene % 2]
        sizes = pyramid_sizes(height, width, strides)
        boxes = [random_boxes(generator, height, width) for _ in range(3)]
        classes = [torch.randint(0, K, (len(x),), generator=generator) for x in boxes]
        truth = [instances(*pair) for pair in zip(boxes, classes, strict=True)]
        assigner = FCOSAssigner(num_classes=K, radius=radius, size_ranges=ranges)
        targets = assign(assigner, sizes, strides, truth, offset=offset, dtype=dtype)
        total = 0.0
        for image in range(3):
            matched, center = loop_over_cells(
                sizes, strides, offset, radius, ranges or defaults(strides), boxes[image].tolist()
            )
            assert targets.extras["gt_index"][image].tolist() == matched
            labels = [K if index < 0 else int(classes[image][index]) for index in matched]
            assert targets.labels[image].tolist() == labels
            want_boxes = torch.cat((boxes[image], torch.zeros(1, 4))).to(dtype)[matched]
            assert torch.equal(targets.boxes[image], want_boxes)
            want = torch.tensor(center, dtype=dtype)
            assert targets.quality is not None
            torch.testing.assert_close(targets.quality[image], want)
            torch.testing.assert_close(targets.box_weights[image], want)
            total += sum(center)
        count = int((targets.labels < K).sum())
        assert targets.cls_normalizer.item() == max(count, 1)
        assert targets.box_normalizer.item() == pytest.approx(max(total, 1), rel=1e-5)
        positives += count
    assert positives > 200  # the scenes have something to compare


# --- contract -----------------------------------------------------------------------------------


def test_images_do_not_mix() -> None:
    """A batch gives what its images give alone; images without objects lie in between."""
    sizes = pyramid_sizes(96, 128, STRIDES)
    generator = torch.Generator().manual_seed(5)
    truth = []
    for count in (0, 5, 0, 1, 9, 0):
        boxes = torch.rand(count, 4, generator=generator) * 60
        boxes[:, 2:] += boxes[:, :2] + 4
        truth.append(instances(boxes, torch.randint(0, K, (count,), generator=generator)))
    assigner = FCOSAssigner(num_classes=K)
    together = assign(assigner, sizes, STRIDES, truth)
    for image, alone in enumerate(assign(assigner, sizes, STRIDES, [x]) for x in truth):
        for name in ("labels", "boxes", "cls_weights", "box_weights", "quality"):
            assert torch.equal(getattr(together, name)[image], getattr(alone, name)[0]), name
        assert torch.equal(together.extras["gt_index"][image], alone.extras["gt_index"][0])
    assert (together.labels < K).any(-1).tolist() == [False, True, False, True, True, False]


@pytest.mark.parametrize("images", [1, 3])
def test_no_objects_at_all(images: int) -> None:
    empty = [instances([], []) for _ in range(images)]
    targets = assign(FCOSAssigner(num_classes=K), [(3, 5), (2, 3)], [8, 16], empty)
    assert targets.labels.shape == (images, 21)
    assert (targets.labels == K).all()
    assert (targets.extras["gt_index"] == -1).all()
    assert targets.boxes.shape == (images, 21, 4)
    assert not targets.boxes.any()
    assert not targets.box_weights.any()
    assert targets.cls_normalizer.item() == targets.box_normalizer.item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types_and_gradients(dtype: torch.dtype) -> None:
    truth = [instances([[1.0, 1.0, 20.0, 20.0]], [3])]
    targets = assign(FCOSAssigner(num_classes=K), [(4, 4)], [8], truth, dtype=dtype)
    floats = [targets.boxes, targets.cls_weights, targets.box_weights, targets.quality]
    normalizers = [targets.cls_normalizer, targets.box_normalizer]
    assert all(x is not None and x.dtype == dtype for x in [*floats, *normalizers])
    assert targets.labels.dtype == torch.int64
    assert all(x.shape == () for x in normalizers)
    assert not any(x.requires_grad for x in normalizers)


def test_box_weight_is_a_slot() -> None:
    truth = [instances([[6.0, 6.0, 22.0, 26.0]], [2])]
    plain = assign(FCOSAssigner(num_classes=K, box_weight=unit_weight), [(4, 4)], [8], truth)
    assert torch.equal(plain.box_weights, (plain.labels == 2).float())
    assert plain.box_normalizer.item() == 4
    assert plain.quality is not None
    assert plain.quality.max() < 1  # the quality's target stays centerness
    with pytest.raises(TypeError, match=r"box_weight must be callable.*'centerness'"):
        FCOSAssigner(num_classes=K, box_weight="centerness")  # type: ignore[arg-type]


def test_wrong_numbers_of_levels_and_cells_are_named() -> None:
    truth = [instances([], [])]
    assigner = FCOSAssigner(num_classes=K, size_ranges=[(0, 64)])
    with pytest.raises(ValueError, match=r"size_ranges has 1 entries.*2 levels"):
        assign(assigner, [(4, 4), (2, 2)], [8, 16], truth)
    predictions = blank_predictions([(4, 4), (2, 2)], [8, 16], 1)
    with pytest.raises(ValueError, match=r"\(5, 4\).*\(16, 4\).*one prediction per cell"):
        FCOSAssigner(num_classes=K)(
            [torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 2, 2)], predictions, truth
        )
