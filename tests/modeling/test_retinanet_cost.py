# SPDX-License-Identifier: Apache-2.0
"""What RetinaNet's assignment may not cost: waiting for the device, loops over boxes, memory."""

import pytest
import torch
from detectron2.structures import Boxes, Instances
from test_fcos_assigner import instances
from test_fcos_assigner_cost import Recorder
from torch._subclasses.fake_tensor import FakeTensorMode
from util import growth_in_child

from d2_decouple.layers.points import make_grid
from d2_decouple.modeling import matching
from d2_decouple.modeling.matching import best_overlaps
from d2_decouple.modeling.retinanet import RetinaNetAssigner, RetinaNetPredictor

SIZES = [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]
STRIDES = [8, 16, 32, 64, 128]


def scene(count):
    """Features and predictions of an image of 96 x 128 pixels, and ``count`` boxes in it."""
    grid = make_grid(SIZES, STRIDES, 0.0, device=torch.device("cpu"), dtype=torch.float32)
    maps, features = ([torch.zeros(2, n, *size) for size in SIZES] for n in (27, 1))
    predictor = RetinaNetPredictor(num_classes=3, in_channels=1)
    corner = torch.rand(count, 2) * 90
    boxes = torch.cat((corner, corner + 1 + 60 * torch.rand(count, 2) ** 2), -1)
    truth = [instances(boxes, torch.zeros(count)), instances([], [])]
    return features, predictor(maps, features, grid), truth


def test_asks_the_device_for_nothing():
    features, predictions, truth = scene(50)
    with Recorder() as recorder:
        targets = RetinaNetAssigner(num_classes=3)(features, predictions, truth)
    assert len(recorder.names) > 20
    assert recorder.waits == []
    assert (targets.labels == 0).any()


def test_sends_nothing_to_the_device_while_waiting_for_it():
    """Here on pretended CUDA tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        features, predictions, truth = scene(5)
        try:
            features = [torch.zeros(2, 1, *size, device="cuda") for size in SIZES]
            predictions = predictions._replace(
                **{
                    name: getattr(predictions, name).to("cuda")
                    for name in ("logits", "boxes", "locations", "strides", "priors")
                }
            )
        except (RuntimeError, AssertionError) as error:
            pytest.skip(f"this torch cannot pretend CUDA tensors: {error}")
        there = [
            Instances(
                x.image_size,
                gt_boxes=Boxes(torch.zeros(len(x), 4, device="cuda")),
                gt_classes=torch.zeros(len(x), dtype=torch.int64, device="cuda"),
            )
            for x in truth
        ]
        with Recorder() as recorder:
            targets = RetinaNetAssigner(num_classes=3)(features, predictions, there)
    assert targets.labels.device.type == "cuda"
    assert recorder.waits == []


def test_work_does_not_loop_over_boxes():
    counts = []
    for boxes in (2, 50, 400):
        features, predictions, truth = scene(boxes)
        with Recorder() as recorder:
            RetinaNetAssigner(num_classes=3)(features, predictions, truth)
        counts.append(len(recorder.names))
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("pairs", [1, 7 * 2000, 2**30])
def test_pieces_change_nothing(pairs, monkeypatch):
    """One object at a time, some at a time, or all; also where overlaps are equal."""
    _, predictions, truth = scene(40)
    boxes = truth[0].gt_boxes.tensor
    boxes = torch.cat((boxes, boxes[:5], predictions.priors[100:103]))
    whole = best_overlaps(predictions.priors, boxes)
    monkeypatch.setattr(matching, "_PAIRS", pairs)
    pieces = best_overlaps(predictions.priors, boxes)
    for one, other in zip(whole, pieces, strict=True):
        assert torch.equal(one, other)
    assert (whole.top_overlap > 0).sum() >= 40
    assert (whole.overlap >= whole.top_overlap).all()


MEMORY_SCRIPT = """
import json, resource, sys, time
import torch
from detectron2.structures import Boxes, Instances
from d2_decouple.layers.points import make_grid
from d2_decouple.modeling.retinanet import RetinaNetAssigner, RetinaNetPredictor

def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

strides = [8, 16, 32, 64, 128]
sizes = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
grid = make_grid(sizes, strides, 0.0, device=torch.device("cpu"), dtype=torch.float32)
maps, features = ([torch.zeros(1, c, *size) for size in sizes] for c in (9, 1))
with torch.no_grad():
    predictions = RetinaNetPredictor(num_classes=1, in_channels=1)(maps, features, grid)
base, growth = peak(), {}
for boxes in (1, 100, 1000):
    corner = torch.rand(boxes, 2) * torch.tensor([1300.0, 760.0])
    truth = Instances((800, 1344), gt_classes=torch.zeros(boxes, dtype=torch.int64))
    truth.gt_boxes = Boxes(torch.cat((corner, corner + 1 + torch.rand(boxes, 2) * 600), -1))
    RetinaNetAssigner(num_classes=1)(features, predictions, [truth])
    growth[boxes] = peak() - base
print(json.dumps(growth))
"""


def test_memory_of_many_boxes():
    """1,000 boxes and 201,600 anchors: their overlaps alone would be 769 MiB."""
    growth = growth_in_child(MEMORY_SCRIPT)
    assert list(growth) == ["1", "100", "1000"]
    assert growth["1000"] < 256, growth  # MiB
    assert growth["1000"] < growth["100"] + 64, growth
