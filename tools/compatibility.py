# SPDX-License-Identifier: Apache-2.0
"""The suite in other environments: oldest and newest torch and Python, Detectron2's head.

    python tools/compatibility.py oldest --python python3.10
    python tools/compatibility.py newest --python python3.13
    python tools/compatibility.py head --detectron2 DIR
    python tools/compatibility.py --write

Each run clones what is committed here, makes an environment there with tools/setup_env.py, runs
the whole suite and keeps what came out, with versions and date. ``oldest`` has the lowest release
of everything that ``pyproject.toml`` says is enough. ``--write`` makes the table in the document.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from d2_decouple.evaluation.files import put_between, write_json, write_text

__all__ = ["Outcome", "lowest", "main", "outcome", "table", "with_table"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "compatibility.json"
DOCUMENT = ROOT / "docs" / "compatibility.md"
START, END = "<!-- compatibility -->", "<!-- end of compatibility -->"
DEFAULT_FOLDER = ROOT.parent / "d2-decouple-compatibility"
ENVIRONMENTS = ("oldest", "usual", "newest", "head")
# What tests and documents alone need may be new everywhere.
_TEST_EXTRAS = ("dev", "docs")
_ASK_VERSIONS = """
import json, platform
from importlib import metadata
import detectron2, torch
names = ("torch", "torchvision", "numpy", "onnxruntime", "opencv-python-headless")
print(json.dumps({
    "python": platform.python_version(),
    "detectron2": detectron2.__version__,
    **{name: metadata.version(name) for name in names},
}))
"""


class CompatibilityError(RuntimeError):
    """A run that could not be made; the message says why and what to type."""


class Outcome(NamedTuple):
    """The suite in one environment.

    Attributes:
        environment: one of :data:`ENVIRONMENTS`.
        date: of the run, ISO.
        commit: what was run.
        system: and machine.
        versions: distribution -> version.
        tests: what of the suite was run; "" is all of it.
        passed: tests; a subtest counts as its own.
        skipped: tests.
        failed: names of the tests that failed or could not be set up.
        minutes: by the clock, without the set-up.
    """

    environment: str
    date: str
    commit: str
    system: str
    versions: dict[str, str]
    tests: str
    passed: int
    skipped: int
    failed: list[str]
    minutes: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 also if a test fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("environment", nargs="?", choices=ENVIRONMENTS, help="whose suite is run")
    parser.add_argument("--python", default=sys.executable, help="the interpreter (%(default)s)")
    parser.add_argument("--detectron2", type=Path, metavar="DIR", help="a checkout, for head")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="(%(default)s)")
    parser.add_argument("--tests", nargs="+", default=[], help="files of the suite (all)")
    parser.add_argument("--jobs", default="auto", help="processes for the suite (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="(%(default)s)")
    parser.add_argument("--write", nargs="?", type=Path, const=DOCUMENT, help="into the document")
    args = parser.parse_args(arguments)
    if bool(args.environment) == bool(args.write):
        parser.error(f"name an environment ({', '.join(ENVIRONMENTS)}) or --write, one of them")
    try:
        known = read(args.results)
        if args.write:
            text = args.write.read_text(encoding="utf-8")
            write_text(args.write, with_table(text, table(known)))
            return 0
        found = run_suite(args)
        known[found.environment] = found
        args.results.parent.mkdir(parents=True, exist_ok=True)
        rows = {name: known[name]._asdict() for name in ENVIRONMENTS if name in known}
        write_json(args.results, rows, indent=1)
        print(table({found.environment: found}))
        return 1 if found.failed else 0
    except (CompatibilityError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def read(file: Path) -> dict[str, Outcome]:
    """What was found before, by environment."""
    if not file.is_file():
        return {}
    return {name: Outcome(**row) for name, row in json.loads(file.read_text()).items()}


def run_suite(args: argparse.Namespace) -> Outcome:
    """Make the environment and run the suite there.

    Raises:
        CompatibilityError: no environment, or a suite that ended before its last test.
    """
    if (args.environment == "head") != (args.detectron2 is not None):
        raise CompatibilityError("--detectron2 DIR goes with head, and head needs it")
    if args.detectron2 and not (args.detectron2 / "detectron2" / "__init__.py").is_file():
        raise CompatibilityError(
            f"{args.detectron2} has no detectron2/__init__.py: name a checkout of Detectron2"
        )
    folder = args.folder.resolve() / args.environment
    commit = check_out(folder)
    variables = {"PIP_CONSTRAINT": str(constraints(args.environment, folder.parent))}
    setup = ["tools/setup_env.py", "--venv", ".venv", "--dev"]
    if _run([args.python, *setup], folder, variables):
        raise CompatibilityError(f"no environment for {args.environment}: the reason stands above")
    python = str(folder / ".venv" / "bin" / "python")
    if args.detectron2:
        variables["PYTHONPATH"] = str(args.detectron2.resolve())
    report = folder.parent / f"{args.environment}.xml"
    report.unlink(missing_ok=True)
    suite = ["-m", "pytest", "-q", "-n", args.jobs, "--maxprocesses", "4", "--dist", "loadfile"]
    began = time.monotonic()
    suite += [f"--junitxml={report}", *(args.tests or ["tests"])]
    status = _run([python, *suite], folder, variables)
    minutes = (time.monotonic() - began) / 60
    if status not in (0, 1) or not report.is_file():
        raise CompatibilityError(f"the suite ended with status {status} before its last test")
    asked = subprocess.run(
        [python, "-c", _ASK_VERSIONS],
        cwd=folder,
        env=_environment(variables),
        capture_output=True,
        text=True,
        check=True,
    )
    return outcome(
        ElementTree.parse(report).getroot(),
        environment=args.environment,
        date=datetime.date.today().isoformat(),
        commit=commit,
        system=f"{platform.system()} {platform.machine()}",
        versions=json.loads(asked.stdout.splitlines()[-1]),
        tests=" ".join(args.tests),
        minutes=round(minutes, 1),
    )


def check_out(folder: Path) -> str:
    """A clone of what is committed here, or the old one brought up to it; the commit's name."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if commit.returncode:
        raise CompatibilityError(f"{ROOT} is no clone: git says {commit.stderr.strip()}")
    name = commit.stdout.strip()
    if not (folder / ".git").is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        steps = [["git", "clone", "-q", str(ROOT), str(folder)]]
    else:
        steps = [["git", "-C", str(folder), "fetch", "-q", str(ROOT), name]]
    steps.append(["git", "-C", str(folder), "checkout", "-q", "--detach", name])
    for step in steps:
        if _run(step, ROOT, {}):
            raise CompatibilityError(
                f"{folder} cannot be brought to {name[:7]}; delete it, or name another --folder"
            )
    return name[:7]


def constraints(environment: str, folder: Path) -> Path:
    """A file for pip: the lowest releases for ``oldest``, none for the others."""
    file = folder / f"{environment}.txt"
    lines = lowest(requirements(ROOT / "pyproject.toml")) if environment == "oldest" else []
    write_text(file, "".join(f"{line}\n" for line in lines))
    return file


def requirements(file: Path) -> list[str]:
    """What ``pyproject.toml`` needs to run, and for its extras but those of tests.

    Raises:
        CompatibilityError: Python 3.10, which cannot read the file.
    """
    try:
        tomllib = importlib.import_module("tomllib")
    except ImportError as error:
        raise CompatibilityError(
            "pyproject.toml is read by Python 3.11 or newer: run this by one"
        ) from error
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    chosen = [extras[name] for name in extras if name not in _TEST_EXTRAS]
    return [*project["dependencies"], *(each for extra in chosen for each in extra)]


def lowest(wanted: Sequence[str]) -> list[str]:
    """``name>=1.2`` -> ``name==1.2.*``.

    Raises:
        CompatibilityError: a requirement without a lower bound.
    """
    found = {}
    for requirement in wanted:
        name, bound = re.match(r"[\w.-]+", requirement), re.search(r">=\s*([\d.]+)", requirement)
        if not name or not bound:
            raise CompatibilityError(f"{requirement!r} in pyproject.toml has no lower bound")
        found[name[0]] = f"=={bound[1]}.*"
    return sorted(name + version for name, version in found.items())


def outcome(suites: ElementTree.Element, **about: Any) -> Outcome:
    """What a JUnit report of pytest says; a test that fails twice (call, teardown) counts once."""
    passed, skipped, failed = 0, 0, set()
    for case in suites.iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            failed.add(f"{case.get('classname', '')}.{case.get('name', '')}")
        elif "skipped" in kinds:
            skipped += 1
        else:
            passed += 1
    return Outcome(passed=passed, skipped=skipped, failed=sorted(failed), **about)


def table(found: dict[str, Outcome]) -> str:
    """Markdown: a line for each environment."""
    head = ["environment", "Python", "torch", "numpy", "Detectron2", "onnxruntime", "OpenCV"]
    head += ["passed", "skipped", "failed", "minutes", "date", "commit"]
    lines = [head, ["---"] * len(head)]
    for name in ENVIRONMENTS:
        if name not in found:
            continue
        each = found[name]
        versions = [each.versions[key] for key in ("python", "torch", "numpy", "detectron2")]
        versions += [each.versions["onnxruntime"], each.versions["opencv-python-headless"]]
        counts = [f"{each.passed:,}", f"{each.skipped:,}", f"{len(each.failed):,}"]
        title = f"{name}: `{each.tests}`" if each.tests else name
        lines.append([title, *versions, *counts, f"{each.minutes:.0f}", each.date, each.commit])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_table(text: str, made: str) -> str:
    """The document's text with the table between its markers.

    Raises:
        CompatibilityError: a marker is missing.
    """
    changed = put_between(text, START, END, f"\n{made}\n")
    if changed is None:
        raise CompatibilityError(f"the document needs a line {START!r} and below it one {END!r}")
    return changed


def _environment(variables: dict[str, str]) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {**inherited, **variables}


def _run(command: Sequence[str], folder: Path, variables: dict[str, str]) -> int:
    print("+", *command, flush=True)
    return subprocess.run(command, cwd=folder, env=_environment(variables), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
