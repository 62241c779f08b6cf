# SPDX-License-Identifier: Apache-2.0
"""A command of the documents that does not work cannot go unnoticed, nor one that was not run."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

import pytest
from helpers_of_tools import ROOT, TOOLS
from test_docs_commands import EVERY
from test_readme import code_spans, commands

sys.path.append(str(TOOLS))
reader_folder = importlib.import_module("reader_folder")
run_documents = importlib.import_module("run_documents")
document_commands = importlib.import_module("document_commands")
Decision, Need, RUN = document_commands.Decision, document_commands.Need, document_commands.RUN
Job, Row = run_documents.Job, run_documents.Row
FILE = "output/model_final.pth"
execute, page_part = run_documents.execute, run_documents.page_part


def test_one_job_for_the_same_command_of_two_documents() -> None:
    zoo = "python -m d2_decouple.zoo"
    demo = f"python tools/demo.py --config-file output/config.yaml --weights {FILE} --show-points"
    found = run_documents.jobs_of(
        [
            ("a.md", f"{zoo}  # all"),
            ("b.md", zoo),
            ("b.md", zoo),
            ("projects/PDNet/README.md", demo),
            ("projects/SALT/README.md", demo),  # reads other weights there
        ]
    )
    assert [(job.line, job.documents) for job in found] == [
        (zoo, ("a.md", "b.md")),
        (demo, ("projects/PDNet/README.md",)),
        (demo, ("projects/SALT/README.md",)),
    ]
    assert run_documents.finds("^b.*zoo$", found[0])
    assert run_documents.finds(None, found[0])
    assert not run_documents.finds("^b.*demo", found[1])


def run(command: str, folder: Path, *, beside: str = "", seconds: float = 30) -> tuple[int, str]:
    return execute(Decision(RUN, command, beside=beside), folder, dict(os.environ), seconds)


@pytest.mark.parametrize(
    ("command", "status", "output"),
    [
        ("echo a; echo b >&2", 0, "a\nb\n"),
        ("pwd | xargs basename", 0, "here\n"),
        ("exit 3", 3, ""),
        ("false | cat", 1, ""),
        ("echo $NO_SUCH_VARIABLE_X", 1, None),
    ],
)
def test_a_command_is_executed(
    tmp_path: Path, command: str, status: int, output: str | None
) -> None:
    (tmp_path / "here").mkdir()
    found = run(command, tmp_path / "here")
    # A variable that is not set ends bash with 1 or 127, by its version.
    assert found[0] == status or (output is None and found[0])
    assert output is None or found[1] == output


def test_two_commands_run_at_the_same_time_and_either_can_fail(tmp_path: Path) -> None:
    wait = "until test -e {0}; do sleep 0.05; done"
    one, two = f"touch a; {wait.format('b')}", f"touch b; {wait.format('a')}"
    assert run(one, tmp_path, beside=two) == (0, "")  # one after the other would wait for ever
    assert run("true", tmp_path, beside="exit 4")[0] == 4
    assert run("exit 5", tmp_path, beside="true")[0] == 5


def test_a_command_that_does_not_end_is_killed_with_its_children(tmp_path: Path) -> None:
    status, _ = run("(sleep 2; touch late) & touch begun; wait", tmp_path, seconds=1)
    assert status == 124
    assert (tmp_path / "begun").exists()
    time.sleep(1.5)
    assert not (tmp_path / "late").exists()


def test_what_was_begun_ends_with_the_tool(tmp_path: Path, monkeypatch) -> None:
    def stopped(process, seconds=None):
        while not (tmp_path / "b").exists():
            time.sleep(0.02)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(run_documents.subprocess.Popen, "wait", stopped)
    with pytest.raises(KeyboardInterrupt):
        run("sleep 1; touch late", tmp_path, beside="touch b; sleep 1; touch late")
    time.sleep(1.3)
    assert not (tmp_path / "late").exists()


JOB = Job(
    "python -m d2_decouple.zoo", ("a.md",), Decision(RUN, "python -m d2_decouple.zoo"), needs=()
)


def test_a_status_or_a_traceback_is_a_failure() -> None:
    assert not Row(JOB, 0, 1.0, "fine").failed
    assert Row(JOB, 2, 1.0, "fine").failed
    assert Row(JOB, 0, 1.0, "x\nTraceback (most recent call last):\n  y\n").failed
    logged = "E1126 api.py:1008] Traceback (most recent call last):\n"  # by torchrun's agent
    assert not Row(JOB, 0, 1.0, logged).failed
    assert Row(JOB, 1, 1.0, logged).failed
    assert not Row(JOB).failed  # was not run


class Reader:
    """In the place of the real folder: a program `python` that does what a file says."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.root, self.cleaned, self.prepared = folder, 0, []
        program = folder / "python"
        program.write_text("#!/bin/sh\necho called with $*\ncase $* in *fuzz*) exit 7;; esac\n")
        program.chmod(0o755)
        Reader.last = self

    def clean(self) -> None:
        self.cleaned += 1

    def prepare(self, command: str, needed: tuple[Need, ...]) -> None:
        self.prepared.append(command)

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PATH": f"{self.root}{os.pathsep}{os.environ['PATH']}"}


GOOD = [
    ("README.md", "python -m d2_decouple.zoo"),
    ("README.md", "make run"),
    ("docs/zoo.md", "python -m d2_decouple.zoo update"),
]
BAD = ("docs/zoo.md", "python tools/fuzz.py --cases")


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """Calls the tool for commands, with a stand-in for the folder."""
    monkeypatch.setattr(reader_folder, "ReaderFolder", Reader)
    (tmp_path / "data" / "Annotations").mkdir(parents=True)
    page = tmp_path / "commands.md"
    page.write_text(f"# Page\n\n{run_documents.START}\nold\n{run_documents.END}\n\nend\n")
    monkeypatch.setattr(run_documents, "DOCUMENT", page)
    monkeypatch.setattr(run_documents, "ROOT", tmp_path)

    def call(given, *options):
        monkeypatch.setattr(run_documents, "read_commands", lambda: given)
        return run_documents.main(["--data", str(tmp_path / "data"), *options])

    call.page = page
    return call


def test_what_is_run_and_what_is_left_is_counted(tool, capsys) -> None:
    assert tool(GOOD) == 0
    assert Reader.last.prepared == [GOOD[0][1], GOOD[2][1]]
    assert Reader.last.cleaned == 2  # at the beginning of each document
    said = capsys.readouterr().out
    assert "Of 3 commands 2 were executed, 0 of them failed, in 0 minutes" in said
    assert "0 are run by the suite, 0 by CI, 1 by hand, 0 are not run." in said


def test_a_command_that_fails_fails_the_run_and_shows_its_last_lines(tool, capsys) -> None:
    assert tool([BAD, *GOOD]) == 1
    said = capsys.readouterr().out
    assert "status 7" in said
    assert "FAILED, its last lines:\n    called with tools/fuzz.py --cases" in said
    assert "3 were executed, 1 of them failed" in said  # the others were run all the same


def test_what_was_good_is_not_run_again(tool, tmp_path, capsys) -> None:
    folder = ["--folder", str(tmp_path / "kept")]
    assert tool([BAD, *GOOD], *folder) == 1
    assert len(Reader.last.prepared) == 3
    assert json.loads((tmp_path / "kept" / "good.json").read_text()).keys() == {
        f"{document}: {line}" for document, line in (GOOD[0], GOOD[2])
    }
    assert tool([BAD, *GOOD], *folder) == 1
    assert Reader.last.prepared == [BAD[1]]
    assert tool(GOOD, *folder) == 0
    assert Reader.last.prepared == []
    assert "2 were executed, 0 of them failed" in capsys.readouterr().out.splitlines()[-1]


def test_only_some_are_run_and_the_table_says_so(tool, capsys) -> None:
    assert tool([BAD, *GOOD], "--only", "README.*zoo", "--write") == 0
    assert Reader.last.prepared == [GOOD[0][1]]
    said = "Of 4 commands 1 were executed, 0 of them failed, in 0 minutes; **2 were not executed"
    assert said in capsys.readouterr().out
    text = tool.page.read_text()
    assert said in text
    assert text.count(" | not yet |\n") == 2


def test_the_table_is_written_and_shows_failures(tool) -> None:
    assert tool([BAD, *GOOD], "--write") == 1
    text = tool.page.read_text()
    assert text.startswith(f"# Page\n\n{run_documents.START}\nOf 4 commands 3 were executed, 1 of")
    assert text.endswith(f"|\n{run_documents.END}\n\nend\n")
    assert "old" not in text
    rows = [line for line in text.splitlines() if line.startswith(("| README", "| docs"))]
    assert rows == [
        "| docs/zoo.md | <code>python tools/fuzz.py --cases</code> | nothing | 0 | **7, failed** |",
        "| README.md | <code>python -m d2_decouple.zoo</code> | nothing | 0 | 0 |",
        "| README.md | <code>make run</code> | makes an environment first: 2 GB from the network "
        "|  | by hand |",
        "| docs/zoo.md | <code>python -m d2_decouple.zoo update</code> | nothing | 0 | 0 |",
    ]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--only", "no such"], "no command of the documents has 'no such'"),
        (["--data", "nowhere"], "nowhere holds no Annotations; type --data and BCCD's folder"),
        (["--folder", "{data}"], "is not empty, and not of this tool; type another --folder"),
    ],
)
def test_what_prevents_a_run_is_said(tool, tmp_path, capsys, options, complaint) -> None:
    options = [word.format(data=tmp_path / "data") for word in options]
    assert tool(GOOD, *options) == 1
    assert complaint in capsys.readouterr().err


def test_a_run_that_is_stopped_says_how_to_go_on(tool, monkeypatch, capsys) -> None:
    def stopped(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_documents, "execute", stopped)
    assert tool(GOOD) == 130
    assert "with --folder the same command goes on" in capsys.readouterr().err


def test_a_page_without_markers_is_named(tool, capsys) -> None:
    tool.page.write_text("# Page\n")
    assert tool(GOOD, "--write") == 1
    assert f"put {run_documents.START} and {run_documents.END} into it" in capsys.readouterr().err
    assert tool.page.read_text() == "# Page\n"


def test_commands_of_the_table_are_no_commands_of_the_page(tmp_path, monkeypatch) -> None:
    line = 'python -m d2_decouple.zoo list "fcos_*" | cat <x'
    job = JOB._replace(line=line, decision=Decision(RUN, line, ("yacs training",)))
    part = page_part([Row(job, 0, 61.6)], "here")
    assert "| yacs training | <code>SOLVER.MAX_ITER 2" in part
    assert "one kill" not in part  # what no row has is not explained
    escaped = 'list "fcos_&#42;" &#124; cat &lt;x</code> | yacs training | 62 | 0 |'
    assert part.splitlines()[-1].endswith(escaped)
    (tmp_path / "page.md").write_text(part)
    monkeypatch.setattr(sys.modules["test_readme"], "ROOT", tmp_path)
    assert commands("page.md") == []
    assert code_spans("page.md") == []


def test_the_page_of_this_repository_has_its_place() -> None:
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert text.count(run_documents.START) == text.count(run_documents.END) == 1
    assert run_documents.read_commands() == EVERY
