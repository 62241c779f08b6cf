# SPDX-License-Identifier: Apache-2.0
"""Pictures of supervision: cells lie where they belong, in their object's colour, by weight."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from d2_decouple.engine.assignment import Assignment, LabelSet
from d2_decouple.visualization import draw_assignment
from d2_decouple.visualization.assignment import _legend, _row_note, _used_levels
from d2_decouple.visualization.assignment_panel import (
    PALETTE,
    Learned,
    _count_text,
    _counts,
    draw_level,
    hatched,
    level_cells,
    object_colors,
)
from d2_decouple.visualization.page import title_strip

PALE = 128 + 0.45 * 127  # of a grey image of 128
FIRST, SECOND = np.array(PALETTE[0]), np.array(PALETTE[1])
BOXES = ((8.0, 8, 40, 40), (60.0, 50, 100, 90))
NAMES = ("ant", "bee", "cat")


def grey(height=100, width=120):
    return np.full((height, width, 3), 128, dtype=np.uint8)


def labels_of(*cells, ignored=(), learns="class and box", cls=True, box=True):
    """A label set of (level, x, y, side, object, class weight, box weight); sides are squares'."""
    table = torch.tensor(cells, dtype=torch.float32).reshape(-1, 7)
    places = torch.tensor(ignored, dtype=torch.float32).reshape(-1, 4)
    return LabelSet(
        learns=learns,
        cells=torch.cat((table[:, 1:3], table[:, 1:3] + table[:, 3:4]), dim=1),
        levels=table[:, 0].long(),
        gt_index=table[:, 4].long(),
        predictions=torch.ones(len(table), dtype=torch.long),
        cls_weights=table[:, 5] if cls else None,
        box_weights=table[:, 6] if box else None,
        ignored=torch.cat((places[:, 1:3], places[:, 1:3] + places[:, 3:]), dim=1),
        ignored_levels=places[:, 0].long(),
    )


def seen(*sets, boxes=BOXES, size=(100, 120), levels=("p3", "p4", "p5")):
    nothing = Instances(
        size,
        pred_boxes=Boxes(torch.zeros(0, 4)),
        scores=torch.zeros(0),
        pred_classes=torch.zeros(0, dtype=torch.long),
    )
    return Assignment(
        instances=nothing,
        gt_boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        gt_classes=torch.tensor([0, 7, 1, 1, 1][: len(boxes)]),
        sets=sets,
        level_names=levels,
        strides=tuple(8 * 2**level for level in range(len(levels))),
        assigner="FCOSAssigner",
        by_predictions=False,
    )


class Panel:
    """A level's panel of five pixels for one of the image, asked for by places of the image."""

    def __init__(self, labels, level=0, image=None, boxes=BOXES):
        image = grey() if image is None else image
        boxes = np.array(boxes).reshape(-1, 4)
        height, width = image.shape[:2]
        self.drawn = draw_level(
            image,
            level_cells(labels, level),
            boxes,
            PALETTE[: len(boxes)],
            side=5 * max(height, width),
            title="p3",
            note="stride 8",
        )
        top = len(title_strip("p3", 600, note="stride 8"))
        self.pixels = self.drawn[top : top + 5 * height].astype(int)
        self.below = self.drawn[top + 5 * height :]

    def at(self, x, y):
        return self.pixels[round(5 * y), round(5 * x)]


def close(pixel, color, tolerance=3):
    return abs(np.asarray(pixel) - color).max() <= tolerance


def mixed(color, opacity):
    return PALE + opacity * (np.array(color) - PALE)


def test_cells_have_their_objects_colour_and_strength():
    """Opacity goes from 0.14 to 0.92 in proportion to the weight: 0.53 for a half."""
    labels = labels_of(
        (0, 16, 16, 8, 0, 1.6, 1.6), (0, 24, 16, 8, 0, 0.8, 0.8), (0, 72, 64, 8, 1, 0, 0)
    )
    panel = Panel(labels)
    for x, y, color, opacity in (
        *((16.6, 16.6, FIRST, 0.92), (22.9, 22.9, FIRST, 0.92), (20, 20, FIRST, 0.92)),
        *((24.6, 20, FIRST, 0.53), (30.8, 22.9, FIRST, 0.53)),
        (76, 68, SECOND, 0.14),
    ):
        assert close(panel.at(x, y), mixed(color, opacity)), (x, y)
    for x, y in ((14, 20), (34, 20), (20, 14), (20, 26), (70, 68), (5, 95)):
        assert close(panel.at(x, y), [PALE] * 3), (x, y)
    # A gap at the right and below, an edge within: neighbours of one colour are told apart.
    assert close(panel.at(23.8, 20), [PALE] * 3)
    assert close(panel.at(20, 23.8), [PALE] * 3)
    assert close(panel.at(24, 20), mixed(FIRST, 0.8))
    assert close(panel.at(31.6, 20), mixed(FIRST, 0.8))


def test_a_level_shows_its_own_cells_relative_to_all_levels():
    labels = labels_of((0, 16, 16, 8, 0, 2, 2), (1, 16, 16, 16, 0, 1, 1))
    assert close(Panel(labels, 1).at(24, 24), mixed(FIRST, 0.53))
    assert close(Panel(labels, 0).at(28, 28), [PALE] * 3)
    empty = Panel(labels, 2)
    assert close(empty.at(24, 24), [PALE] * 3)
    # Objects that a level does not learn are thin and grey, others in colour, with a number.
    assert close(empty.at(24, 8), mixed((105, 108, 116), 0.6), 25)
    assert close(Panel(labels, 0).at(24, 8), FIRST, 25)
    assert close(Panel(labels, 0).at(80, 50), mixed((105, 108, 116), 0.6), 25)


def test_a_cell_of_several_objects_is_divided():
    labels = labels_of((0, 16, 16, 8, 0, 1, 1), (0, 16, 16, 8, 1, 1, 1), (0, 24, 16, 8, 1, 1, 1))
    panel = Panel(labels)
    assert close(panel.at(18, 20), mixed(FIRST, 0.92))
    assert close(panel.at(22, 20), mixed(SECOND, 0.92))
    assert close(panel.at(28, 20), mixed(SECOND, 0.92))


def test_dots_have_the_boxes_weights_where_they_differ():
    """The radius is 0.32 of the side, 40 pixels, for the greatest weight, half of it for 1 / 4."""
    panel = Panel(labels_of((0, 16, 16, 8, 0, 1, 0.8), (0, 24, 16, 8, 0, 1, 0.2)))
    for left, inside, outside in ((16, 2.2, 2.9), (24, 1.0, 1.6)):
        middle = left + 3.9
        assert close(panel.at(middle, 19.9), (28, 28, 28))
        assert close(panel.at(middle + inside, 19.9), (28, 28, 28))
        assert close(panel.at(middle + outside, 19.9), mixed(FIRST, 0.92))
    for labels in (
        labels_of((0, 16, 16, 8, 0, 1, 0.4), (0, 24, 16, 8, 0, 2, 0.8)),  # in proportion
        labels_of((0, 16, 16, 8, 0, 1, 0), (0, 24, 16, 8, 0, 1, 1), cls=False),
        labels_of((0, 16, 16, 8, 0, 1, 1), (0, 24, 16, 8, 0, 1, 0), box=False),
    ):
        assert not (abs(Panel(labels).pixels[80:120, 80:160] - 28).max(axis=2) < 5).any()
    nothing = Panel(labels_of((0, 16, 16, 8, 0, 1, 0), (0, 24, 16, 8, 0, 1, 1)))
    assert close(nothing.at(19.9, 19.9), mixed(FIRST, 0.92))


def test_small_cells_are_seen_without_dots():
    """Two pixels of the picture for a cell of 0.4 pixels; less than one pixel is one."""
    panel = Panel(labels_of((0, 16, 16, 0.4, 0, 1, 1), (0, 30, 20, 0.1, 0, 1, 0.1)))
    assert close(panel.at(16, 16), mixed(FIRST, 0.92))
    assert close(panel.at(16.2, 16.2), mixed(FIRST, 0.92))
    assert close(panel.at(16.6, 16), [PALE] * 3)
    assert close(panel.at(30, 20), mixed(FIRST, 0.92))


def test_the_box_alone_gives_the_strength_where_no_class_is_taught():
    labels = labels_of((0, 16, 16, 8, 0, 0, 4), (0, 24, 16, 8, 0, 9, 2), cls=False)
    panel = Panel(labels)
    assert close(panel.at(20, 20), mixed(FIRST, 0.92))
    assert close(panel.at(28, 20), mixed(FIRST, 0.53))


def test_ignored_cells_are_hatched():
    panel = Panel(labels_of(ignored=[(0, 104, 16, 8), (1, 104, 64, 16)]))
    area = panel.pixels[80:120, 520:560]
    lines = hatched(500, 600)[80:120, 520:560]
    assert 0.2 < lines.mean() < 0.4
    assert (abs(area[lines] - (PALE + 0.55 * (28 - PALE))) < 3).all()
    assert (abs(area[~lines] - PALE) < 3).all()
    assert close(panel.at(112, 70), [PALE] * 3)


def test_the_image_is_pale_grey_below():
    image = grey()
    image[62:66, 30:34] = (250, 0, 0)
    pixel = Panel(labels_of(), image=image).at(32, 64)
    assert pixel.max() - pixel.min() < 2
    assert close(pixel, 74.75 + 0.45 * (255 - 74.75))


def test_numbers_of_cells_and_sums_of_weights():
    labels = labels_of((0, 16, 16, 8, 0, 1, 1), (0, 24, 16, 8, 0, 0.25, 1), (0, 72, 64, 8, 1, 1, 1))
    first, second = level_cells(labels, 0).learned
    assert (first, second) == (
        Learned(index=0, cells=2, weight=1.25),
        Learned(index=1, cells=1, weight=1.0),
    )
    assert [_count_text(x) for x in (first, second)] == ["2 (Σ 1.2)", "1"]
    assert _count_text(Learned(index=0, cells=7, weight=31.0)) == "7 (Σ 31)"
    assert level_cells(labels, 1).learned == ()
    many = [Learned(index=index, cells=9, weight=9.0) for index in range(40)]
    colors = [PALETTE[index % 6] for index in range(40)]
    drawn = _counts(many, colors, 400)
    assert drawn.shape == (8 + 25 * 5, 400, 3)  # nine of them have room in a line
    assert (abs(drawn[: 25 + 4, :].astype(int) - PALETTE[0]).max(axis=2) < 5).any()
    assert len(_counts([], [], 400)) == 33


def test_neighbours_have_different_colours():
    rows = [(40.0 * x, 40.0 * y, 40.0 * x + 30, 40.0 * y + 30) for y in range(4) for x in range(4)]
    colors = object_colors(np.array(rows))
    assert len(set(colors[:6])) == 6
    for one in range(16):
        for other in range(one):
            if abs(one % 4 - other % 4) + abs(one // 4 - other // 4) == 1:
                assert colors[one] != colors[other]
    # The seventh gets that of the object farthest away: it is beside the first, at the left.
    line = np.array([(x, 0, x + 9, 9) for x in (0.0, 100, 200, 300, 400, 500, 10)])
    assert object_colors(line)[6] == object_colors(line)[5] == PALETTE[5]
    assert object_colors(np.zeros((0, 4))) == []
    assert object_colors(np.zeros((9, 4)))[:6] == list(PALETTE)


def test_levels_that_nobody_uses_are_left_out():
    first = labels_of((1, 16, 16, 16, 0, 1, 1))
    second = labels_of(ignored=[(2, 96, 64, 32)])
    assert _used_levels([("a", seen(first))]) == [1]
    assert _used_levels([("a", seen(first)), ("b", seen(second))]) == [1, 2]
    assert _used_levels([("a", seen(labels_of()))]) == [0, 1, 2]
    one = draw_assignment(grey(), [("a", seen(first))], NAMES)
    two = draw_assignment(grey(), [("a", seen(first, second))], NAMES)
    assert one.shape[1] == 560 + 18 + 900 + 36  # the head is the widest
    assert two.shape[1] == max(2 * 760 + 18, 560 + 18 + 900) + 36
    assert two.shape[0] > one.shape[0] + 600
    # A model with fewer levels has a shorter row.
    fewer = seen(labels_of((0, 16, 16, 8, 0, 1, 1)), levels=("p3",))
    assert (
        draw_assignment(grey(), [("a", seen(first)), ("b", fewer)], NAMES).shape[1]
        == (two.shape[1])
    )


def test_the_page_names_models_objects_and_who_is_missed():
    labels = labels_of((0, 16, 16, 8, 0, 1.5, 1))
    image = grey()
    before = image.copy()
    page = draw_assignment(image, [("fcos", seen(labels))], NAMES)
    assert (image == before).all()
    assert page.dtype == np.uint8
    other = draw_assignment(image, [("atss", seen(labels))], NAMES)
    different = (page != other).any(axis=(1, 2)).nonzero()[0]
    assert 0 < np.ptp(different) < 30  # the row's title alone
    assert (draw_assignment(image, [("fcos", seen(labels))], ["x", *NAMES]) != page).any()
    assert _row_note(labels, [1]) == "full colour: weight 1.5; learned by no cell: 2"
    assert _row_note(labels_of(), []) == ""
    assert _row_note(labels_of(), range(20)).endswith(": 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, …")


def test_the_legend_explains_what_is_drawn(monkeypatch):
    texts = []
    monkeypatch.setattr(
        "d2_decouple.visualization.assignment.legend",
        lambda rows, width: texts.extend(text for _, text in rows) or grey(10, width),
    )

    def told(*sets, **options):
        texts.clear()
        _legend([("a", seen(*sets, **options))], [0])
        return " ".join(texts)

    plain = told(labels_of((0, 16, 16, 8, 0, 1, 1)))
    assert "a cell that learns the object of its colour" in plain
    assert "no cell of p4, p5 learns" in plain
    assert "dot" not in plain
    assert "ignored" not in plain
    assert "dot" in told(labels_of((0, 16, 16, 8, 0, 1, 1), (0, 24, 16, 8, 0, 1, 0.5)))
    assert "ignored" in told(labels_of(ignored=[(0, 1, 1, 8)]))
    assert told(labels_of(), boxes=(), levels=("p3",)) == ""


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (1500, 2000)])
def test_images_of_any_size(size):
    height, width = size
    labels = labels_of((0, 0, 0, 8, 0, 1, 0.5), (2, -8, -8, 3000, 0, 1, 1), ignored=[(0, 0, 0, 8)])
    context = seen(labels, boxes=((0.0, 0, width, height),), size=size)
    page = draw_assignment(grey(*size), [("n" * 300, context)], ["a very long name " * 9])
    assert 1000 < page.shape[1] < 2000
    assert page.shape[0] < 2500


def test_an_image_without_objects_has_a_page():
    page = draw_assignment(grey(), [("a", seen(labels_of(), boxes=()))], NAMES)
    assert page.shape[1] > 1000


def test_other_images_and_other_objects_are_refused():
    one, other = seen(labels_of()), seen(labels_of(), boxes=BOXES[:1])
    with pytest.raises(ValueError, match=r"a is for an image of .*\(100, 120\), the image has \(9"):
        draw_assignment(grey(9, 9), [("a", one)], NAMES)
    with pytest.raises(ValueError, match="b and a have different objects; give all models the"):
        draw_assignment(grey(), [("a", one), ("b", other)], NAMES)
    with pytest.raises(ValueError, match="nothing to draw; give at least one"):
        draw_assignment(grey(), [], NAMES)
