# SPDX-License-Identifier: Apache-2.0
"""What each slot of a detector costs: parameters, multiply-adds, time and memory of one image."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..layers.precision import at_least_float32
from ..modeling import OneStageDetector

__all__ = ["DEFORMABLE", "WHOLE", "SlotCost", "slot_costs", "slots_of"]

WHOLE = "forward"
"""The row of everything from the image to the predictions (of two stages: to the detections)."""

_BEHIND = ("assigner", "selection")  # what runs on predictions; not part of the forward
_END = 10**9  # iteration: whatever an assigner does later in a training, it does by then

Step = Callable[["_Meter"], None]


class SlotCost(NamedTuple):
    """A line of the table.

    Attributes:
        slot: its name.
        parameters: numbers that a checkpoint holds for it; batch norms are already folded.
        multiply_adds: of convolutions and matrix products, deformable ones included; what reads
            maps at fractional points is not counted.
        milliseconds: median.
        peak_mib: memory of the tensors that were alive at a time, beside those before it.
    """

    slot: str
    parameters: int
    multiply_adds: int
    milliseconds: float
    peak_mib: float


def slots_of(model: nn.Module) -> dict[str, tuple[nn.Module, ...]]:
    """Modules by slot, in the order in which they run; of other detectors their direct parts."""
    if not isinstance(model, OneStageDetector):
        return {name: (part,) for name, part in model.named_children()}
    head = model.head
    slots = {
        "backbone": (model.backbone,),
        "context": (head.context,),
        "class tower": (head.cls_subnet,),
        "box tower": (head.bbox_subnet,),
        "aligner": (head.aligner,),
        "predictor": (head.cls_score, head.predictor),
        "assigner": (model.assigner,),
    }
    return {
        name: tuple(part for part in parts if isinstance(part, nn.Module))
        for name, parts in slots.items()
    }


@torch.no_grad()
def slot_costs(
    model: nn.Module, item: Mapping[str, Any], truth: Instances | None = None, *, repeats: int = 5
) -> list[SlotCost]:
    """Measure a detector on one image, in evaluation mode.

    Args:
        model: a detector of Detectron2's kind.
        item: Detectron2's input dict of the image.
        truth: its objects, ``gt_boxes`` and ``gt_classes`` in pixels of the input, for the
            assigner of a one-stage detector; without them it is not run.
        repeats: of which times are the median; one run before them is not counted.

    Returns:
        A line for each slot, ``assigner`` and ``selection`` of one-stage detectors at their end,
        and one named :data:`WHOLE`, for all but these two. Slots without module or cost are
        left out.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; wanted a whole number from 1")
    slots = slots_of(model)
    step = _step(model, item, truth)
    step(_Meter(lambda: 0.0))  # first runs allocate and choose kernels
    device = next(model.parameters()).device
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        meter = _Meter(partial(_now, device))
        _run(step, slots, meter)
        for name, value in meter.totals.items():
            seconds[name].append(value)
    with FlopCounterMode(display=False, custom_mapping=DEFORMABLE) as counter:
        operations = _Meter(counter.get_total_flops)
        _run(step, slots, operations)
    memory = _Memory(model, item)
    with memory:
        _run(step, slots, memory.meter)
    counts = _parameters(model, slots)
    return [
        SlotCost(
            name,
            counts.get(name, 0),
            int(operations.totals[name]) // 2,
            1000 * statistics.median(seconds[name]),
            memory.meter.peaks[name] / 2**20,
        )
        for name in (*slots, "selection", WHOLE)
        if seconds[name]
    ]


def _step(model: nn.Module, item: Mapping[str, Any], truth: Instances | None) -> Step:
    """What is measured: it tells a meter when the parts that are no modules of a forward run."""

    def run(meter: _Meter) -> None:
        if not isinstance(model, OneStageDetector):
            with meter.part(WHOLE):
                model([item])
            return
        with meter.part(WHOLE):
            images, features, predictions = model.predict([item])
        with meter.part("selection"):
            model.selection(predictions, images.image_sizes)
        if truth is None:
            return
        levels = [at_least_float32(x) for x in features[-len(predictions.level_sizes) :]]
        assigner = deepcopy(model.assigner).train()  # it may count what it assigns
        known = truth.to(predictions.boxes.device)
        with EventStorage(_END), meter.part("assigner"):
            assigner(levels, predictions, [known])

    return run


def _run(step: Step, slots: Mapping[str, tuple[nn.Module, ...]], meter: _Meter) -> None:
    """A step whose slots' modules report to the meter."""
    with ExitStack() as hooks:
        for name, parts in slots.items():
            for part in parts if name not in _BEHIND else ():
                before = part.register_forward_pre_hook(_reporter(meter.begin, name))
                after = part.register_forward_hook(_reporter(meter.end, name))
                hooks.callback(before.remove)
                hooks.callback(after.remove)
        step(meter)


def _reporter(report: Callable[[str], None], name: str) -> Callable[..., None]:
    return lambda *_: report(name)


class _Meter:
    """Adds up, for each name, by how much a reading grows between begin and end.

    Attributes:
        totals: the sums, by name.
        peaks: by name the most that a reading rose above that at its begin, if someone reads.
    """

    def __init__(self, read: Callable[[], float]) -> None:
        self._read = read
        self._open: dict[str, float] = {}
        self.totals: dict[str, float] = defaultdict(float)
        self.peaks: dict[str, float] = defaultdict(float)

    def begin(self, name: str) -> None:
        self._open[name] = self._read()

    def end(self, name: str) -> None:
        self.totals[name] += self._read() - self._open.pop(name)

    def look(self) -> None:
        """Read in between, for the peaks."""
        value = self._read()
        for name, start in self._open.items():
            self.peaks[name] = max(self.peaks[name], value - start)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.begin(name)
        yield
        self.end(name)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Memory(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, whatever device they are on.

    The allocator's own numbers are not to be had on a CPU, and depend on what ran before. What
    an operator holds for itself while it runs is not seen.
    """

    def __init__(self, model: nn.Module, item: Mapping[str, Any]) -> None:
        super().__init__()
        given = [value for value in item.values() if isinstance(value, torch.Tensor)]
        held = [*model.parameters(), *model.buffers(), *given]  # were there before
        self._ignored = {tensor.untyped_storage()._cdata for tensor in held}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.meter = _Meter(self._bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._ignored:
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.meter.look()
        return output

    def _bytes(self) -> float:
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        return float(sum(size for _, size in self._alive.values()))


def _deformable(
    input_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Twice the multiply-adds of a deformable convolution, as for one on the plain grid."""
    return 2 * prod(out_shape) * prod(weight_shape[1:])


DEFORMABLE = {torch.ops.torchvision.deform_conv2d: _deformable}
"""What PyTorch's counter of operations must be told, which does not know this operator."""


def _parameters(model: nn.Module, slots: Mapping[str, tuple[nn.Module, ...]]) -> dict[str, int]:
    """Numbers by slot; what two slots share counts for the first."""
    seen: set[int] = set()
    counts = {}
    for name, parts in slots.items():
        own = {id(x): x.numel() for part in parts for x in part.parameters()}
        counts[name] = sum(size for key, size in own.items() if key not in seen)
        seen |= own.keys()
    everything = {id(x): x.numel() for x in model.parameters()}
    counts[WHOLE] = sum(everything.values()) - counts.get("assigner", 0)
    return counts
