# SPDX-License-Identifier: Apache-2.0
"""The tutorials work as written: pages block by block in an empty folder, the notebook as well.

On a page a python block is a file, whose name is its title, a bash block is run, and blocks of
other languages are only shown. The notebook keeps the outputs of one run, made again by

    TUTORIAL_STEPS=300 python -m pytest --nbmake --overwrite docs/tutorials/own_data.ipynb
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import cv2
import pytest
from util import environment

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "tutorials"
NOTEBOOK = FOLDER / "own_data.ipynb"
SHOWN = ("", "console", "text")  # languages of blocks that are not executed
LARGEST = 200_000  # bytes of a notebook with its outputs
# Of a machine, not of a reader: the outputs of a notebook must hold none.
PLACES = (str(ROOT), "/home/", "/root/", "/tmp/", "/usr/", "/var/", "C:\\")


class Block(NamedTuple):
    """A fenced block: its language, the file that it is ("" for none), content, first line."""

    language: str
    name: str
    content: str
    line: int


def read_blocks(page):
    """The fenced blocks of a page in their order."""
    blocks = []
    for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        language, _, about = match[1].partition(" ")
        title = re.fullmatch(r'title="([\w.]+)"', about)
        name = title[1] if title else ""
        blocks.append(Block(language, name, match[2], page.count("\n", 0, match.start()) + 1))
    return blocks


def execute(page, folder):
    """Write and run a page's blocks in a folder; AssertionError names the line that failed."""
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = {**environment(), "PATH": tools, "CHECKOUT": str(ROOT)}
    for language, name, content, line in read_blocks(page):
        if language == "python":
            assert name, f'line {line}: a python block needs its file: python title="NAME"'
            (folder / name).write_text(content, encoding="utf-8")
        elif language == "bash":
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", content],
                cwd=folder,
                env=variables,
                capture_output=True,
                text=True,
                timeout=900,
            )
            said = done.stdout[-4000:] + done.stderr[-4000:]
            assert done.returncode == 0, f"line {line}: exit status {done.returncode}\n{said}"
        else:
            assert language in SHOWN, f"line {line}: {language} is neither executed nor only shown"


PAGE = """# Title

```python title="made.py"
print(2 + 3)
```

Some words, and `inline` code.

```bash
python made.py > first
cp first second
```

```console
exit 1
```
"""


def test_blocks_are_found_in_order():
    blocks = read_blocks(PAGE)
    assert [(x.language, x.name, x.line) for x in blocks] == [
        ("python", "made.py", 3),
        ("bash", "", 9),
        ("console", "", 14),
    ]
    assert blocks[1].content == "python made.py > first\ncp first second\n"


def test_blocks_are_executed_in_order(tmp_path):
    execute(PAGE, tmp_path)
    assert (tmp_path / "second").read_text() == "5\n"


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        (PAGE.replace("print(2 + 3)", "raise SystemExit(3)"), "line 9: exit status 3"),
        (PAGE.replace("cp first", "cp no_such_file"), "line 9: exit status 1"),
        (PAGE.replace("cp first second", "false | cat"), "line 9: exit status 1"),
        (PAGE.replace(' title="made.py"', ""), "line 3: a python block needs its file"),
        (PAGE.replace("```console", "```sh"), "line 14: sh is neither"),
    ],
)
def test_what_does_not_work_is_named(page, complaint, tmp_path):
    with pytest.raises(AssertionError, match=re.escape(complaint)):
        execute(page, tmp_path)


def check_sixth_paper(folder):
    """What the page promises of its files."""
    source = (folder / "ring.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 65
    losses = {}
    for name in ("ring", "fcos"):
        lines = (folder / "output" / name / "metrics.json").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        losses[name] = [row["total_loss"] for row in rows if "total_loss" in row]
        assert max(row["iteration"] for row in rows) == 19
        assert all(map(math.isfinite, losses[name]))
        assert any("bbox/AP" in row for row in rows)
    assert losses["ring"] != losses["fcos"]
    drawn, points = sorted((folder / "found").glob("*.jpg"))
    assert points.stem == f"{drawn.stem}_points"
    # With detections there are panels beside the image, which alone would keep its shape.
    assert cv2.imread(str(points)).shape != cv2.imread(str(drawn)).shape
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "Ring" in report
    assert "aligner" in report


PROMISES = {"sixth_paper.md": check_sixth_paper}


def test_every_tutorial_is_executed():
    assert {path.name for path in FOLDER.glob("*.md")} == set(PROMISES)
    assert {path.name for path in FOLDER.glob("*.ipynb")} == {NOTEBOOK.name}


@pytest.mark.parametrize("name", PROMISES)
def test_tutorial_is_executed(name, tmp_path):
    execute((FOLDER / name).read_text(encoding="utf-8"), tmp_path)
    PROMISES[name](tmp_path)


def test_python_of_the_tutorials_is_formatted(tmp_path):
    """As the package's is: a reader shall be able to put it there."""
    for name in PROMISES:
        for block in read_blocks((FOLDER / name).read_text(encoding="utf-8")):
            if block.language == "python":
                (tmp_path / block.name).write_text(block.content, encoding="utf-8")
    pytest.importorskip("ruff")
    options = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    ignored = "--per-file-ignores=test_*.py:D"  # as in tests/
    for command in (["check", *options, ignored], ["format", "--check", *options]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, str(tmp_path)],
            cwd=ROOT,  # which of the imports are our own depends on it
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_notebook_keeps_the_outputs_of_one_run():
    assert NOTEBOOK.stat().st_size < LARGEST
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}  # no warnings
    pictures = [output for output in outputs if "image/jpeg" in output.get("data", {})]
    assert len(pictures) == sum("show(" in "".join(cell["source"]) for cell in code[1:])
    words = json.dumps([output.get("text", "") for output in outputs])
    assert [place for place in PLACES if place in words] == []


def test_notebook_runs_and_leaves_nothing(tmp_path):
    pytest.importorskip("nbmake")
    before = sorted(path.name for path in FOLDER.iterdir())
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    variables = {**environment(), "TMPDIR": str(scratch)}
    variables.pop("TUTORIAL_STEPS", None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbmake", str(NOTEBOOK)],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert sorted(path.name for path in FOLDER.iterdir()) == before
    assert [path for path in scratch.rglob("*") if path.suffix in (".pth", ".html", ".png")] == []
