# SPDX-License-Identifier: Apache-2.0
"""Each point is drawn where it is, in the colours that say what it is."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from d2_decouple.engine.points import DetectionPoints
from d2_decouple.visualization import class_colors, draw_points
from d2_decouple.visualization.canvas import Canvas
from d2_decouple.visualization.point_panel import (
    DOT_COLORS,
    FARTHER,
    LEVEL_COLORS,
    draw_panel,
    level_slices,
    panel_view,
    reading_of,
)
from d2_decouple.visualization.points import _legend_rows

NAMES = ["ant", "bee", "cat"]
OWN, FINER = LEVEL_COLORS[0], LEVEL_COLORS[-1]
CLASS = class_colors(3)[2]
BOX = (20.0, 30.0, 70.0, 60.0)
COARSE = (10.0, 20.0, 80.0, 70.0)
BOUNDARY = ((10.0, 38.0), (35.0, 20.0), (80.0, 50.0), (60.0, 70.0))  # left, top, right, bottom
SHARES = ((0, 1, 0, 0, 0), (0.75, 0.25, 0, 0, 0), (0.25, 0.75, 0, 0, 0), (1, 0, 0, 0, 0))
DOTS = ((24.0, 34.0), (45.0, 34.0), (66.0, 34.0), (24.0, 55.0), (45.0, 55.0))


def seen(size=(100, 120), count=1, **changes):
    """Detections that are all alike, found at the second of five levels."""
    values = {
        "coarse_boxes": COARSE,
        "boundary_points": BOUNDARY,
        "class_points": DOTS,
        "box_level_weights": SHARES,
        "locations": (48.0, 44.0),
        **changes,
    }
    fields = {
        name: torch.tensor([value] * count, dtype=torch.float32)
        for name, value in values.items()
        if value is not None
    }
    box = fields.pop("pred_boxes", torch.tensor([BOX] * count))
    instances = Instances(
        size,
        pred_boxes=Boxes(box),
        scores=torch.linspace(0.9, 0.5, count),
        pred_classes=torch.full((count,), 2),
        levels=torch.ones(count, dtype=torch.int64),
        **fields,
    )
    names = ("p3", "p4", "p5", "p6", "p7")
    return DetectionPoints(instances, names, (8, 16, 32, 64, 128))


def grey(height=100, width=120):
    return np.full((height, width, 3), 128, dtype=np.uint8)


class Panel:
    """A panel of one detection, whose pixels are asked for by places of the image."""

    def __init__(self, points=None, image=None, side=700):
        points = points or seen()
        self.reading = reading_of(points, 0, 3)
        image = grey(*points.instances.image_size) if image is None else image
        self.pixels = draw_panel(image, self.reading, points.level_names, side=side).astype(int)
        self.view = panel_view(self.reading)
        self.zoom = side / (self.view[2] - self.view[0])

    def at(self, x, y, right=0, down=0):
        """The colour at a place of the image, or some pixels of the panel beside it."""
        column = round((x - self.view[0]) * self.zoom + right)
        row = round((y - self.view[1]) * self.zoom + down)
        return self.pixels[row, column]

    def has(self, color):
        return (abs(self.pixels - color).max(axis=2) < 6).any()


def close(pixel, color):
    return abs(np.asarray(pixel) - color).max() < 12


def test_class_points_cell_and_boxes_are_where_they_are():
    panel = Panel()
    for x, y in DOTS:
        assert close(panel.at(x, y), DOT_COLORS[0])
        assert not close(panel.at(x, y, right=20, down=20), DOT_COLORS[0])
    assert close(panel.at(48, 44), (20, 20, 24))
    assert close(panel.at(48, 44, right=6), (20, 20, 24))
    assert not close(panel.at(48, 44, right=6, down=6), (20, 20, 24))
    for x, y in ((20, 55), (60, 30), (70, 35), (30, 60)):
        assert close(panel.at(x, y), CLASS)
        assert not close(panel.at(x, y, right=8, down=8), CLASS)
    for row in (20, 70):
        line = np.array([panel.at(x, row) for x in np.linspace(40, 55, 200)]).max(axis=1)
        assert (line < 130).mean() > 0.4  # dashes
        assert (line > 240).mean() > 0.2  # and white between them


def test_boundary_points_are_cut_by_levels_and_lead_to_their_sides():
    panel = Panel()
    for point, first_quarters in zip(BOUNDARY, (0, 3, 1, 4), strict=True):
        # Clockwise from the top, the finer level first.
        for quarter, (right, down) in enumerate(((4, -4), (4, 4), (-4, 4), (-4, -4))):
            expected = FINER if quarter < first_quarters else OWN
            assert close(panel.at(*point, right=right, down=down), expected)
    # A disc where the own level has the most; the tip of a square reaches farther.
    for point, color in zip(
        BOUNDARY, ((255, 255, 255), FINER, (255, 255, 255), FINER), strict=True
    ):
        assert close(panel.at(*point, right=14.5), color)
    # Halfway on the line from a point to its side, and not beside it.
    for x, y in ((15, 38), (35, 25), (75, 50), (60, 65)):
        assert close(panel.at(x, y), CLASS)
        assert close(panel.at(x, y, right=6, down=6), (153, 153, 153))


@pytest.mark.parametrize(
    ("shares", "level", "slices", "square"),
    [
        ([1, 0, 0], 0, [(1.0, OWN)], False),
        ([0.25, 0.75, 0], 1, [(0.25, FINER), (0.75, OWN)], False),
        ([0.75, 0.25, 0], 1, [(0.75, FINER), (0.25, OWN)], True),
        ([0.25, 0.25, 0.5], 1, [(0.25, FINER), (0.25, OWN), (0.5, LEVEL_COLORS[1])], True),
        ([0, 0, 1], 0, [(1.0, FARTHER)], True),
    ],
)
def test_slices_are_the_shares_of_levels(shares, level, slices, square):
    assert level_slices(np.array(shares, dtype=float), level) == (slices, square)


def test_the_image_behind_the_marks_is_where_it_belongs_and_grey_beyond():
    image = np.zeros((100, 120, 3), np.uint8)
    image[50:52, 30:32] = 255
    panel = Panel(seen(pred_boxes=(-12.0, 30.0, 70.0, 60.0)), image)
    assert (panel.at(31, 51) > 200).all()
    assert (panel.at(34, 51) < 70).all()
    assert (panel.at(31, 48) < 70).all()
    assert close(panel.at(-4, 50), (226, 228, 232))
    assert panel.view[0] < -12


def test_points_far_away_are_arrows_and_do_not_shrink_the_object():
    far = (*DOTS[:4], (9e6, 44.0))
    boundary = ((-4000.0, 44.0), *BOUNDARY[1:])
    panel = Panel(seen(class_points=far, boundary_points=boundary, coarse_boxes=(-1e8, 2, 1e8, 90)))
    width = panel.view[2] - panel.view[0]
    assert width < 3.2 * (BOX[2] - BOX[0])
    assert close(panel.at(panel.view[2], 44, right=-13), DOT_COLORS[0])
    assert close(panel.at(panel.view[0], 44, right=19), OWN)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_left_out(bad):
    points = seen(
        class_points=((bad, 3.0), *DOTS[1:]),
        coarse_boxes=(bad, 0, 1, 1),
        boundary_points=((bad, bad), *BOUNDARY[1:]),
    )
    panel = Panel(points)
    assert panel.reading.dots["class_points"].tolist() == [list(dot) for dot in DOTS[1:]]
    assert panel.reading.other_boxes == {}
    assert not panel.has(OWN)
    assert close(panel.at(*DOTS[1]), DOT_COLORS[0])
    assert draw_points(grey(), points, NAMES).shape[1] > 640


def test_models_with_other_points():
    """Only points that a model has are drawn and explained; kinds differ in colour."""
    nothing = dict.fromkeys(("boundary_points", "class_points", "box_level_weights"))
    points = seen(**nothing, points=DOTS[:2], cls_points=DOTS[3:])
    panel = Panel(points)
    assert close(panel.at(*DOTS[0]), DOT_COLORS[0])
    assert close(panel.at(*DOTS[4]), DOT_COLORS[1])
    assert not panel.has(OWN)
    texts = [text for _, text in _legend_rows([panel.reading])]
    assert texts[-2:] == ["points", "cls points"]
    assert not any("boundary" in text for text in texts)
    texts = [text for _, text in _legend_rows([Panel().reading])]
    assert texts[-1] == "class points: where the class is read"
    levels = [text for text in texts if text.startswith("...")]
    assert levels[0] == "... from the cell's own level"
    assert levels[1] == "... from the next finer level"
    assert len(levels) == 3
    # Without shares a point is read on the level of its cell.
    assert Panel(seen(box_level_weights=None)).has(OWN)
    assert not Panel(seen(box_level_weights=None)).has(FINER)


def test_the_page_shows_the_strongest_and_says_of_how_many():
    image = grey()
    before = image.copy()
    four = draw_points(image, seen(count=9), NAMES)
    assert (image == before).all()
    assert four.dtype == np.uint8
    wide, many = (draw_points(image, seen(count=9), NAMES, limit=n) for n in (2, 9))
    assert four.shape[1] == 18 + 640 + 2 * (18 + 520) + 18
    assert wide.shape[1] == 18 + 640 + 2 * (18 + 720) + 18
    assert four.shape[0] > wide.shape[0]  # two rows
    assert many.shape[1] > four.shape[1]
    alone = draw_points(image, seen(count=1), NAMES, limit=4)
    assert alone.shape[1] < four.shape[1]
    title = draw_points(image, seen(count=2), NAMES, limit=1)[:40, :640]
    assert (title != alone[:40, :640]).any()  # "2 detections, the strongest shown"
    assert (draw_points(image, seen(count=1), [NAMES[0]]) != alone).any()  # "class 2"
    nothing = draw_points(image, seen(count=0), NAMES)
    assert nothing.shape[1] == 640 + 36
    assert (nothing[100:400, 100:400] == 128).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (3000, 4000)])
def test_images_of_any_size(size):
    page = draw_points(grey(*size), seen(size), ["a very long name of a class " * 4] * 3)
    assert 640 < page.shape[1] < 1800
    assert page.shape[0] < 1500


def test_inverted_and_empty_boxes():
    for box in ((70.0, 60.0, 20.0, 30.0), (20.0, 30.0, 20.0, 30.0)):
        assert draw_points(grey(), seen(coarse_boxes=box), NAMES).shape[1] > 640
    flat = Panel(seen(pred_boxes=(20.0, 30.0, 20.0, 30.0)))
    assert flat.view[2] - flat.view[0] >= 8


def test_points_of_another_image_are_refused():
    with pytest.raises(
        ValueError, match=r"of height and width \(100, 120\), the image has \(9, 9\)"
    ):
        draw_points(grey(9, 9), seen(), NAMES)


def test_marks_become_larger_with_the_pen():
    areas = []
    for pen in (1.0, 2.0):
        canvas = Canvas(grey(60, 60), (0, 0, 60, 60), (120, 120), pen=pen)
        canvas.dot((30, 30), 6, (255, 0, 0))
        areas.append((canvas.pixels()[..., 0] > 200).sum())
    assert 3 < areas[1] / areas[0] < 6
