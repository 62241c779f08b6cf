# SPDX-License-Identifier: Apache-2.0
"""Change files by chance and read them: ``python tools/fuzz.py --minutes 10 voc``.

With ``--cases`` the files that were made to do harm are read instead, each in a process of its
own, and what came of it is printed as a table: the answer, seconds of computing, and memory.
"""

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "hostile"
KINDS = {
    "voc": "test_voc_files.py",
    "coco": "test_coco_files.py",
    "yolo": "test_yolo_files.py",
    "images": "test_image_files.py",
    "checkpoints": "test_checkpoint_files.py",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 if something must be repaired."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("kind", nargs="*", help=f"of files: {', '.join(KINDS)}; all by default")
    parser.add_argument("--minutes", type=float, default=1.0, help="for each kind (%(default)s)")
    parser.add_argument("--cases", action="store_true", help="the table of hostile files")
    args = parser.parse_args(arguments)
    if unknown := [kind for kind in args.kind if kind not in KINDS]:
        parser.error(f"there is no kind {unknown[0]!r}; there are: {', '.join(KINDS)}")
    if args.minutes <= 0:
        parser.error(f"--minutes {args.minutes:g}: wanted more than 0")
    if args.cases:
        return print_cases()
    # All are run; one that ended by a signal has a status below 0.
    statuses = [fuzz(kind, args.minutes) for kind in args.kind or KINDS]
    return int(any(statuses))


def fuzz(kind: str, minutes: float) -> int:
    """Run the property of one kind of files for so long; the exit status of pytest."""
    print(f"{kind}: {minutes:g} minutes", flush=True)
    environment = {**os.environ, "D2D_FUZZ_SECONDS": str(max(1, round(60 * minutes)))}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-s", "-p", "no:cacheprovider"]
    command += [str(TESTS / KINDS[kind]), "-k", "whatever"]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def print_cases() -> int:
    """Print what came of each hostile file; 1 if one was not answered as it should be."""
    if sys.platform != "linux":
        print("error: the memory of a process is measured on Linux alone", file=sys.stderr)
        return 1
    sys.path[:0] = [str(ROOT), str(TESTS)]
    for name in ("cases_of_images", "cases_of_checkpoints"):  # which enter their cases
        importlib.import_module(name)
    cases = importlib.import_module("cases").CASES
    measured = importlib.import_module("measuring").measured
    wrong = 0
    print("| input | answer | seconds | MiB | message |\n| --- | --- | --- | --- | --- |")
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as base:
            answer = measured(case.make_in(Path(base)), Path(base))
        text = " ".join(answer.text.replace(f"{base}/folder/", "").split())[:150]
        text = text.encode("ascii", "backslashreplace").decode().replace("|", "/")
        good = answer.kind in case.errors and not answer.outside
        wrong += not good
        outside = f", **{Path(answer.outside).name} was opened or made**" if answer.outside else ""
        print(
            f"| `{name}` | {'' if good else 'not as wanted: '}{answer.kind}{outside} "
            f"| {answer.seconds:.2f} | {answer.peak_mib:.0f} | {text} |",
            flush=True,
        )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
