# SPDX-License-Identifier: Apache-2.0
"""Execute every command of the documents, shortened by added options, in a reader's folder.

    python tools/run_documents.py --data datasets/BCCD
    python tools/run_documents.py --data datasets/BCCD --only "projects/PDNet|fuzz" --folder DIR

The commands are those of the bash blocks, as ``tests/test_docs_commands.py`` reads them. What is
added to each, and who runs those that are not run here, is decided in ``document_commands.py``;
``reader_folder.py`` lays out what they read. A command fails that ends with another status than
0, or that prints a traceback. ``--write`` makes the table in ``docs/commands.md``. With
``--folder`` a later call goes on: what was good before is kept, with its commit.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import html
import importlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from document_commands import (
    ADDED,
    BY_CI,
    BY_HAND,
    BY_SUITE,
    OF_OTHERS,
    RUN,
    Decision,
    Need,
    RunError,
    decide,
    needs,
    without_comment,
)

from d2_decouple.evaluation.files import put_between, write_json, write_text
from d2_decouple.evaluation.runs import commit_of

__all__ = ["Job", "Row", "execute", "jobs_of", "main", "page_part", "read_commands", "summary"]

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "commands.md"
START, END = "<!-- commands -->", "<!-- end of commands -->"
_KEPT = "good.json"  # of the folder: what was good, by document and command
SECONDS = 1200  # that a command may take
_LAST_LINES = 25
# At the beginning of a line. torchrun logs one behind a prefix, and ends with 0, where the agents
# of two nodes do not leave at the same moment.
_TRACEBACK = re.compile(r"^Traceback \(most recent call last\)", re.MULTILINE)


class Job(NamedTuple):
    """A command, once for all documents that have it.

    Attributes:
        line: of the bash block, with its comment.
        documents: that have it.
        decision: what becomes of it.
        needs: weights that it reads.
    """

    line: str
    documents: tuple[str, ...]
    decision: Decision
    needs: tuple[Need, ...]


class Row(NamedTuple):
    """What became of a job.

    Attributes:
        job: that was to be run.
        status: of its exit; None where it was not run.
        seconds: by the clock.
        output: what it printed.
        commit: what was checked out then.
    """

    job: Job
    status: int | None = None
    seconds: float = 0.0
    output: str = ""
    commit: str = ""

    @property
    def failed(self) -> bool:
        """Whether it was run and did not go well."""
        return bool(self.status) or _TRACEBACK.search(self.output) is not None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 if a command fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, required=True, help="of BCCD, holds Annotations")
    parser.add_argument("--only", metavar="PATTERN", help="run what this finds in DOCUMENT: LINE")
    parser.add_argument("--folder", type=Path, help="to keep, and go on with")
    parser.add_argument("--write", action="store_true", help="the table into docs/commands.md")
    args = parser.parse_args(arguments)
    try:
        if not (args.data / "Annotations").is_dir():
            raise RunError(f"{args.data} holds no Annotations; type --data and BCCD's folder")
        jobs = jobs_of(read_commands())
        if not any(finds(args.only, job) for job in jobs):
            raise RunError(f"no command of the documents has {args.only!r}; type another --only")
        with tempfile.TemporaryDirectory() as scratch:
            folder = usable_folder(args.folder or Path(scratch))
            rows = run_all(jobs, folder, args.data, args.only)
        if args.write:
            write_page(rows)
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; with --folder the same command goes on from here", file=sys.stderr)
        return 130
    print(summary(rows))
    return int(any(row.failed for row in rows))


def usable_folder(folder: Path) -> Path:
    """The folder, made if need be.

    Raises:
        RunError: it holds something else than an earlier call of this tool.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / _KEPT).is_file():
        raise RunError(f"{folder} is not empty, and not of this tool; type another --folder")
    return folder.resolve()


def read_commands() -> list[tuple[str, str]]:
    """(document, line) of every command, by the tests that parse them."""
    sys.path.append(str(ROOT / "tests"))
    try:
        found = importlib.import_module("test_docs_commands").EVERY
    except ImportError as error:
        raise RunError(f"{error}: type make setup in a checkout, which has the tests") from error
    return [(document, line) for document, line in found]


def jobs_of(commands: Iterable[tuple[str, str]]) -> list[Job]:
    """One job for each command; the same command of other documents joins it.

    Raises:
        UndecidedError: a command that no rule knows.
    """
    jobs: dict[tuple[str, Decision, tuple[Need, ...]], list[str]] = {}
    for document, line in commands:
        decision = decide(document, line)
        needed = tuple(needs(document, line)) if decision.how == RUN else ()
        documents = jobs.setdefault((without_comment(line), decision, needed), [])
        if document not in documents:
            documents.append(document)
    return [
        Job(line, tuple(names), decision, needed)
        for (line, decision, needed), names in jobs.items()
    ]


def finds(pattern: str | None, job: Job) -> bool:
    """Whether a pattern is found in DOCUMENT: LINE, for one of a job's documents."""
    return any(re.search(pattern or "", f"{name}: {job.line}") for name in job.documents)


def run_all(jobs: Sequence[Job], folder: Path, data: Path, pattern: str | None) -> list[Row]:
    """Run in order what a pattern finds and was not good before.

    Each document begins in a clean folder.
    """
    from reader_folder import ReaderFolder

    kept = json.loads((folder / _KEPT).read_text()) if (folder / _KEPT).is_file() else {}
    write_json(folder / _KEPT, kept, indent=1)
    reader, document = ReaderFolder(folder, data), ""
    commit = (commit_of(ROOT, ["."])["id"] or "unknown")[:7]
    rows = []
    for number, job in enumerate(jobs, start=1):
        name = f"{job.documents[0]}: {job.decision.command}"
        if job.decision.how != RUN or name in kept or not finds(pattern, job):
            rows.append(Row(job, **kept.get(name, {})))
            continue
        if job.documents[0] != document:
            document = job.documents[0]
            reader.clean()
        print(f"[{number}/{len(jobs)}] {name}", flush=True)
        reader.prepare(job.line, job.needs)
        began = time.monotonic()
        status, output = execute(job.decision, reader.root, reader.environment(), SECONDS)
        row = Row(job, status, round(time.monotonic() - began, 1), output, commit)
        rows.append(row)
        (folder / f"{number:03d}.txt").write_text(output, encoding="utf-8")
        print(f"    status {status}, {row.seconds:.0f} s", flush=True)
        if row.failed:
            last = "\n    ".join(output.splitlines()[-_LAST_LINES:])
            print(f"FAILED, its last lines:\n    {last}", flush=True)
        else:
            kept[name] = {"status": status, "seconds": row.seconds, "commit": commit}
            write_json(folder / _KEPT, kept, indent=1)
    return rows


def execute(
    decision: Decision, folder: Path, environment: dict[str, str], seconds: float
) -> tuple[int, str]:
    """Run a command in a folder, with another beside it if it needs one.

    Returns:
        The first status that is not 0, or 0, and all that was printed; 124 where time ran out,
        and with it what the command had started.
    """
    lines = [line for line in (decision.command, decision.beside) if line]
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryFile() as printed:
        running = [
            subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", line],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for line in lines
        ]
        status = 0
        try:
            for process in running:
                try:
                    code = process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    code = 124
                status = status or code
        finally:  # also when this tool is stopped
            for process in running:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        printed.seek(0)
        return status, printed.read().decode("utf-8", errors="replace")


def summary(rows: Sequence[Row]) -> str:
    """One sentence: how many were run, and how many are left to others."""
    counts = collections.Counter(row.job.decision.how for row in rows)
    ran = [row for row in rows if row.status is not None]
    failed = sum(row.failed for row in rows)
    minutes = sum(row.seconds for row in ran) / 60
    left = (
        (BY_SUITE, "are run by the suite"),
        (BY_CI, "by CI"),
        (BY_HAND, "by hand"),
        (OF_OTHERS, "are not run"),
    )
    others = ", ".join(f"{counts[how]} {words}" for how, words in left)
    waiting = counts[RUN] - len(ran)
    missing = f"; **{waiting} were not executed yet**" if waiting else ""
    return (
        f"Of {len(rows)} commands {len(ran)} were executed, {failed} of them failed, in "
        f"{minutes:.0f} minutes{missing}; {others}."
    )


def write_page(rows: Sequence[Row]) -> None:
    """Put what was found between the markers of the page."""
    import torch

    commits = sorted({row.commit for row in rows if row.commit})
    where = (
        f"{datetime.date.today().isoformat()}, the checkout at commit {', '.join(commits)} with "
        f"what had been changed since, {platform.system()} {platform.machine()}, Python "
        f"{platform.python_version()}, torch {torch.__version__.partition('+')[0]}"
    )
    text = DOCUMENT.read_text(encoding="utf-8")
    changed = put_between(text, START, END, f"\n{page_part(rows, where)}\n")
    if changed is None:
        raise RunError(f"{DOCUMENT} has no place for the table: put {START} and {END} into it")
    write_text(DOCUMENT, changed)


def page_part(rows: Sequence[Row], where: str) -> str:
    """The sentence, what was added by its short name, and the table."""
    used = {name for row in rows for name in row.job.decision.added}
    lines = [f"{summary(rows)} ({where}.)", "", "| added | in full |", "| --- | --- |"]
    lines += [f"| {name} | {_code(text)} |" for name, text in ADDED.items() if name in used]
    lines += ["", "| document | command | added, or why not | seconds | status |"]
    lines.append("| --- | --- | --- | ---: | --- |")
    for row in rows:
        job, decision = row.job, row.job.decision
        about = ", ".join(decision.added) or decision.reason or "nothing"
        cells = [
            ", ".join(job.documents),
            _code(job.line),
            about,
            "" if row.status is None else f"{row.seconds:.0f}",
            _status(row),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _status(row: Row) -> str:
    if row.status is None:
        return "not yet" if row.job.decision.how == RUN else row.job.decision.how
    return f"**{row.status}, failed**" if row.failed else str(row.status)


def _code(text: str) -> str:
    """HTML's element, not Markdown's span: what stands here is no command of this page."""
    escaped = html.escape(text, quote=False).replace("|", "&#124;").replace("*", "&#42;")
    return f"<code>{escaped}</code>"


def _stopped(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stopped)
    sys.exit(main())
