# SPDX-License-Identifier: Apache-2.0
"""``python -m d2_decouple.benchmark``: our parts against their references, in one run.

Both sides of a row run in turn, several times; the medians are compared. Ratios hold on a busy
machine better than times do, but only on an idle one do they mean much. Where a row knows how many
bytes must be moved at least, a copy that moves as many takes its turn too: how far our side is
above that floor says whether the memory limits it. Rows of detectors may say what their memory is
for.
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
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from . import extension
from .benchmarks import decoupled_rcnn, fcos, gather, mmdetection, pdnet, salt, sapd, tscode
from .benchmarks.detectors import SizedRow
from .benchmarks.row import Row, Step
from .config import nearest

__all__ = ["ROWS", "Row", "main"]

ROWS: dict[str, Row] = {
    **fcos.ROWS,
    **pdnet.ROWS,
    **tscode.ROWS,
    **salt.ROWS,
    **sapd.ROWS,
    **mmdetection.ROWS,
    **decoupled_rcnn.ROWS,
    **gather.ROWS,
}


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _gpu_seconds(step: Step) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _captured(step: Step) -> Step:
    """The same work on the GPU without Python's share, which is longer than a small kernel."""
    with torch.cuda.stream(torch.cuda.Stream()):  # capturing asks for runs beside the main stream
        step(), step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _copy(moved: int, device: str) -> Step:
    """Copies half of so many bytes: each is read once and written once."""
    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _measure(row: Row, repeats: int) -> list[float]:
    """Median milliseconds of ours, of the reference and, where the row has one, of the floor."""
    steps = [row.ours(), row.reference()]
    if row.least_bytes is not None:
        steps.append(_copy(row.least_bytes, row.device))
    seconds = _seconds
    if row.device == "cuda":
        steps, seconds = [_captured(step) for step in steps], _gpu_seconds
    for step in steps:
        step()  # first runs allocate and choose kernels
    times = [[seconds(step) for step in steps] for _ in range(repeats)]
    return [1000 * statistics.median(side) for side in zip(*times, strict=True)]


def _peak_in_child(name: str, side: str, threads: int) -> float:
    """Peak memory in MiB of a process that has never run anything else."""
    # glibc keeps what is freed in smaller pieces than a limit that moves with the program: a
    # matter of luck of 100 MiB. With a fixed one the peak is what was held at a time. It is read
    # when a process starts, so this one is not concerned.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**17))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_mib, name, side, threads).result()


def _peak_mib(name: str, side: str, threads: int) -> float:
    """Peak resident memory of this process (the GPU's for its rows) after two runs of a side."""
    torch.set_num_threads(threads)
    row = ROWS[name]
    step = row.ours() if side == "ours" else row.reference()
    step(), step()
    if row.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.is_file():  # Linux's ru_maxrss begins with what the parent had when it forked
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if peak:
            return int(peak[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _result(name: str, repeats: int, threads: int) -> dict[str, Any]:
    row = ROWS[name]
    peak, reference_peak = (_peak_in_child(name, side, threads) for side in ("ours", "reference"))
    ours, reference, *floor = _measure(row, repeats)
    ratio = ours / reference
    met = [ratio <= row.target]
    if row.peak_target is not None:
        met.append(peak / reference_peak <= row.peak_target)
    if row.floor_target is not None:
        met.append(ours / floor[0] <= row.floor_target)
    sizes = _sizes(row, (peak, reference_peak)) if isinstance(row, SizedRow) else []
    met += [size["ratio"] <= size["target"] for size in sizes if size["target"] is not None]
    result: dict[str, Any] = {
        "name": name,
        "ours_ms": round(ours, 3),
        "reference": row.reference_name,
        "reference_ms": round(reference, 3),
        "ratio": round(ratio, 3),
        "target": round(row.target, 3),
        "met": all(met),
        "peak_mib": round(peak, 1),
        "reference_peak_mib": round(reference_peak, 1),
        "peak_target": row.peak_target,
        "setting": row.setting,
    }
    if sizes:
        result["sizes"] = sizes
    if row.least_bytes is not None:
        (floor_ms,) = floor
        result["least_mb"] = round(row.least_bytes / 1e6, 1)
        result["floor_ms"] = round(floor_ms, 3)
        result["copy_gb_per_s"] = round(row.least_bytes / floor_ms / 1e6, 1)
        result["above_floor"] = round(ours / floor_ms, 2)
        result["floor_target"] = row.floor_target
    return result


def _sizes(row: SizedRow, peaks: tuple[float, float]) -> list[dict[str, Any]]:
    return [
        {
            "of": name,
            "ours_mib": round(ours, 1),
            "reference_mib": round(reference, 1),
            "ratio": round(ours / reference, 3),
            "target": row.size_targets.get(name),
        }
        for name, (ours, reference) in {"peak": peaks, **row.sizes()}.items()
    ]


def _machine(threads: int) -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "extension": extension.status().reason,
    }


def _selected(only: str | None, device: str) -> list[str]:
    names = [name for name in ROWS if ROWS[name].device == device and ROWS[name].installed]
    if only:
        names = only.split(",")
    for name in names:
        if name not in ROWS:
            raise SystemExit(f"error: no row {name!r}; {nearest(name, ROWS)}")
        if ROWS[name].device == "cuda" and not torch.cuda.is_available():
            raise SystemExit(
                f"error: row {name!r} runs on a GPU, and PyTorch finds none: "
                "`python -m d2_decouple.collect_env` says what it sees"
            )
        if not ROWS[name].installed:
            raise SystemExit(
                f"error: row {name!r} compares with {ROWS[name].reference_name}, and "
                f"{ROWS[name].needs!r} is not installed: `pip install {ROWS[name].needs}` and what "
                "it asks for"
            )
    return names


def _print_list() -> None:
    width = max(map(len, ROWS))
    for name, row in ROWS.items():
        print(f"{name:{width}} <= {row.target:.3g} x {row.reference_name}: {row.setting}")


def _print_tables(results: list[dict[str, Any]]) -> None:
    _print_table(
        *(results, "name", "ours_ms", "reference", "reference_ms", "ratio", "target", "met"),
        *("peak_mib", "reference_peak_mib"),
    )
    with_floor = [result for result in results if "floor_ms" in result]
    if with_floor:
        print("\nA copy that moves as many bytes as the row must at least, in the same run:")
        _print_table(
            *(with_floor, "name", "least_mb", "floor_ms", "copy_gb_per_s", "ours_ms"), "above_floor"
        )
    sizes = [
        {"name": result["name"], **size} for result in results for size in result.get("sizes", [])
    ]
    if sizes:
        print("\nOf the memory:")
        _print_table(sizes, "name", "of", "ours_mib", "reference_mib", "ratio", "target")


def _print_table(results: list[dict[str, Any]], *shown: str) -> None:
    print(tabulate([[result[key] for key in shown] for result in results], headers=shown))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0 whether or not targets are met."""
    parser = argparse.ArgumentParser(
        prog="python -m d2_decouple.benchmark", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--only", metavar="NAME,...", help="measure these rows alone")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="measure the rows of this device"
    )
    parser.add_argument("--json", metavar="FILE", help="write the result there as well")
    parser.add_argument("--repeats", type=int, default=7, help="counted runs of each side")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of both sides")
    args = parser.parse_args(arguments)
    for name in ("repeats", "threads"):
        if vars(args)[name] < 1:
            parser.error(f"--{name} is {vars(args)[name]}; wanted is at least 1")
    if args.list:
        _print_list()
        return 0
    names = _selected(args.only, args.device)
    torch.set_num_threads(args.threads)
    # Convolutions are rounded to TF32 by default, products of matrices are not: neither, here.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32
    report: dict[str, Any] = {"machine": _machine(args.threads), "rows": []}
    for name in names:
        report["rows"].append(_result(name, args.repeats, args.threads))
        print(f"{name}: {report['rows'][-1]['ratio']}", file=sys.stderr)
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    _print_tables(report["rows"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
