# SPDX-License-Identifier: Apache-2.0
"""PDNet's assignment against plain loops over boxes, on scenes drawn from seeds."""

import random
from collections.abc import Sequence

import pytest
import torch
from pdnet_loops import IGNORED, NONE, cells_of, coarse_matches, final_matches
from pdnet_parts import STRIDES
from pdnet_scenes import FAR, K, Size, assign, instances, level_sizes, start
from torch import Tensor

from d2_decouple.modeling import coarse_targets
from d2_decouple.structures import DenseTargets, foreground


def random_scene(
    seed: int, counts: Sequence[int] = (0, 1, 3, 8)
) -> tuple[Size, list[Size], list[list[list[float]]], Tensor]:
    """Images of several sizes in one batch; objects that share middles, overlap, lie at borders;
    coarse boxes near the objects in steps that make overlaps tie, some inverted.
    """
    draw = random.Random(seed)
    padded = draw.choice([(64, 96), (128, 128), (160, 64)])
    sizes, objects, coarse = [], [], []
    for _ in range(draw.choice([1, 2, 3])):
        sizes.append((draw.randint(20, padded[0]), draw.randint(20, padded[1])))
        boxes = []
        for _ in range(draw.choice(counts)):
            x, y = draw.randrange(0, padded[1], 4), draw.randrange(0, padded[0], 4)
            half = [draw.choice([0.5, 2, 6, 8, 16, 31.5, 32, 40, 64]) for _ in range(2)]
            boxes.append([x - half[0], y - half[1], x + half[0], y + half[1]])
        boxes += boxes[: len(boxes) // 10]  # in a crowd, some twice
        objects.append(boxes)
        rows = []
        for _ in range(start(padded, len(STRIDES))):
            about = draw.choice([*boxes, [0.0, 0.0, 32.0, 32.0], FAR])
            box = [value + draw.choice([0, 0, 0, -2, 2, 4, 8, -8]) for value in about]
            if draw.random() < 0.1:
                box = box[2:] + box[:2]
            rows.append(box)
        coarse.append(rows)
    return padded, sizes, objects, torch.tensor(coarse, dtype=torch.float64)


@pytest.mark.parametrize("side", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(12))
def test_equals_plain_loops(seed: int, side: float) -> None:
    compare(*random_scene(seed), side)


def test_equals_plain_loops_in_a_crowd() -> None:
    """More objects than are compared at once."""
    compare(*random_scene(0, counts=(150,)), 0.0)


def compare(
    padded: Size,
    sizes: list[Size],
    objects: list[list[list[float]]],
    coarse: Tensor,
    side: float,
) -> None:
    truth = [
        instances(size, boxes, [index % K for index in range(len(boxes))])
        for size, boxes in zip(sizes, objects, strict=True)
    ]
    cells = cells_of(level_sizes(padded), STRIDES)
    for dtype in (torch.float32, torch.float64):
        targets = assign(padded, truth, coarse, dtype, side_offset=side)
        for image, (size, boxes) in enumerate(zip(sizes, objects, strict=True)):
            final = final_matches(cells, coarse[image].tolist(), boxes, size, side=side)
            check(targets, image, final, boxes)
            nearest = coarse_matches(cells, boxes, size, side)
            check(coarse_targets(targets), image, nearest, boxes)
        for part in (targets, coarse_targets(targets)):
            count = foreground(part.labels, K).sum().item()
            assert part.cls_normalizer.item() == part.box_normalizer.item() == max(count, 1)


def check(
    targets: DenseTargets, image: int, matched: list[int], boxes: Sequence[Sequence[float]]
) -> None:
    labels = [{NONE: K, IGNORED: -1}.get(index, index % K) for index in matched]
    assert targets.labels[image].tolist() == labels
    assert targets.extras["gt_index"][image].tolist() == [max(index, NONE) for index in matched]
    nothing = [0.0] * 4
    wanted = [nothing if index < 0 else boxes[index] for index in matched]
    assert targets.boxes[image].tolist() == wanted
    assert targets.box_weights[image].tolist() == [float(index >= 0) for index in matched]


def test_random_scenes_have_something_to_tell() -> None:
    """Over all seeds: objects share cells, overlaps tie, cells are ignored, boxes are inverted."""
    seen = set()
    for seed in range(12):
        padded, sizes, objects, coarse = random_scene(seed)
        cells = cells_of(level_sizes(padded), STRIDES)
        for image, (size, boxes) in enumerate(zip(sizes, objects, strict=True)):
            final = final_matches(cells, coarse[image].tolist(), boxes, size, side=0)
            nearest = coarse_matches(cells, boxes, size, 0)
            seen |= {"no objects"} if not boxes else set()
            seen |= {"ignored"} if IGNORED in final else set()
            seen |= (
                {"without coarse"} if boxes and len({*nearest} - {-1, -2}) < len(boxes) else set()
            )
            seen |= {"several cells"} if len([i for i in nearest if i >= 0]) > len(boxes) else set()
            seen |= {"without final"} if boxes and len({*final} - {-1, -2}) < len(boxes) else set()
    assert seen == {"no objects", "ignored", "without coarse", "several cells", "without final"}
