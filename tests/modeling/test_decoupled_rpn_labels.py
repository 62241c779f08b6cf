# SPDX-License-Identifier: Apache-2.0
"""Which anchors Decoupled R-CNN's RPN learns from: as Detectron2 says, in bounded memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances
from test_decoupled_rpn import SIZES, detectron2s, rpn_of
from torch import Tensor
from util import growth_in_child

from d2_decouple.modeling import DecoupledRPN


def anchors_of(rpn: DecoupledRPN) -> list[Boxes]:
    maps = [torch.zeros(2, 1, 128 // stride, 160 // stride) for stride in (4, 8, 16, 32, 64)]
    found: list[Boxes] = rpn.anchor_generator(maps)
    return found


def truth_of(counts: tuple[int, int]) -> list[Instances]:
    """Objects of 2 to 60 pixels; with several, two are alike, and one is an anchor."""
    found = []
    for count, (height, width) in zip(counts, SIZES, strict=True):
        corner = torch.rand(count, 2) * torch.tensor([width - 10.0, height - 10.0])
        boxes = torch.cat((corner, corner + 2 + 58 * torch.rand(count, 2)), 1)
        if count > 3:
            boxes[1] = boxes[0]
            boxes[2] = torch.tensor([16.0, 16.0, 48.0, 48.0])
        found.append(Instances((height, width), gt_boxes=Boxes(boxes)))
    return found


@pytest.mark.parametrize("counts", [(12, 40), (1, 0), (0, 0)])
@pytest.mark.parametrize("boundary", [-1.0, 0.0])
@pytest.mark.parametrize(
    "matcher",
    [
        Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        Matcher([0.3, 0.7], [0, -1, 1]),
        Matcher([0.4], [-1, 1], allow_low_quality_matches=True),
    ],
    ids=["usual", "overlap alone", "ignored"],
)
def test_labels_are_detectron2s(
    counts: tuple[int, int], boundary: float, matcher: Matcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = rpn_of(anchor_matcher=matcher, anchor_boundary_thresh=boundary)
    theirs = detectron2s(ours)
    theirs.anchor_matcher, theirs.anchor_boundary_thresh = matcher, boundary
    for rpn in (ours, theirs):
        monkeypatch.setattr(rpn, "_subsample_labels", lambda labels: labels)
    anchors, truth = anchors_of(ours), truth_of(counts)
    found = list(zip(*ours.label_and_sample_anchors(anchors, truth), strict=True))
    wanted = list(zip(*theirs.label_and_sample_anchors(anchors, truth), strict=True))
    assert len(found) == len(wanted) == 2
    positives = 0
    for (label, boxes), (wanted_label, wanted_boxes) in zip(found, wanted, strict=True):
        assert label.dtype == wanted_label.dtype
        assert torch.equal(label, wanted_label)
        assert boxes.shape == wanted_boxes.shape
        assert torch.equal(boxes[label == 1], wanted_boxes[label == 1])
        positives += int((label == 1).sum())
    assert positives > 0 or counts != (12, 40)


def test_as_many_are_sampled_as_were_asked_for() -> None:
    rpn = rpn_of(batch_size_per_image=10, positive_fraction=0.3)
    labels, _ = rpn.label_and_sample_anchors(anchors_of(rpn), truth_of((12, 40)))
    for label in labels:
        assert ((label == 1).sum(), (label == 0).sum()) == (3, 7)
        assert (label == -1).sum() == len(label) - 10


def test_an_object_without_an_area_is_nobodys() -> None:
    """With Detectron2's matcher all anchors are its best ones, and so positives."""
    rpn = rpn_of()
    flat = Instances(SIZES[0], gt_boxes=Boxes(torch.tensor([[30.0, 20.0, 30.0, 60.0]])))
    labels, _ = rpn.label_and_sample_anchors(anchors_of(rpn), [flat])
    assert (labels[0] == 1).sum() == 0
    assert (labels[0] == 0).sum() == rpn.batch_size_per_image


class OwnMatcher(Matcher):
    """A matcher of one's own may derive from Detectron2's."""

    def __init__(self, match: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__([0.3, 0.7], [0, -1, 1])
        self.match = match

    def __call__(self, overlaps: Tensor) -> tuple[Tensor, Tensor]:
        return self.match(overlaps)


@pytest.mark.parametrize("kind", [OwnMatcher, lambda match: match])
def test_a_matcher_of_ones_own_is_asked(kind: Any) -> None:
    asked = []

    def first_alone(overlaps: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(overlaps.shape)
        labels = torch.zeros(overlaps.shape[1], dtype=torch.int8)
        labels[0] = 1
        return torch.zeros(overlaps.shape[1], dtype=torch.long), labels

    rpn = rpn_of(anchor_matcher=kind(first_alone))
    anchors = anchors_of(rpn)
    labels, _ = rpn.label_and_sample_anchors(anchors, truth_of((12, 40)))
    assert asked == [(12, sum(map(len, anchors))), (40, sum(map(len, anchors)))]
    assert [x.nonzero()[0].item() for x in (label == 1 for label in labels)] == [0, 0]


MEMORY_SCRIPT = """
import json, resource, sys
sys.path[:0] = sys.argv[1:]
import torch
from detectron2.structures import Boxes, Instances
from test_decoupled_rpn import rpn_of

def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

rpn = rpn_of()
sizes = [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]
anchors = rpn.anchor_generator([torch.zeros(1, 1, *size) for size in sizes])
base, growth = peak(), {}
for count in (1, 100, 1000):
    corner = torch.rand(count, 2) * torch.tensor([1300.0, 760.0])
    boxes = torch.cat((corner, corner + 1 + torch.rand(count, 2) * 600), -1)
    rpn.label_and_sample_anchors(anchors, [Instances((800, 1344), gt_boxes=Boxes(boxes))])
    growth[count] = peak() - base
print(json.dumps(growth))
"""


def test_memory_of_many_boxes() -> None:
    """1,000 boxes and 268,569 anchors: their overlaps alone would be a gibibyte."""
    growth = growth_in_child(MEMORY_SCRIPT)
    assert list(growth) == ["1", "100", "1000"]
    assert growth["1000"] < 256, growth  # MiB
    assert growth["1000"] < growth["100"] + 64, growth
