# SPDX-License-Identifier: Apache-2.0
"""What PDNet's assignment may not cost: waiting for the device, loops over boxes, memory."""

import pytest
import torch
from detectron2.structures import Boxes, Instances
from pdnet_scenes import K, assign, instances, level_sizes, predictions_of
from test_fcos_assigner_cost import Recorder
from torch._subclasses.fake_tensor import FakeTensorMode
from util import growth_in_child

from d2_decouple.modeling import PDNetAssigner, coarse_targets

PADDED = (96, 128)


def busy_scene() -> list[Instances]:
    corner = torch.rand(150, 2) * 90
    boxes = torch.cat((corner, corner + 2 + 60 * torch.rand(150, 2)), -1)
    return [instances(PADDED, boxes.tolist()), instances((64, 100), [])]


def test_asks_the_device_for_nothing() -> None:
    truth = busy_scene()
    with Recorder() as recorder:
        targets = assign(PADDED, truth)
    assert len(recorder.names) > 20
    assert recorder.waits == []
    for part in (targets, coarse_targets(targets)):
        assert (part.labels == 0).any()


def test_work_does_not_loop_over_boxes() -> None:
    """Ground truth is compared in large pieces, to bound memory: 1,000 boxes are a few pieces."""
    counts = {}
    for boxes in (2, 50, 1000):
        truth = [instances(PADDED, [[10.0, 10.0, 60.0, 60.0]] * boxes)]
        with Recorder() as recorder:
            assign(PADDED, truth)
        counts[boxes] = len(recorder.names)
    assert counts[2] == counts[50]
    assert counts[1000] < 6 * counts[50]


def test_sends_nothing_to_the_device_while_waiting_for_it() -> None:
    """A tensor made from Python numbers on a GPU waits until the GPU has finished everything
    before it; here on pretended CUDA tensors.
    """
    truth = busy_scene()
    with FakeTensorMode(allow_non_fake_inputs=True):
        predictions = predictions_of(PADDED, images=2)
        try:
            predictions = predictions._replace(
                **{
                    name: getattr(predictions, name).to("cuda")
                    for name in ("logits", "boxes", "locations", "strides", "priors")
                },
                extras={"coarse_boxes": predictions.extras["coarse_boxes"].to("cuda")},
            )
        except (RuntimeError, AssertionError) as error:
            pytest.skip(f"this torch cannot pretend CUDA tensors: {error}")
        features = [torch.zeros(2, 0, *size, device="cuda") for size in level_sizes(PADDED)]
        there = [
            Instances(
                x.image_size,
                gt_boxes=Boxes(torch.zeros(len(x), 4, device="cuda")),
                gt_classes=torch.zeros(len(x), dtype=torch.int64, device="cuda"),
            )
            for x in truth
        ]
        with Recorder() as recorder:
            targets = PDNetAssigner(num_classes=K)(features, predictions, there)
    for part in (targets, coarse_targets(targets)):
        assert part.labels.device.type == part.boxes.device.type == "cuda"
    assert recorder.waits == []


MEMORY_SCRIPT = """
import json, resource, sys
sys.path[:0] = sys.argv[1:]
import torch
from pdnet_scenes import instances, level_sizes, predictions_of
from d2_decouple.modeling import PDNetAssigner

def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

size = (800, 1344)
predictions = predictions_of(size)
features = [torch.zeros(1, 0, *x) for x in level_sizes(size)]
base, growth = peak(), {}
for boxes in (1, 1000):
    corner = torch.rand(boxes, 2) * torch.tensor([1300.0, 760.0])
    truth = instances(size, torch.cat((corner, corner + torch.rand(boxes, 2) * 600), -1).tolist())
    PDNetAssigner(num_classes=4)(features, predictions, [truth])
    growth[boxes] = peak() - base
print(json.dumps(growth))
"""


def test_memory_of_many_boxes() -> None:
    """1,000 boxes on 800x1344: the overlaps alone would be 85 MiB, and steps to them as much."""
    growth = growth_in_child(MEMORY_SCRIPT)
    assert list(growth) == ["1", "1000"]
    assert max(growth.values()) < 128, growth  # MiB
