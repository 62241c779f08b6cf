# SPDX-License-Identifier: Apache-2.0
"""Evidence is drawn where it is, as strong as it is, with its numbers."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from d2_decouple.engine.context import DetectionContext, evidence_in
from d2_decouple.visualization import class_colors, draw_context
from d2_decouple.visualization.canvas import Canvas
from d2_decouple.visualization.context import _legend_rows
from d2_decouple.visualization.context_panel import (
    BRANCHES,
    draw_heat,
    ground_of,
    heat_color,
    heat_of,
)
from d2_decouple.visualization.page import title_strip

NAMES = ["ant", "bee", "cat"]
CLASS = class_colors(3)[2]
BOX = (20.0, 30.0, 70.0, 60.0)
RED, BLUE = BRANCHES["class"][-1], BRANCHES["box"][-1]
PALE = 128 + 0.35 * 127  # grey, brightened


def seen(size=(100, 120), count=1, explained=None, box=BOX, class_at=None, box_at=None):
    """Detections that are all alike: class evidence in the box's left half, box's in its right."""
    explained = count if explained is None else explained
    boxes = torch.tensor([box] * count).reshape(count, 4)
    evidence = []
    for place in (class_at or (20, 30, 45, 60), box_at or (45, 30, 70, 60)):
        left, top, right, bottom = place
        maps = torch.zeros(explained, *size)
        maps[:, top:bottom, left:right] = 1.0
        maps /= maps.sum((1, 2), keepdim=True).clamp(min=1)
        evidence.append(evidence_in(maps, boxes[:explained]))
    instances = Instances(
        size,
        pred_boxes=Boxes(boxes),
        scores=torch.linspace(0.9, 0.5, count),
        pred_classes=torch.full((count,), 2),
        locations=torch.tensor([[48.0, 44.0]] * count).reshape(count, 2),
        levels=torch.ones(count, dtype=torch.int64),
    )
    overlaps = torch.minimum(evidence[0].maps, evidence[1].maps).sum((1, 2))
    return DetectionContext(instances, *evidence, overlaps, ("p3", "p4"), (8, 16))


def grey(height=100, width=120):
    return np.full((height, width, 3), 128, dtype=np.uint8)


class Panel:
    """A panel of one branch, whose pixels are asked for by places of the image."""

    def __init__(self, branch, context=None, image=None, side=700):
        context = context or seen()
        ground = ground_of(context, 0, 3)
        self.heat = ground.heats[["class", "box"].index(branch)]
        image = grey(*context.instances.image_size) if image is None else image
        drawn = draw_heat(image, ground, self.heat, side=side).astype(int)
        top = len(title_strip("evidence", side))
        self.pixels, self.bars = drawn[top : top + side], drawn[top + side :]
        self.view = ground.view
        self.zoom = side / (self.view[2] - self.view[0])

    def at(self, x, y, right=0, down=0):
        """The colour at a place of the image, or some pixels of the panel beside it."""
        column = round((x - self.view[0]) * self.zoom + right)
        row = round((y - self.view[1]) * self.zoom + down)
        return self.pixels[row, column]


def close(pixel, color, tolerance=12):
    return abs(np.asarray(pixel) - color).max() < tolerance


def mixed(color, opacity):
    return PALE + opacity * (np.array(color) - PALE)


def test_each_branch_is_drawn_where_its_evidence_lies():
    of_class, of_box = Panel("class"), Panel("box")
    left, right, outside = (30, 50), (60, 50), (45, 72)
    assert close(of_class.at(*left), mixed(RED, 0.8))
    assert close(of_box.at(*right), mixed(BLUE, 0.8))
    for panel, places in ((of_class, (right, outside)), (of_box, (left, outside))):
        for place in places:
            assert close(panel.at(*place), [PALE] * 3)


def test_box_cell_and_ring():
    panel = Panel("class")
    for x, y in ((20, 36), (30, 30), (70, 36), (62, 60)):
        assert close(panel.at(x, y), CLASS)
        assert not close(panel.at(x, y, right=9, down=9), CLASS)
    assert close(panel.at(48, 44), (20, 20, 24))
    assert close(panel.at(48, 44, right=6), (20, 20, 24))
    radius = panel.heat.radius * np.hypot(50, 30) / 2  # pixels around (45, 45)
    on_ring = (45 + radius * np.cos(0.7), 45 + radius * np.sin(0.7))
    steps = range(-2, 3)
    assert any(close(panel.at(*on_ring, i, j), RED, 25) for i in steps for j in steps)
    inside = (45 + 0.8 * radius * np.cos(0.7), 45 + 0.8 * radius * np.sin(0.7))
    assert close(panel.at(*inside), [PALE] * 3)


def test_numbers_are_bars():
    context = seen(class_at=(20, 30, 45, 60), box_at=(45, 30, 95, 60))  # half of it is inside
    lengths = []
    for branch, color in (("class", RED), ("box", BLUE)):
        line = Panel(branch, context).bars[round(8 + 0.5 * 25), 120:655]
        lengths.append(sum(close(pixel, color) for pixel in line))
    assert lengths[1] / lengths[0] == pytest.approx(0.5, abs=0.02)
    assert lengths[0] > 500
    nothing = Panel("class", seen(class_at=(0, 0, 0, 0))).bars[round(8 + 0.5 * 25), 120:655]
    assert not any(close(pixel, RED) for pixel in nothing)


def test_heat_is_in_proportion_up_to_the_densest_twentieth():
    evidence = np.zeros((50, 50))
    evidence[0, 0] = 0.04  # a spike
    evidence[10:20, 10:30] = 0.96 * 2 / 3 / 200
    evidence[30:40, 10:30] = 0.96 / 3 / 200
    heat = heat_of(evidence)
    assert heat[0, 0] == 1
    assert heat[15, 20] == 1  # the spike has less than a twentieth
    assert heat[35, 20] == pytest.approx(0.5)
    assert heat[45, 45] == 0
    evidence[0, 0] = 10.0
    assert heat_of(evidence)[15, 20] < 0.001
    assert not heat_of(np.zeros((5, 5))).any()
    one = np.zeros((5, 5))
    one[2, 3] = 1.0
    assert np.array_equal(heat_of(one), one)


@pytest.mark.parametrize("branch", ["class", "box"])
def test_colours_become_darker(branch):
    colors = heat_color(np.linspace(0, 1, 9), branch)
    brightness = colors @ np.array((0.299, 0.587, 0.114))
    assert (np.diff(brightness) < 0).all()
    assert colors[-1].tolist() == list(BRANCHES[branch][-1])


def test_the_image_is_grey_below_and_where_it_belongs():
    image = np.zeros((100, 120, 3), np.uint8)
    image[62:66, 30:34] = (250, 0, 0)
    panel = Panel("class", image=image)
    pixel = panel.at(32, 64)
    assert pixel.max() - pixel.min() < 3
    assert pixel[0] > panel.at(38, 64)[0] + 30
    assert close(panel.at(38, 64), [0.35 * 255] * 3)


def test_a_panel_shows_the_evidence_as_far_as_it_is_near():
    near = ground_of(seen(), 0, 3).view
    wide = ground_of(seen(class_at=(20, 30, 90, 60)), 0, 3).view
    assert wide[2] >= 87 > near[2]
    far = ground_of(seen(class_at=(0, 0, 120, 100)), 0, 3).view
    assert far[2] - far[0] < 3.2 * (BOX[2] - BOX[0])
    for view in (near, wide, far):
        assert view[2] - view[0] == pytest.approx(view[3] - view[1])
        assert (view[0] < BOX[0]) & (view[1] < BOX[1]) & (view[2] > BOX[2]) & (view[3] > BOX[3])
    # Both panels show the same part, or they could not be compared.
    both = seen(class_at=(20, 30, 90, 60), box_at=(44, 44, 46, 46))
    assert Panel("class", both).view == Panel("box", both).view


def test_the_page_shows_the_strongest_and_says_of_how_many():
    image = grey()
    before = image.copy()
    four = draw_context(image, seen(count=9, explained=4), NAMES)
    assert (image == before).all()
    assert four.dtype == np.uint8
    assert four.shape[1] == 18 + 640 + 2 * (18 + 2 * 330 + 18) + 18
    two = draw_context(image, seen(count=9, explained=4), NAMES, limit=2)
    assert two.shape[1] == 18 + 640 + 18 + 2 * 420 + 18 + 18
    # No more than have evidence.
    assert np.array_equal(two, draw_context(image, seen(count=9, explained=2), NAMES, limit=8))
    one = draw_context(image, seen(count=1), NAMES)
    more = draw_context(image, seen(count=2, explained=1), NAMES)
    assert (one[:40, :640] != more[:40, :640]).any()  # "2 detections, the strongest shown"
    assert (draw_context(image, seen(count=1), [NAMES[0]]) != one).any()  # "class 2"
    nothing = draw_context(image, seen(count=0), NAMES)
    assert nothing.shape[1] == 640 + 36
    assert (nothing[100:400, 100:400] == 128).all()


def test_the_overlap_is_a_bar_below_both_panels():
    apart, half, same = (
        draw_context(grey(), seen(box_at=place), NAMES).astype(int)
        for place in ((45, 30, 70, 60), (20, 45, 45, 75), (20, 30, 45, 60))
    )
    # The last row that differs is the lower end of the number, which stands beside the bar.
    middle = abs(apart - same).max(axis=(1, 2)).nonzero()[0].max() - 6
    lengths = [(page[middle, 700:1600].max(axis=1) < 60).sum() for page in (apart, half, same)]
    assert lengths[0] < 30 < lengths[1] < lengths[2]
    assert lengths[1] / lengths[2] == pytest.approx(0.5, abs=0.05)


def test_the_legend_explains_what_is_drawn():
    texts = [text for _, text in _legend_rows([ground_of(seen(), 0, 3)])]
    assert texts[0] == "detection"
    assert any(text.startswith("evidence for the class") for text in texts)
    assert any(text.startswith("evidence for the box") for text in texts)
    assert any(text.startswith("overlap") for text in texts)
    assert _legend_rows([]) == []


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (1500, 2000)])
def test_images_of_any_size(size):
    whole = (0, 0, size[1], size[0])
    context = seen(size, box=tuple(map(float, whole)), class_at=whole, box_at=whole)
    page = draw_context(grey(*size), context, ["a very long name of a class " * 4] * 3)
    assert 640 < page.shape[1] < 1800
    assert page.shape[0] < 1500


def test_what_has_no_evidence_and_boxes_without_area():
    for context in (
        seen(class_at=(0, 0, 0, 0), box_at=(0, 0, 0, 0)),
        seen(box=(20.0, 30.0, 20.0, 30.0)),
    ):
        assert draw_context(grey(), context, NAMES).shape[1] > 640


def test_evidence_of_another_image_is_refused():
    with pytest.raises(ValueError, match=r"\(100, 120\), the image has \(9, 9\); give the image"):
        draw_context(grey(9, 9), seen(), NAMES)


def test_a_ring_has_its_radius_and_may_leave_the_view():
    def ring(radius):
        canvas = Canvas(grey(60, 60), (0, 0, 60, 60), (240, 240))
        canvas.ring((30, 30), radius, (255, 0, 0), 2)
        return abs(canvas.pixels().astype(int) - (255, 0, 0)).max(axis=2) < 90

    drawn = ring(20)
    y, x = drawn.nonzero()
    distances = np.hypot(x - 119.5, y - 119.5)
    assert distances.mean() == pytest.approx(80, abs=0.5)
    assert distances.max() - distances.min() < 4
    assert ring(35).any()
    assert not ring(45).any()
    assert not ring(1e9).any()
