# SPDX-License-Identifier: Apache-2.0
"""``python -m d2_decouple.benchmark``: our parts against their references, in one run.

Both sides of a row run in turn, several times; the medians are compared. Ratios hold on a busy
machine better than times do, but only on an idle one do they mean much.
"""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import Boxes, Instances
from tabulate import tabulate
from torch import nn
from torchvision.models.detection import FCOS as TorchvisionFCOS
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from .config import get_config, nearest
from .engine.predictor import Predictor

__all__ = ["ROWS", "Row", "main"]

Step = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison.

    Attributes:
        ours: builds our side; the result is called to run it once.
        reference: builds the other side.
        reference_name: what it is.
        target: the ratio ours / reference that shall not be exceeded.
        setting: what both sides were given.
    """

    ours: Callable[[], Step]
    reference: Callable[[], Step]
    reference_name: str
    target: float
    setting: str


_SIZE = (800, 1216)
_CLASSES = 80
_PLANTED = 4  # classes that every location predicts: about 1,000 candidates a level
_FCOS_SETTING = (
    f"R-50-FPN, stride in 3x3, {_CLASSES} classes, one {_SIZE[0]}x{_SIZE[1]} image, fp32, "
    f"threshold 0.2, {_PLANTED} planted classes, boxes of 4 strides, 20 ground-truth boxes"
)


def _plant(cls_score: Any, bbox_pred: Any) -> None:
    """Make random weights propose: some classes everywhere, boxes that overlap."""
    with torch.no_grad():
        cls_score.bias[:_PLANTED] = 1.0
        bbox_pred.bias[:] = 2.0


def _image() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, *_SIZE), generator=generator, dtype=torch.uint8)


def _ground_truth() -> tuple[torch.Tensor, torch.Tensor]:
    """20 boxes of 16 to 512 pixels (xyxy) and their classes."""
    generator = torch.Generator().manual_seed(1)
    height, width = _SIZE
    side = 2 ** (4 + 5 * torch.rand(20, 2, generator=generator))
    corner = torch.rand(20, 2, generator=generator) * (torch.tensor([width, height]) - side)
    return torch.cat((corner, corner + side), 1), torch.arange(20)


def _our_fcos() -> nn.Module:
    torch.manual_seed(0)
    recipe = get_config("fcos_R_50_FPN_1x_d2")
    recipe.model.backbone.bottom_up.stages.stride_in_1x1 = False  # as torchvision's
    model = instantiate(recipe.model)
    _plant(model.head.cls_score, model.head.predictor.bbox_pred)
    return model


def _torchvision_fcos() -> nn.Module:
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50",
        weights=None,
        trainable_layers=3,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    model = TorchvisionFCOS(backbone, num_classes=_CLASSES)
    _plant(model.head.classification_head.cls_logits, model.head.regression_head.bbox_reg)
    return model


def _torchvision_channels_last() -> nn.Module:
    return _torchvision_fcos().to(memory_format=torch.channels_last)


def _our_inference(build: Callable[[], nn.Module]) -> Step:
    model = build().eval()
    inputs = [{"image": _image(), "height": _SIZE[0], "width": _SIZE[1]}]

    def step() -> Any:
        with torch.no_grad():
            return model(inputs)

    return step


def _our_predictor(precision: str) -> Step:
    predictor = Predictor(
        _our_fcos(),
        augmentations=[ResizeShortestEdge(min(_SIZE), max(_SIZE))],
        classes=[str(index) for index in range(_CLASSES)],
        device="cpu",
        precision=precision,
    )
    array = _image().permute(1, 2, 0).contiguous().numpy()
    return lambda: predictor(array)


def _torchvision_inference(build: Callable[[], nn.Module]) -> Step:
    model, image = build().eval(), _image() / 255

    def step() -> Any:
        with torch.no_grad():
            return model([image])

    return step


def _training(model: nn.Module, losses: Callable[[], dict[str, torch.Tensor]]) -> Step:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-6, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        torch.stack(list(losses().values())).sum().backward()
        optimizer.step()

    return step


def _our_training(build: Callable[[], nn.Module]) -> Step:
    model = build().train()
    boxes, classes = _ground_truth()
    truth = Instances(_SIZE, gt_boxes=Boxes(boxes), gt_classes=classes)
    inputs = [{"image": _image(), "instances": truth}]
    return _training(model, lambda: model(inputs))


def _torchvision_training(build: Callable[[], nn.Module]) -> Step:
    model, image = build().train(), _image() / 255
    boxes, classes = _ground_truth()
    return _training(model, lambda: model([image], [{"boxes": boxes, "labels": classes}]))


def _fcos_row(ours: Any, reference: Any, other: Callable[[], nn.Module], target: float) -> Row:
    layout = " in channels-last" if other is _torchvision_channels_last else " as shipped"
    return Row(
        ours=lambda: ours(_our_fcos),
        reference=lambda: reference(other),
        reference_name="torchvision FCOS" + layout,
        target=target,
        setting=_FCOS_SETTING,
    )


def _predictor_row(precision: str, target: float) -> Row:
    return Row(
        ours=lambda: _our_predictor(precision),
        reference=lambda: _torchvision_inference(_torchvision_fcos),
        reference_name="torchvision FCOS as shipped",
        target=target,
        setting=f"{_FCOS_SETTING}; ours is the Predictor given an array, in {precision}",
    )


ROWS: dict[str, Row] = {
    "fcos_inference": _fcos_row(_our_inference, _torchvision_inference, _torchvision_fcos, 0.75),
    "fcos_train_step": _fcos_row(_our_training, _torchvision_training, _torchvision_fcos, 0.75),
    "fcos_inference_channels_last": _fcos_row(
        _our_inference, _torchvision_inference, _torchvision_channels_last, 1.0
    ),
    "fcos_train_step_channels_last": _fcos_row(
        _our_training, _torchvision_training, _torchvision_channels_last, 1.0
    ),
    "fcos_predictor": _predictor_row("float32", 0.70),
    "fcos_predictor_bfloat16": _predictor_row("bfloat16", 0.45),
}


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _measure(row: Row, repeats: int) -> tuple[float, float]:
    """Median milliseconds of ours and of the reference."""
    ours, reference = row.ours(), row.reference()
    ours(), reference()  # first runs allocate and choose kernels
    times = [(_seconds(ours), _seconds(reference)) for _ in range(repeats)]
    ours_ms, reference_ms = (1000 * statistics.median(side) for side in zip(*times, strict=True))
    return ours_ms, reference_ms


def _peak_in_child(name: str, threads: int) -> float:
    """Peak memory in MiB of a process that has never run anything else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_mib, name, threads).result()


def _peak_mib(name: str, threads: int) -> float:
    """Peak resident memory of this process after two runs of our side."""
    torch.set_num_threads(threads)
    step = ROWS[name].ours()
    step(), step()
    status = Path("/proc/self/status")
    if status.is_file():  # Linux's ru_maxrss begins with what the parent had when it forked
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if peak:
            return int(peak[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _result(name: str, repeats: int, threads: int) -> dict[str, Any]:
    row = ROWS[name]
    peak = _peak_in_child(name, threads)
    ours, reference = _measure(row, repeats)
    ratio = ours / reference
    return {
        "name": name,
        "ours_ms": round(ours, 2),
        "reference": row.reference_name,
        "reference_ms": round(reference, 2),
        "ratio": round(ratio, 3),
        "target": row.target,
        "met": ratio <= row.target,
        "peak_mib": round(peak, 1),
        "setting": row.setting,
    }


def _machine(threads: int) -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }


def _selected(only: str | None) -> list[str]:
    names = only.split(",") if only else list(ROWS)
    for name in names:
        if name not in ROWS:
            raise SystemExit(f"error: no row {name!r}; {nearest(name, ROWS)}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0 whether or not targets are met."""
    parser = argparse.ArgumentParser(
        prog="python -m d2_decouple.benchmark", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--only", metavar="NAME,...", help="measure these rows alone")
    parser.add_argument("--json", metavar="FILE", help="write the result there as well")
    parser.add_argument("--repeats", type=int, default=7, help="counted runs of each side")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of both sides")
    args = parser.parse_args(arguments)
    if args.list:
        for name, row in ROWS.items():
            print(f"{name:32} <= {row.target} x {row.reference_name}: {row.setting}")
        return 0
    names = _selected(args.only)
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {"machine": _machine(args.threads), "rows": []}
    for name in names:
        report["rows"].append(_result(name, args.repeats, args.threads))
        print(f"{name}: {report['rows'][-1]['ratio']}", file=sys.stderr)
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    shown = ("name", "ours_ms", "reference", "reference_ms", "ratio", "target", "met", "peak_mib")
    print(tabulate([[row[key] for key in shown] for row in report["rows"]], headers=shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
