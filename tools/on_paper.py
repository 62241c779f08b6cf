# SPDX-License-Identifier: Apache-2.0
"""What COCO's 1x schedule would take on 1, 8 and 64 GPUs: on paper, nothing was run on them.

    python tools/on_paper.py --measure all
    python tools/on_paper.py --write

A training step of each recipe is counted on the CPU, with one image of 800 x 1333 pixels under
bfloat16 autocast: operations of its convolutions and matrix products, forward and backward, and
bytes kept for the backward. ``--write`` makes the table of what was counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from d2_decouple.config import ConfigError, config_names, get_config, nearest
from d2_decouple.engine.methods import METHODS
from d2_decouple.evaluation.files import put_between, write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "on_paper.json"
DOCUMENT = ROOT / "docs" / "trust_training.md"
START, END = "<!-- on paper -->", "<!-- end of paper -->"
SIZE = (800, 1333)
OBJECTS = 7  # of an image, COCO's mean
_OUTPUTS = 80  # classes


class GPU(NamedTuple):
    """Of an NVIDIA A100's data sheet; ``efficient`` is assumed.

    Attributes:
        operations: in a second, dense bfloat16.
        gibibytes: of memory.
        efficient: best and worst share of the operations that a detector reaches.
        reserved: GiB for the context, for cuDNN and for what the allocator leaves unused.
    """

    operations: float = 312e12
    gibibytes: float = 80.0
    efficient: tuple[float, float] = (0.40, 0.10)
    reserved: float = 3.0


class Cluster(NamedTuple):
    """A number of GPUs, and the schedule on them.

    Attributes:
        gpus: how many.
        images: of a step, all GPUs together.
        iterations: so that 1.44 million images are seen, as with 16 images and 90,000 steps.
        bandwidth: bytes in a second, of each GPU to the next one.
    """

    gpus: int
    images: int
    iterations: int
    bandwidth: float


CLUSTERS = (
    Cluster(1, 16, 90_000, float("inf")),
    Cluster(8, 16, 90_000, 300e9),  # NVLink of the third generation, one direction
    Cluster(64, 64, 22_500, 25e9),  # eight machines, 200 Gbit/s for each GPU
)


class Counted(NamedTuple):
    """A training step with one image.

    Attributes:
        gflop: forward and backward; a multiply-add counts as two.
        parameters: numbers in the model, in millions.
        trained: of them, those with a gradient.
        kept_mib: kept for the backward.
        cpu_seconds: of one thread of this machine, forward and backward.
    """

    gflop: float
    parameters: float
    trained: float
    kept_mib: float
    cpu_seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--measure", metavar="NAME,...|all", help="count these recipes anew")
    parser.add_argument("--results", type=Path, default=RESULTS, help="(%(default)s)")
    parser.add_argument("--write", nargs="?", type=Path, const=DOCUMENT, help="into the document")
    args = parser.parse_args(arguments)
    try:
        counted = read(args.results)
        names = recipes() if args.measure == "all" else (args.measure or "").split(",")
        for name in filter(None, names):
            if name not in config_names():
                raise ConfigError(f"no recipe {name!r}; {nearest(name, config_names())}")
            counted[name] = count(name)
            print(name, counted[name], flush=True)
            write_json(args.results, {key: each._asdict() for key, each in counted.items()})
        if not counted:
            raise ConfigError(f"nothing is counted in {args.results}; type --measure all")
        text = table(counted)
        if args.write:
            write_text(args.write, with_table(args.write.read_text(encoding="utf-8"), text))
        else:
            print(text)
    except (ConfigError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def recipes() -> list[str]:
    """COCO's 1x recipes of all methods on all their hosts."""
    return [family.large for hosts in METHODS.values() for family in hosts.values()]


def read(file: Path) -> dict[str, Counted]:
    """What was counted before, by recipe."""
    if not file.is_file():
        return {}
    return {name: Counted(**row) for name, row in json.loads(file.read_text()).items()}


def count(name: str) -> Counted:
    """Run a training step of a recipe with random weights on one image of noise."""
    torch.manual_seed(0)
    cfg = get_config(name)
    model: nn.Module = instantiate(cfg.model).train()
    parameters = [parameter.numel() for parameter in model.parameters()]
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    item = example()
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    began = time.process_time()
    try:
        with EventStorage(), FlopCounterMode(display=False) as operations:
            saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            with saving, torch.autocast("cpu", dtype=torch.bfloat16):
                losses = model([item])
                total = torch.stack(list(losses.values())).sum()
            total.backward()
    finally:
        torch.set_num_threads(threads)
    return Counted(
        gflop=round(operations.get_total_flops() / 1e9, 1),
        parameters=round(sum(parameters) / 1e6, 2),
        trained=round(sum(trained) / 1e6, 2),
        kept_mib=round(sum(kept.values()) / 2**20, 1),
        cpu_seconds=round(time.process_time() - began, 1),
    )


def example() -> dict[str, Any]:
    """Detectron2's input of an image of noise, with boxes of 40 to 400 pixels."""
    height, width = SIZE
    sides = torch.logspace(1.602, 2.602, OBJECTS)
    corners = torch.rand(OBJECTS, 2) * (torch.tensor([width, height]) - sides[:, None])
    truth = Instances(SIZE)
    truth.gt_boxes = Boxes(torch.cat((corners, corners + sides[:, None]), dim=1))
    truth.gt_classes = torch.arange(OBJECTS) % _OUTPUTS
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    return {"image": image, "instances": truth, "height": height, "width": width}


def memory(counted: Counted, cluster: Cluster, gpu: GPU) -> tuple[float, int]:
    """GiB of each GPU, and how many batches make a step so that it fits.

    Weights, gradients and momentum are float32.
    """
    fixed = gpu.reserved + (4 * counted.parameters + 8 * counted.trained) * 1e6 / 2**30
    images, batches = cluster.images // cluster.gpus, 1
    while fixed + images / batches * counted.kept_mib / 2**10 > gpu.gibibytes and batches < images:
        batches *= 2
    return fixed + images / batches * counted.kept_mib / 2**10, batches


def hours(counted: Counted, cluster: Cluster, gpu: GPU, efficient: float) -> float:
    """Of the whole schedule: operations, and then a ring's exchange of float32 gradients."""
    images = cluster.images / cluster.gpus
    step = images * counted.gflop * 1e9 / (gpu.operations * efficient)
    shared = 2 * (cluster.gpus - 1) / cluster.gpus * 4 * counted.trained * 1e6
    return cluster.iterations * (step + shared / cluster.bandwidth) / 3600


def table(counted: dict[str, Counted], gpu: GPU | None = None) -> str:
    """Markdown: a line for each recipe."""
    gpu = gpu or GPU()
    head = ["model", "GFLOP/image", "million parameters", "MiB/image", "CPU s"]
    for cluster in CLUSTERS:
        plural = f"{cluster.gpus} GPU{'s' * (cluster.gpus > 1)}"
        head += [f"{plural}: GiB each", "hours"]
    lines = [head, ["---"] * len(head)]
    for name, each in counted.items():
        line = [f"`{name}`", f"{each.gflop:.0f}", f"{each.parameters:.1f}"]
        line += [f"{each.kept_mib:.0f}", f"{each.cpu_seconds:.1f}"]
        for cluster in CLUSTERS:
            size, batches = memory(each, cluster, gpu)
            best, worst = (hours(each, cluster, gpu, share) for share in gpu.efficient)
            line.append(f"{size:.0f}" + (f" ({batches} batches)" if batches > 1 else ""))
            line.append(
                f"{best:.1f} to {worst:.1f}" if worst < 10 else f"{best:.0f} to {worst:.0f}"
            )
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_table(text: str, made: str) -> str:
    """The document's text with the table between its markers.

    Raises:
        ConfigError: a marker is missing, or stands twice.
    """
    changed = put_between(text, START, END, f"\n{made}\n")
    if changed is None or text.count(START) != 1 or text.count(END) != 1:
        raise ConfigError(f"the document needs one line {START!r} and below it one {END!r}")
    return changed


if __name__ == "__main__":
    sys.exit(main())
