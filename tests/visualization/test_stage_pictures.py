# SPDX-License-Identifier: Apache-2.0
"""Boxes, bars and proposals are drawn where they are, in the manner of their stage."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from d2_decouple.engine.stages import DetectionStages, Proposals
from d2_decouple.visualization import class_colors, draw_stages
from d2_decouple.visualization.canvas import BLACK, square_around
from d2_decouple.visualization.stage_panel import (
    course_of,
    draw_course,
    draw_density,
    stage_colors,
)
from d2_decouple.visualization.stages import _legend_rows

NAMES = ["ant", "bee", "cat"]
CLASS = class_colors(3)[2]
LIGHT, MIDDLE, DARK = stage_colors(3)
BOXES = (  # the proposal, and after three stages
    (10.0, 20.0, 80.0, 70.0),
    (13.0, 23.0, 76.0, 67.0),
    (16.0, 26.0, 73.0, 64.0),
    (20.0, 30.0, 70.0, 60.0),
)
TRUTH = (22.0, 32.0, 72.0, 62.0)
IOUS = (0.25, 0.5, 0.75, 1.0)
NEAR, FAR = (22.0, 30.0, 70.0, 62.0), (90.0, 5.0, 110.0, 25.0)


def seen(size=(100, 120), count=1, boxes=BOXES, ious=IOUS, gt_boxes=None, **changes):
    """Detections that are all alike, with one proposal for classes and three for boxes."""
    stages = torch.tensor([boxes] * count).reshape(count, len(boxes), 4)
    fields = {
        "pred_boxes": Boxes(stages[:, -1].clone()),
        "scores": torch.linspace(0.9, 0.5, count),
        "pred_classes": torch.full((count,), 2),
        "proposal_index": torch.zeros(count, dtype=torch.int64),
        "stage_boxes": stages,
        "stage_ious": torch.tensor([ious] * count).reshape(count, len(ious)),
        "near_proposals": torch.tensor([[1, 2]] * count).reshape(count, 2),
        **changes,
    }
    if gt_boxes is not None:
        gt_boxes = torch.tensor(gt_boxes).reshape(-1, 4)
        fields.setdefault("gt_index", torch.full((count,), len(gt_boxes) - 1))
    return DetectionStages(
        Instances(size, **fields),
        class_proposals=proposals([NEAR]),
        box_proposals=proposals([NEAR, BOXES[-1], FAR]),
        gt_boxes=gt_boxes,
    )


def proposals(boxes):
    boxes = torch.tensor(boxes).reshape(-1, 4)
    return Proposals(boxes, torch.zeros(len(boxes)), nms_thresh=0.7, survivors=9)


def grey(height=100, width=120):
    return np.full((height, width, 3), 128, dtype=np.uint8)


class Panel:
    """A panel of one detection, whose pixels are asked for by places of the image."""

    def __init__(self, stages=None, side=700):
        stages = stages or seen()
        course = course_of(stages, 0, 3)
        drawn = draw_course(grey(*stages.instances.image_size), course, side=side)
        self.pixels, self.bars = drawn[:side].astype(int), drawn[side:].astype(int)
        corners = [corner for box in course.boxes for corner in (box[:2], box[2:])]
        self.view = square_around(course.boxes[-1], np.array(corners))
        self.zoom = side / (self.view[2] - self.view[0])

    def at(self, x, y, right=0, down=0):
        """The colour at a place of the image, or some pixels of the panel beside it."""
        column = round((x - self.view[0]) * self.zoom + right)
        row = round((y - self.view[1]) * self.zoom + down)
        return self.pixels[row, column]

    def near(self, x, y, color, reach=1):
        """Whether a colour is found at a place of the image, or so many pixels around it."""
        steps = range(-reach, reach + 1)
        return any(close(self.at(x, y, right, down), color) for right in steps for down in steps)


def close(pixel, color):
    return abs(np.asarray(pixel) - color).max() < 12


def test_each_stage_has_its_box_in_its_colour():
    panel = Panel()
    for box, color in zip(BOXES[1:], (LIGHT, MIDDLE, DARK), strict=True):
        x1, y1, x2, y2 = box
        for x, y in ((x1, 45), (45, y1), (x2, 45), (45, y2)):
            assert panel.near(x, y, color)
            assert not close(panel.at(x, y, right=9, down=9), color)
    line = np.array([panel.at(x, 20) for x in np.linspace(30, 60, 300)]).max(axis=1)
    assert (line < 130).mean() > 0.4  # the proposal is dashed
    assert (line > 240).mean() > 0.2  # and white between
    widths = [
        sum(close(panel.at(x1, 45, right=step), color) for step in range(-6, 7))
        for (x1, *_), color in zip(BOXES[1:], (LIGHT, MIDDLE, DARK), strict=True)
    ]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


def test_an_object_is_a_band_below_the_boxes():
    panel = Panel(seen(gt_boxes=[TRUTH]))
    assert close(panel.at(45, 32), (70, 215, 240))
    assert close(panel.at(72, 45, right=3), (70, 215, 240))
    assert close(panel.at(45, 30), DARK)
    same = Panel(seen(gt_boxes=[BOXES[-1]]))
    assert close(same.at(45, 30), DARK)
    assert same.near(45, 30, (70, 215, 240), reach=6)  # seen where both agree
    unknown = Panel(seen(gt_boxes=[TRUTH], gt_index=torch.tensor([-1])))
    assert not close(unknown.at(45, 32), (70, 215, 240))


def test_bars_are_as_long_as_the_overlaps():
    bars = Panel().bars
    colors = (BLACK, LIGHT, MIDDLE, DARK)
    lengths = []
    for row, color in enumerate(colors):
        line = bars[round(8 + (row + 0.5) * 25), 120:650]
        lengths.append(sum(close(pixel, color) for pixel in line))
    assert lengths == sorted(lengths)
    assert np.diff(lengths) == pytest.approx([lengths[-1] / 4] * 3, rel=0.05)
    nothing = Panel(seen(ious=(0.0, 0.0, 0.0, 0.0))).bars
    assert not any(close(pixel, DARK) for pixel in nothing[96, 120:640])


def test_colours_of_stages_become_darker():
    for count in (1, 2, 3, 7):
        colors = stage_colors(count)
        assert len(set(colors)) == count
        brightness = [0.299 * red + 0.587 * green + 0.114 * blue for red, green, blue in colors]
        assert brightness == sorted(brightness, reverse=True)
        assert colors[-1] == DARK


def test_proposals_near_a_detection_are_coloured_and_others_faint():
    stages = seen()
    course = course_of(stages, 0, 3)
    boxes = stages.box_proposals.boxes.numpy()
    owners = stages.owners(1)[1].numpy()
    assert owners.tolist() == [0, 0, -1]
    pixels = draw_density(grey(), boxes, owners, [course], ["1 cat: 2"], side=600).astype(int)
    assert pixels.shape == (500, 600, 3)
    ground = pixels[400, 50]
    assert close(pixels[225, 100], CLASS)  # the detection's left side
    near = pixels[225, 110] - ground  # a proposal's
    assert near[0] > 0
    assert near.min() < -20
    far = pixels[75, 450] - ground
    assert far.max() <= 0
    assert -30 < far.min() < -2
    assert (pixels[225, 130] == ground).all()


def test_the_page_shows_both_densities_and_the_strongest():
    image = grey()
    before = image.copy()
    pages = {n: draw_stages(image, seen(count=9), NAMES, limit=n) for n in (1, 2, 3, 4, 5)}
    assert (image == before).all()
    assert all(page.dtype == np.uint8 for page in pages.values())
    assert pages[1].shape[1] == 18 + 2 * 570 + 18 + 18
    assert {pages[n].shape[1] for n in (2, 3, 4, 5)} == {1746 + 36}
    assert pages[4].shape[0] < pages[3].shape[0] < pages[5].shape[0]
    assert (pages[4][:500, :570] != pages[4][:500, 588:1158]).any()
    alone = draw_stages(image, seen(count=1), NAMES, limit=4)
    assert alone.shape == pages[1].shape
    assert (alone != pages[1]).any()  # "1 detection"; "9 detections, the strongest shown"
    assert (draw_stages(image, seen(count=1), [NAMES[0]]) != alone).any()  # "class 2"
    nothing = draw_stages(image, seen(count=0), NAMES)
    assert nothing.shape[1] == 1746 + 36
    assert nothing.shape[0] < pages[4].shape[0]


def test_the_legend_explains_what_occurs():
    def texts(stages):
        courses = [course_of(stages, index, 3) for index in range(len(stages.instances))]
        return [text for _, text in _legend_rows(stages, courses)]

    plain, known = texts(seen()), texts(seen(gt_boxes=[TRUTH]))
    assert plain[0] == "proposals near a detection (IoU from 0.5), counted"
    assert plain[-1] == "IoU with the last box"
    assert known[0] == "proposals near an object (IoU from 0.5), counted"
    assert known[-1] == "IoU with the object"
    assert set(known) - set(plain) == {"the object itself", known[0], known[-1]}
    one = texts(seen(boxes=BOXES[:2], ious=IOUS[:2]))
    assert "box after the only stage" in one
    assert texts(seen(count=0)) == []


@pytest.mark.parametrize("stages", [1, 2, 6])
def test_any_number_of_stages(stages):
    boxes, ious = [BOXES[0], *BOXES[-1:] * stages], [0.5] * (stages + 1)
    page = draw_stages(grey(), seen(boxes=boxes, ious=ious, gt_boxes=[TRUTH]), NAMES)
    assert page.shape[1] == 2 * 570 + 54


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (3000, 4000)])
def test_images_of_any_size(size):
    page = draw_stages(grey(*size), seen(size, gt_boxes=[]), ["a very long name " * 9] * 3)
    assert page.shape[1] == 2 * 570 + 54
    assert page.shape[0] < 1500


def test_empty_boxes_and_no_proposals():
    flat = (20.0, 30.0, 20.0, 30.0)
    stages = seen(boxes=(flat,) * 4)
    nothing = proposals([])
    assert draw_stages(grey(), stages._replace(box_proposals=nothing), NAMES).shape[1] > 640
    assert draw_stages(grey(), seen(count=0)._replace(class_proposals=nothing), NAMES).any()


def test_stages_of_another_image_are_refused():
    with pytest.raises(
        ValueError, match=r"of height and width \(100, 120\), the image has \(9, 9\)"
    ):
        draw_stages(grey(9, 9), seen(), NAMES)
