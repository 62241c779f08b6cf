# SPDX-License-Identifier: Apache-2.0
"""What FCOS's assignment may not cost: waiting for the device, loops, memory."""

import math
from typing import Any

import pytest
import torch
from detectron2.structures import Boxes, Instances
from test_fcos_assigner import (
    STRIDES,
    K,
    Sizes,
    assign,
    blank_predictions,
    instances,
    pyramid_sizes,
    random_boxes,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from util import growth_in_child

from d2_decouple.modeling import FCOSAssigner


class Recorder(TorchDispatchMode):
    """Names of all operators, and which of them make the host wait for the device."""

    WAITING = (
        *("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select"),
        *("_unique", "unique", "repeat_interleave.Tensor", "bincount"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        self.names.append(name)
        if name.startswith(tuple(f"{x}." for x in self.WAITING)) or name in self.WAITING:
            self.waits.append(name)
        if name.startswith("index") and self.has_mask(args):
            self.waits.append(f"{name} with a mask")
        kwargs = kwargs or {}
        if name == "_to_copy.default" and not kwargs.get("non_blocking"):
            source, target = args[0].device, torch.device(kwargs.get("device") or args[0].device)
            if source.type != target.type:
                self.waits.append(f"{name}, {source} to {target}, {tuple(args[0].shape)}")
        return func(*args, **kwargs)

    @staticmethod
    def has_mask(args: Any) -> bool:
        indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else []
        return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices)


def busy_scene() -> tuple[FCOSAssigner, Sizes, list[Instances]]:
    boxes = random_boxes(torch.Generator().manual_seed(3), 96, 128)
    truth = [instances(boxes, torch.zeros(len(boxes))), instances([], [])]
    ranges = [(0, 64), (64, 128), (128, 256), (256, 512), (512, math.inf)]
    return FCOSAssigner(num_classes=K, size_ranges=ranges), pyramid_sizes(96, 128, STRIDES), truth


def test_recorder_notices() -> None:
    x = torch.arange(4.0)
    with Recorder() as recorder:
        x.sum().item()
        x[x > 1]
        x.nonzero()
    assert len(recorder.waits) >= 3


def test_asks_the_device_for_nothing() -> None:
    assigner, sizes, truth = busy_scene()
    with Recorder() as recorder:
        targets = assign(assigner, sizes, STRIDES, truth)
    assert len(recorder.names) > 20
    assert recorder.waits == []
    assert (targets.labels < K).any()


def test_work_does_not_loop_over_boxes_or_images() -> None:
    sizes = pyramid_sizes(96, 128, STRIDES)
    counts = []
    for boxes, images in ((2, 1), (50, 1), (50, 8)):
        one = instances([[10.0, 10.0, 60.0, 60.0]] * boxes, [0] * boxes)
        predictions = blank_predictions(sizes, STRIDES, images)
        features = [torch.zeros(images, 0, *size) for size in sizes]
        with Recorder() as recorder:
            FCOSAssigner(num_classes=K)(features, predictions, [one] * images)
        counts.append(len(recorder.names))
    assert counts[0] == counts[1]
    assert counts[2] <= counts[1] + 7  # one to number the boxes of each further image


def test_sends_nothing_to_the_device_while_waiting_for_it() -> None:
    """A tensor made from Python numbers on a GPU waits until the GPU has finished everything
    before it; here on pretended CUDA tensors.
    """
    assigner, sizes, truth = busy_scene()
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            predictions = blank_predictions(sizes, STRIDES, 2, device="cuda")
        except (RuntimeError, AssertionError) as error:
            pytest.skip(f"this torch cannot pretend CUDA tensors: {error}")
        features = [torch.zeros(2, 0, *size, device="cuda") for size in sizes]
        there = [
            Instances(
                (0, 0),
                gt_boxes=Boxes(torch.zeros(len(x), 4, device="cuda")),
                gt_classes=torch.zeros(len(x), dtype=torch.int64, device="cuda"),
            )
            for x in truth
        ]
        with Recorder() as recorder:
            targets = assigner(features, predictions, there)
    assert targets.labels.device.type == "cuda"
    assert recorder.waits == []


MEMORY_SCRIPT = """
import json, resource, sys
import torch
from detectron2.structures import Boxes, Instances
from d2_decouple.layers.points import make_grid, squares
from d2_decouple.modeling import FCOSAssigner
from d2_decouple.structures import DensePredictions

def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

sizes = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
grid = make_grid(sizes, [8, 16, 32, 64, 128], 0.5, device=torch.device("cpu"), dtype=torch.float32)
count = len(grid.locations)
predictions = DensePredictions(
    torch.zeros(1, count, 4), torch.zeros(1, count, 4), None, grid.locations, grid.strides,
    squares(grid.locations, grid.strides), grid.level_sizes, {},
)
features = [torch.zeros(1, 0, *size) for size in sizes]
base, growth = peak(), {}
for boxes in (1, 10, 100, 1000):
    corner = torch.rand(boxes, 2) * torch.tensor([1300.0, 760.0])
    truth = Instances((800, 1344), gt_classes=torch.zeros(boxes, dtype=torch.int64))
    truth.gt_boxes = Boxes(torch.cat((corner, corner + torch.rand(boxes, 2) * 600), -1))
    FCOSAssigner(num_classes=4)(features, predictions, [truth])
    growth[boxes] = peak() - base
print(json.dumps(growth))
"""


def test_memory_of_many_boxes() -> None:
    """1,000 boxes on 800x1344: boxes times cells would be 341 MiB for four float32 distances."""
    growth = growth_in_child(MEMORY_SCRIPT)
    assert list(growth) == ["1", "10", "100", "1000"]
    assert max(growth.values()) < 64, growth
