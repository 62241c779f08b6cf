# SPDX-License-Identifier: Apache-2.0
"""What AutoAssign's assignment may not cost: waiting for the device, loops over boxes, memory."""

import pytest
import torch
from detectron2.structures import Boxes, Instances
from test_autoassign import TERMS, K, predict
from test_fcos_assigner import instances
from test_fcos_assigner_cost import Recorder
from torch._subclasses.fake_tensor import FakeTensorMode
from util import growth_in_child

from d2_decouple.modeling import matching
from d2_decouple.modeling.autoassign import AutoAssignAssigner


def scene(count):
    corner = torch.rand(count, 2) * 40
    boxes = torch.cat((corner, corner + 1 + 20 * torch.rand(count, 2)), 1)
    return predict(2), [instances(boxes, torch.randint(K, (count,))), instances([], [])]


def test_asks_the_device_for_nothing():
    predictions, truth = scene(50)
    assigner = AutoAssignAssigner(num_classes=K)
    with Recorder() as recorder:
        targets = assigner([], predictions, truth)
        losses = [term(predictions, targets) for term in TERMS]
    assert len(recorder.names) > 20
    assert recorder.waits == []
    assert all(loss > 0 for loss in losses)


def test_sends_nothing_to_the_device_while_waiting_for_it():
    """Here on pretended CUDA tensors."""
    predictions, truth = scene(5)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        try:
            fields = ("logits", "boxes", "quality", "locations", "strides", "priors")
            predictions = predictions._replace(
                **{name: getattr(predictions, name).to("cuda") for name in fields}
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
        assigner = AutoAssignAssigner(num_classes=K)
        prior = assigner.center_prior
        for name in ("mean", "sigma"):
            fake = mode.from_tensor(getattr(prior, name).data).to("cuda")
            del prior._parameters[name]
            setattr(prior, name, fake)
        with Recorder() as recorder:
            targets = assigner([], predictions, there)
            losses = [term(predictions, targets) for term in TERMS]
    assert {x.device.type for x in (*losses, targets.labels)} == {"cuda"}
    assert recorder.waits == []


def test_work_does_not_loop_over_boxes():
    counts = []
    for boxes in (2, 50, 1000):
        predictions, truth = scene(boxes)
        assigner = AutoAssignAssigner(num_classes=K)
        with Recorder() as recorder:
            targets = assigner([], predictions, truth)
            for term in TERMS:
                term(predictions, targets)
        counts.append(len(recorder.names))
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("pairs", [1, 7 * 80])
def test_pieces_change_nothing(pairs, monkeypatch):
    predictions, truth = scene(30)
    assigner = AutoAssignAssigner(num_classes=K)
    whole = assigner([], predictions, truth)
    monkeypatch.setattr(matching, "_PAIRS", pairs)
    pieces = assigner([], predictions, truth)
    assert torch.equal(pieces.cls_weights, whole.cls_weights)
    assert torch.equal(pieces.labels, whole.labels)
    for term in TERMS:
        assert torch.equal(term(predictions, pieces), term(predictions, whole))


MEMORY_SCRIPT = """
import json, resource, sys
sys.path[:0] = sys.argv[1:]
import torch
from detectron2.structures import Boxes, Instances
from test_autoassign import TERMS, predict
from d2_decouple.modeling.autoassign import AutoAssignAssigner

def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

strides = [8, 16, 32, 64, 128]
sizes = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
predictions = predict(1, sizes=sizes, strides=strides)
leaves = [x.clone().requires_grad_() for x in (predictions.logits, predictions.boxes)]
predictions = predictions._replace(logits=leaves[0], boxes=leaves[1])
base, growth = peak(), {}
for boxes in (1, 1000):
    corner = torch.rand(boxes, 2) * torch.tensor([1300.0, 760.0])
    truth = Instances((800, 1344), gt_classes=torch.zeros(boxes, dtype=torch.int64))
    truth.gt_boxes = Boxes(torch.cat((corner, corner + 1 + torch.rand(boxes, 2) * 600), -1))
    targets = AutoAssignAssigner(num_classes=3)([], predictions, [truth])
    sum(term(predictions, targets) for term in TERMS).backward()
    growth[boxes] = peak() - base
print(json.dumps(growth))
"""


def test_memory_of_many_boxes():
    """1,000 boxes on 800x1344, the losses and their gradients included."""
    growth = growth_in_child(MEMORY_SCRIPT)
    assert list(growth) == ["1", "1000"]
    assert growth["1000"] < 768, growth  # MiB
