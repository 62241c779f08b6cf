# SPDX-License-Identifier: Apache-2.0
"""What the documents name exists: files, recipes, commands, options, keys; their code runs."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import LazyConfig, instantiate
from torch import Tensor
from util import excite

from d2_decouple.checkpoint import Checkpointer
from d2_decouple.config import config_names, find_config, get_config
from d2_decouple.modeling import SharedContext

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *(
        str(path.relative_to(ROOT))
        for pattern in ("projects/*/README.md", "docs/**/*.md")
        for path in sorted(ROOT.glob(pattern))
        if "reference" not in path.parts  # its links lead to pages that are made from docstrings
    ),
]

# Files of the reader, of a result or of Detectron2's model zoo, not of this repository.
OF_THE_READER = (".venv/", "output/", "DETECTRON2/", "FOLDER/", "config.yaml", "COCO-Detection/")


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def split_text(document: str) -> tuple[str, list[tuple[str, str]]]:
    """A document's prose, and its fenced blocks as (language, content)."""
    # Every second piece is inside of fences, and begins with the language's name.
    pieces = re.split(r"^```", text_of(document), flags=re.MULTILINE)
    fenced = [piece.split("\n", 1) for piece in pieces[1::2]]
    return "".join(pieces[::2]), [(language, content) for language, content in fenced]


def blocks(document: str, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return [content for name, content in split_text(document)[1] if name == language]


def code_spans(document: str) -> list[str]:
    """Inline code, line breaks made spaces."""
    prose, _ = split_text(document)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def made_by(document: str) -> set[str]:
    """Files that a tutorial makes: they are the titles of its blocks."""
    return set(re.findall(r'^```\w+ title="([^"]+)"$', text_of(document), re.MULTILINE))


def commands(document: str) -> list[list[str]]:
    """Every shell command of a document as words."""
    lines = [line for block in blocks(document, "bash") for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in (*lines, *code_spans(document))]
    starts = ("python", "torchrun", "make", ".ci/run", ".venv/bin/python")
    return [command for command in words if command and command[0] in starts]


def launched(command: list[str]) -> tuple[str, list[str]] | None:
    """The module (`a.b`) or script (`a/b.py`) of ours that a command starts, and its arguments."""
    for index, word in enumerate(command):
        if word == "-m" and command[index + 1].startswith("d2_decouple"):
            return command[index + 1], command[index + 2 :]
        if word.startswith("tools/"):
            return word, command[index + 1 :]
    return None


@functools.cache
def help_of(target: str) -> str:
    how = [target] if target.endswith(".py") else ["-m", target]
    done = subprocess.run(
        [sys.executable, *how, "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_named_files_exist(document: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", text_of(document))
    paths = [
        word
        for span in code_spans(document)
        for word in span.split()
        if re.fullmatch(r"[\w./-]+\.(py|yaml|toml|md)|[\w.-]+/[\w./-]+", word)
        and not word.startswith(OF_THE_READER)
        and word not in made_by(document)
    ]
    assert links or paths or document.startswith("docs/")
    folder = (ROOT / document).parent
    for path in [*links, *paths]:
        assert (folder / path).exists() or (ROOT / path).exists(), f"{document} names {path}"


def test_layout_lists_every_folder_of_the_repository() -> None:
    (layout,) = (block for block in blocks("README.md", "") if "configs/" in block)
    named = set(re.findall(r"^(\w+)/", layout, re.MULTILINE))
    ours = {"d2_decouple", "csrc", "configs", "projects", "docs", "results", "tools", "tests"}
    assert named == ours
    assert all((ROOT / name).is_dir() for name in named)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document: str) -> None:
    targets = set(re.findall(r"^([\w-]+):(?!=)", text_of("Makefile"), re.MULTILINE))
    calls = [command for command in commands(document) if command[0] == "make"]
    named = {word for command in calls for word in command[1:] if "=" not in word}
    assert named or document.startswith("docs/")
    assert named <= targets, f"{document} names {named - targets}, the Makefile has {targets}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_options_exist(document: str) -> None:
    for command in commands(document):
        target, arguments = launched(command) or ("", [])
        for option in (word for word in arguments if word.startswith("--")):
            assert option in help_of(target), f"{document}: {target} has no {option}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_recipes_of_commands_exist_and_know_the_keys(document: str) -> None:
    for command in commands(document):
        if "--config-file" not in command:
            continue
        name = command[command.index("--config-file") + 1]
        if name.startswith(OF_THE_READER) or name in made_by(document):
            continue
        assert find_config(name).is_file()
        if not name.endswith(".yaml"):
            get_config(name, [word for word in command if re.match(r"[\w.]+=", word)])


def test_loose_overrides_of_the_readme_are_known_keys() -> None:
    spans = [s for s in code_spans("README.md") if re.fullmatch(r"(\w+\.[\w.]+=\S+ ?)+", s)]
    assert spans
    for span in spans:
        get_config("fcos_R_18_FPN_bccd", span.split())


def test_every_recipe_has_a_row_in_the_results_and_every_row_a_recipe() -> None:
    named = []
    for document in DOCUMENTS:
        rows = re.findall(r"^\| \[(\w+)\]\(([^)]+)\)", text_of(document), re.MULTILINE)
        for name, link in rows:
            assert find_config(name) == ((ROOT / document).parent / link).resolve()
            named.append(name)
    assert sorted(named) == config_names()


def test_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    inference, code = blocks("README.md", "python")
    compile(inference, "README.md", "exec")  # run by the test below, on a model
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert str(config_names()) in capsys.readouterr().out
    assert names["model"].head.cls_score.out_channels == 20


def test_inference_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "output").mkdir()
    cfg = get_config("fcos_R_18_FPN_bccd")
    LazyConfig.save(cfg, str(tmp_path / "output" / "config.yaml"))
    model = instantiate(cfg.model)
    excite(model)
    Checkpointer(model, str(tmp_path / "output"), extras={"classes": ["a", "b", "c"]}).save(
        "model_best"
    )
    picture = next((ROOT / "tests" / "data" / "bccd_mini" / "JPEGImages").glob("*.jpg"))
    shutil.copy(picture, tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(blocks("README.md", "python")[0], "README.md", "exec"), names)
    assert names["detections"].image_size == (480, 640)
    assert len(names["detections"])
    assert "a 0." in capsys.readouterr().out


def test_method_of_the_contributing_guide_goes_into_its_slot() -> None:
    source, recipe = blocks("CONTRIBUTING.md", "python")
    names: dict[str, Any] = {"SharedContext": SharedContext, "F": F, "Tensor": Tensor}
    exec(compile(source, "CONTRIBUTING.md", "exec"), names)
    cfg = get_config("fcos_R_18_FPN_bccd")
    host = instantiate(cfg.model.head)
    # The recipe's own line, with the class that was just made.
    (line,) = [line for line in recipe.splitlines() if line.startswith("model.")]
    exec(line, {"model": cfg.model, "TopDownContext": names["TopDownContext"]})
    head = instantiate(cfg.model.head)
    head.load_state_dict(host.state_dict())
    features = [torch.randn(1, 64, size, size + 1) for size in (16, 8, 4, 2, 1)]

    changed, plain = head(features), host(features)

    assert changed.logits.shape == plain.logits.shape
    assert not torch.allclose(changed.logits, plain.logits)
    assert torch.equal(changed.boxes, plain.boxes)
