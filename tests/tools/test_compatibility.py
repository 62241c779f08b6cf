# SPDX-License-Identifier: Apache-2.0
"""The table of environments counts what a report says, and the oldest environment is the oldest."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from helpers_of_tools import TOOLS

sys.path.insert(0, str(TOOLS))
compatibility = importlib.import_module("compatibility")

REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="test_good"/>
<testcase classname="tests.a" name="test_other"/>
<testcase classname="tests.a" name="test_bad"><failure message="no"/></testcase>
<testcase classname="tests.a" name="test_bad"><error message="also in its teardown"/></testcase>
<testcase classname="tests.b" name="test_gpu"><skipped message="there is no GPU"/></testcase>
</testsuite></testsuites>"""
VERSIONS = {
    "python": "3.10.13",
    "detectron2": "0.6",
    "torch": "2.4.1",
    "torchvision": "0.19.1",
    "numpy": "1.24.4",
    "onnxruntime": "1.20.1",
    "opencv-python-headless": "4.9.0.80",
}


def found(**changed: object) -> compatibility.Outcome:
    about = {
        "environment": "oldest",
        "date": "2026-11-26",
        "commit": "0123abc",
        "system": "Linux x86_64",
        "versions": VERSIONS,
        "tests": "",
        "minutes": 12.34,
    }
    return compatibility.outcome(ElementTree.fromstring(REPORT), **{**about, **changed})


def test_a_report_is_counted() -> None:
    assert found().passed == 2
    assert found().skipped == 1
    assert found().failed == ["tests.a.test_bad"]


def test_the_oldest_environment_has_the_lowest_release_of_everything() -> None:
    pytest.importorskip("tomllib", reason="Python 3.10 has no reader for pyproject.toml")
    wanted = compatibility.requirements(TOOLS.parent / "pyproject.toml")
    lines = compatibility.lowest(wanted)
    assert "torch==2.4.*" in lines
    assert "omegaconf==2.1.*" in lines  # has an upper bound as well
    assert any(line.startswith("onnxruntime==") for line in lines)  # of an extra
    assert not any(line.startswith(("pytest", "mkdocs", "ruff")) for line in lines)
    with pytest.raises(compatibility.CompatibilityError, match=r"'tabulate' .* no lower bound"):
        compatibility.lowest(["numpy>=1.24", "tabulate"])


def test_only_the_oldest_environment_is_held_back(tmp_path: Path) -> None:
    assert compatibility.constraints("newest", tmp_path).read_text() == ""


def test_rows_are_kept_and_written_into_the_document(tmp_path: Path) -> None:
    document, results = tmp_path / "a.md", tmp_path / "r.json"
    newest = {**VERSIONS, "python": "3.13.0"}
    rows = [found(environment="newest", versions=newest), found(tests="tests/layers")]
    results.write_text(json.dumps({row.environment: row._asdict() for row in rows}))
    document.write_text(f"before\n{compatibility.START}\nold\n{compatibility.END}\nafter\n")
    assert compatibility.main(["--results", str(results), "--write", str(document)]) == 0
    lines = document.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[-1] == "after"
    assert "| oldest: `tests/layers` | 3.10.13 | 2.4.1 | 1.24.4 | 0.6 |" in lines[4]
    assert lines[4].endswith("| 2 | 1 | 1 | 12 | 2026-11-26 | 0123abc |")
    assert lines[5].startswith("| newest | 3.13.0 |")
    assert "old" not in lines


def test_what_cannot_be_done_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "a.md"
    document.write_text("no markers")
    assert compatibility.main(["--write", str(document)]) == 1
    assert "the document needs a line '<!-- compatibility -->'" in capsys.readouterr().err
    assert document.read_text() == "no markers"
    assert compatibility.main(["head"]) == 1
    assert "--detectron2 DIR goes with head" in capsys.readouterr().err
    assert compatibility.main(["head", "--detectron2", str(tmp_path)]) == 1
    assert "has no detectron2/__init__.py" in capsys.readouterr().err


def test_a_clone_is_made_and_brought_up_to_date(tmp_path: Path) -> None:
    folder = tmp_path / "clones" / "usual"
    name = compatibility.check_out(folder)
    assert (folder / "pyproject.toml").is_file()
    assert compatibility.check_out(folder) == name
    (folder / ".git" / "HEAD").unlink()
    with pytest.raises(compatibility.CompatibilityError, match="cannot be brought to"):
        compatibility.check_out(folder)
