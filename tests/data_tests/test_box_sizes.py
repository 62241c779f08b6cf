# SPDX-License-Identifier: Apache-2.0
"""Sizes of boxes against the pyramid's levels."""

import matplotlib
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from d2_decouple.data.box_sizes import class_table, collect_objects, draw_box_sizes, levels
from d2_decouple.layers.points import make_grid, squares
from d2_decouple.modeling.fcos import FCOSAssigner
from d2_decouple.structures import DensePredictions


def record(*objects, size=(300, 400)):
    return {
        "height": size[0],
        "width": size[1],
        "annotations": [
            {
                "bbox": box,
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": label,
                "iscrowd": crowd,
            }
            for box, label, crowd in objects
        ],
    }


def rows(table):
    return {line.split()[0]: line.split()[1:] for line in table.splitlines()[2:]}


def test_an_object_is_on_the_level_of_half_its_longer_side():
    sizes = np.array([[128, 5], [128.1, 5], [5, 256], [257, 5], [512, 512], [513, 1], [1, 1025]])
    assert levels(sizes).tolist() == [0, 1, 1, 2, 2, 3, 4]
    assert levels(np.zeros((0, 2))).tolist() == []


def test_the_levels_are_those_of_fcos():
    """The cell nearest to the middle of a box is positive on the level that is said."""
    strides = [8, 16, 32, 64, 128]
    sizes = [(1024 // stride, 1024 // stride) for stride in strides]
    grid = make_grid(sizes, strides, 0.5, device=torch.device("cpu"), dtype=torch.float32)
    starts = np.cumsum([0, *grid.level_sizes])
    places = len(grid.locations)
    sides = np.array([[100, 40], [40, 200], [300, 300], [900, 500], [100, 1100]])
    said = levels(sides)
    assert sorted(said) == [0, 1, 2, 3, 4]
    for (width, height), level in zip(sides, said, strict=True):
        first = starts[level]
        middle = grid.locations[first + grid.level_sizes[level] // 2]  # of this level's cells
        half = torch.tensor([width / 2, height / 2])
        truth = Instances((1024, 1024))
        truth.gt_boxes = Boxes(torch.cat((middle - half, middle + half))[None])
        truth.gt_classes = torch.tensor([0])
        predictions = DensePredictions(
            logits=torch.zeros(1, places, 1),
            boxes=torch.zeros(1, places, 4),
            quality=None,
            locations=grid.locations,
            strides=grid.strides,
            priors=squares(grid.locations, grid.strides),
            level_sizes=grid.level_sizes,
            extras={},
        )
        features = [torch.zeros(1, 0, *size) for size in sizes]
        labels = FCOSAssigner(num_classes=1)(features, predictions, [truth]).labels[0]
        assert labels[first + grid.level_sizes[level] // 2] == 0
        assert not (labels[:first] == 0).any()  # cells beside the middle reach further, never less


def test_sizes_are_resized_as_the_recipe_does():
    records = [record(([0, 0, 30, 40], 0, 0)), record(([0, 0, 30, 40], 1, 0), size=(100, 1000))]
    objects = collect_objects(records, short_side=600, max_size=1000)
    assert objects.scales.tolist() == [2, 1]  # the second image's long side is at its limit
    assert objects.resized.tolist() == [[60, 80], [30, 40]]
    assert objects.images.tolist() == [0, 1]


def test_boxes_that_have_no_size_are_left_out():
    wrong = [([5, 5, 5, 9], 0, 0), ([9, 5, 5, 9], 0, 0), ([0, 0, np.nan, 1], 0, 0)]
    objects = collect_objects([record(*wrong), {"file_name": "a"}], short_side=1, max_size=1)
    assert len(objects.classes) == 0
    assert rows(class_table(objects, ["cat"]))["cat"] == ["0", "0", "0", *["–"] * 8]


def test_table_counts_objects_images_and_crowds():
    records = [
        record(([0, 0, 16, 25], 0, 0), ([0, 0, 300, 300], 0, 0), ([0, 0, 9, 9], 1, 1)),
        record(([0, 0, 16, 25], 0, 0), ([0, 0, 16, 25], 0, 1)),
        record(),
    ]
    table = rows(class_table(collect_objects(records, short_side=300, max_size=400), ["a", "b"]))
    # Two of three in P3 (25 pixels), one in P5 (300); sizes are roots of areas: 20, 20, 300.
    assert table["a"] == ["3", "2", "1", "20", "20", "272", "67%", "–", "33%", "–", "–"]
    assert table["b"] == ["0", "1", "1", *["–"] * 8]
    assert table["all"][:3] == ["3", "2", "2"]


@pytest.mark.parametrize("count", [0, 1, 300])
def test_picture(tmp_path, count):
    random = np.random.default_rng(0)
    corners = random.uniform(1, 290, (count, 2))
    records = [record(*(([0, 0, *corner], index % 15, 0) for index, corner in enumerate(corners)))]
    objects = collect_objects(records, short_side=300, max_size=400)
    before = dict(matplotlib.rcParams)
    file = tmp_path / "new" / "sizes.png"
    names = ["$x_{$", "_x", *(f"class {index}" for index in range(2, 15))]  # no formula
    draw_box_sizes(objects, names, file, short_side=300, max_size=400)
    assert dict(matplotlib.rcParams) == before
    with Image.open(file) as image:
        assert min(image.size) > 500
