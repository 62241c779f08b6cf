# SPDX-License-Identifier: Apache-2.0
"""Compare this package with numbers from reference implementations: ``verify_golden.py DIR``.

DIR holds cases of two files each: ``NAME.json`` says what the case is (kind, configuration,
inputs, outputs with tolerances) and ``NAME.npz`` holds its arrays. An input is a stored array, a
literal value, or drawn from the case's seed by a rule; an output is an array or a literal value.

Every case runs in float32 and in float64. What comes out is a table with the largest deviation
of each output beside its tolerance, and the exit status: 0 if all are met, 1 otherwise. A case
that cannot be compared counts as failed: unknown kind, damaged file, output without counterpart.

To add a kind: write a function ``(case, dtype) -> {output name: tensor}`` in the file of its paper
in ``golden_adapters/``. It runs public parts of the package and translates *their results* into
the case's conventions. Enter it into ``ADAPTERS`` there, together with the outputs that are left
out on purpose, and why.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

# The adapters lie beside this file, and the package beside its folder if it is not installed; so
# it is also where this file is loaded by its path. Last, so that an installed package goes first.
sys.path.extend(str(folder) for folder in Path(__file__).resolve().parents[:2])

from golden_adapters import ADAPTERS, Adapter, Case, GoldenError, load_case, read_json

from d2_decouple import extension

__all__ = ["ADAPTERS", "Adapter", "Case", "GoldenError", "load_case", "main"]


class Row(NamedTuple):
    """One line of the table: an output in one precision."""

    output: str
    deviation: float  # largest |got - want|
    share: float  # largest |got - want| / (atol + rtol * |want|)
    tolerance: str

    def __str__(self) -> str:
        verdict = "ok" if self.share <= 1 else "EXCEEDED"
        return (
            f"  {self.output:40} {self.deviation:10.3g}  {self.tolerance:20} {self.share:8.2%}  "
            f"{verdict}"
        )


HEADER = f"  {'output':40} {'deviation':>10}  {'tolerance':20} {'used':>8}"


def measure(label: str, got: np.ndarray, want: np.ndarray, tolerance: Mapping[str, float]) -> Row:
    """How far ``got`` is from ``want``, and which share of the tolerance that is.

    Two NaN agree, and two equal infinities; NaN is infinitely far from a number.
    """
    rtol, atol = tolerance["rtol"], tolerance["atol"]
    got, want = got.astype(np.float64), want.astype(np.float64)
    agree = (got == want) | (np.isnan(got) & np.isnan(want))
    with np.errstate(invalid="ignore", divide="ignore"):
        distance = np.where(agree, 0, np.abs(got - want))
        share = np.where(agree, 0, distance / (atol + rtol * np.abs(want)))
    allowed = f"{atol:.0e} + {rtol:.0e} |x|" if atol or rtol else "equal"
    worst = [np.nan_to_num(x, nan=np.inf, posinf=np.inf).max(initial=0) for x in (distance, share)]
    return Row(label, float(worst[0]), float(worst[1]), allowed)


def verify(case: Case) -> list[Row]:
    """Run a case in both precisions and compare every output that is not left out by name.

    Raises:
        GoldenError: the package refuses the inputs, an output has no counterpart or another
            shape, or none is compared at all.
    """
    adapter = ADAPTERS[case.kind]
    names = [name for name in case.outputs if adapter.left_out(name) is None]
    if not names:
        raise GoldenError(f"{case.path}: nothing to compare, its outputs are {list(case.outputs)}")
    rows = []
    for dtype in ("float32", "float64"):
        try:
            results = adapter.run(case, getattr(torch, dtype))
        except RuntimeError as error:
            raise GoldenError(f"{case.path}: cannot be run in {dtype}: {error}") from error
        for name in names:
            if name not in results:
                raise GoldenError(
                    f"{case.path}: the output {name!r} is not compared: the adapter of "
                    f"{case.kind!r} gives {sorted(results)}"
                )
            want = case.array(name, case.outputs[name])
            got = results[name].detach().cpu().numpy()
            if got.shape != want.shape:
                raise GoldenError(
                    f"{case.path}: {name!r} shall have shape {want.shape}, ours has {got.shape}"
                )
            rows.append(
                measure(f"{name} {dtype}", got, want, case.outputs[name]["tolerance"][dtype])
            )
    return rows


def report(case: Case) -> bool:
    """Print a case's table; True if every tolerance is met."""
    print(f"{case.path.stem} ({case.kind})")
    rows = verify(case)
    print(HEADER, *rows, sep="\n")
    for name in case.outputs:
        reason = ADAPTERS[case.kind].left_out(name)
        if reason is not None:
            print(f"  {name:40} not compared: {reason}")
    return all(row.share <= 1 for row in rows)


def verify_folder(folder: Path, only: str | None) -> bool:
    """Report on all cases of ``folder``, or on those of one kind; True if all are good.

    Raises:
        GoldenError: there is nothing to compare, or ``only`` is no kind.
    """
    if only is not None and only not in ADAPTERS:
        raise GoldenError(f"unknown kind {only!r}; known are {', '.join(sorted(ADAPTERS))}")
    if not folder.is_dir():
        raise GoldenError(f"{folder}: no such folder")
    good, seen = True, 0
    for path in sorted(folder.glob("*.json")):
        try:
            kind = read_json(path)["kind"]
            if only is not None and kind != only:
                continue
            seen += 1
            if kind not in ADAPTERS:
                raise GoldenError(
                    f"{path}: unknown kind {kind!r}; known are {', '.join(sorted(ADAPTERS))}"
                )
            good &= report(load_case(path))
        except GoldenError as error:
            print(f"error: {error}", file=sys.stderr)
            good = False
    if not seen:
        wanted = f"case of kind {only!r}" if only else "case (NAME.json with NAME.npz)"
        raise GoldenError(f"{folder}: no {wanted} found")
    print(f"cases: {seen}; " + ("all within tolerance" if good else "FAILED, see above"))
    return good


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Compare this package with numbers from reference implementations.",
        epilog=f"Known kinds: {', '.join(sorted(ADAPTERS))}.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of NAME.json + NAME.npz")
    parser.add_argument("--only", metavar="KIND", help="look at the cases of this kind alone")
    options = parser.parse_args(arguments)
    print(f"extension: {extension.status().reason}")
    try:
        good = verify_folder(options.folder, options.only)
    except GoldenError as error:
        print(f"error: {error}", file=sys.stderr)
        good = False
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
