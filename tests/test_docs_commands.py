# SPDX-License-Identifier: Apache-2.0
"""Every command of the documents is executed by a test, or its own parser takes it.

The pages below ``docs/tutorials`` are executed (``test_tutorials.py``). Of the others each command
of this package runs up to the end of its command line: real parser, nothing behind it. What then
remains, programs of others, is listed here, so that none comes in unnoticed. Names of recipes, keys
and files are checked in ``test_readme.py``, too.
"""

import argparse
import ast
import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from test_readme import DOCUMENTS, ROOT, blocks, launched

from d2_decouple.config import find_config, get_config
from d2_decouple.data import register_bccd
from d2_decouple.engine.inference_config import yacs_config
from d2_decouple.engine.methods import chosen_recipe

PROGRAMS = {"python", "torchrun", "make", ".ci/run", ".venv/bin/python"}
# Not run: they need a network, another machine or the reader's own environment.
OF_OTHERS = {"git", "mkdocs", "pip", "pre-commit", "sbatch", "scancel", "srun", "sudo"}
OF_THE_SHELL = {"cd", "export", "mkdir", "source"}
# They have no options of their own, and so no parser that could stop them.
WITHOUT_PARSER = {"d2_decouple.config", "tools/sanitize.py"}
PLACEHOLDER = r"[A-Z][A-Z0-9_]*(\.\w+)?|\$.*|(output|FOLDER|DIR)/.*"


def lines_of(document):
    """The commands of a document's bash blocks, without comments."""
    lines = [line.strip() for block in blocks(document, "bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def words_of(line):
    """A line's simple commands as words, without assignments in front of them."""
    found = []
    for part in re.split(r"\s(?:&&|;|\|)\s", line):
        words = shlex.split(part, comments=True)
        while words and re.match(r"[A-Z][A-Z0-9_]*=", words[0]):
            words.pop(0)
        found.append(words)
    return [words for words in found if words]


EVERY = [(document, line) for document in DOCUMENTS for line in lines_of(document)]
EXECUTED = [pair for pair in EVERY if pair[0].startswith("docs/tutorials/")]
OURS = [
    (document, line, *launched(words))
    for document, line in EVERY
    for words in words_of(line)
    if launched(words)
]


class ParsedError(Exception):
    """Carries what a command line was read as, in the place of running it."""


def parse(target, arguments, monkeypatch):
    """The namespace that a module or script of ours makes of arguments; nothing else is done.

    SystemExit, with the parser's complaint on stderr, if it does not take them.
    """
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        raise ParsedError(original(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [target, *arguments])
    monkeypatch.syspath_prepend(str((ROOT / target).parent))
    with pytest.raises(ParsedError) as parsed:
        start(target, arguments)
    return parsed.value.args[0]


def start(target, arguments):
    if target.endswith(".py"):
        runpy.run_path(str(ROOT / target), run_name="__main__")
    else:
        module = importlib.import_module(target)
        if hasattr(module, "__path__"):  # a package
            module = importlib.import_module(f"{target}.__main__")
        module.main(arguments)


def check_config(name, overrides):
    """A recipe's name, or a file of ours, with the keys that are set."""
    if re.fullmatch(PLACEHOLDER, name):
        return
    register_bccd()
    if Path(name).suffix in (".yaml", ".yml"):
        yacs_config(find_config(ROOT / name if "/" in name else name), overrides)
    else:
        get_config(ROOT / name if "/" in name else name, overrides)


def check_meaning(options):
    """What a parser does not look at: methods, recipes, keys."""
    values = vars(options)
    overrides = values.get("opts") or values.get("overrides") or []
    if values.get("method") and "host" in values:
        recipe = chosen_recipe(values["method"], values["host"], values["size"] or "s")
        get_config(recipe, overrides)
    elif isinstance(values.get("config_file"), str) and values["config_file"]:
        check_config(values["config_file"], overrides)
    elif overrides:
        get_config("fcos_R_18_FPN_bccd", overrides)
    for model in values.get("model") or ():
        if len(model) == 3:  # of analyze: name, config, weights
            check_config(model[1], [])


def test_documents_have_commands():
    assert EXECUTED
    assert {target for *_, target, _ in OURS} >= {
        "d2_decouple.train",
        "d2_decouple.analyze",
        "d2_decouple.data.checks",
        "tools/demo.py",
        "tools/train_net.py",
        "tools/convert_checkpoint.py",
    }


@pytest.mark.parametrize(("document", "line"), EVERY)
def test_every_command_is_of_a_known_kind(document, line):
    assert not line.endswith("\\"), f"{document}: one line a command, so that it can be copied"
    for words in words_of(line):
        program = words[0]
        known = PROGRAMS | OF_OTHERS | OF_THE_SHELL
        assert program in known, f"{document} runs {program}, which no test here knows: {line}"
        if program in ("python", ".venv/bin/python") and launched(words) is None:
            module = words[2] if words[1] == "-m" else ""
            script = words[1].startswith(("DETECTRON2/", ".venv/")) or (ROOT / words[1]).is_file()
            others = module in ("build", "mkdocs", "pip", "pytest")
            assert others or script, f"{document} runs what does not exist: {line}"


@pytest.mark.parametrize(("document", "line", "target", "arguments"), OURS)
def test_every_command_of_ours_is_understood(document, line, target, arguments, monkeypatch):
    if target in WITHOUT_PARSER:
        assert arguments == []
        return
    options = parse(target, arguments, monkeypatch)
    if (document, line) not in EXECUTED:
        check_meaning(options)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_of_the_documents_is_python_and_imports_what_exists(document):
    for code in blocks(document, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("d2_decouple"):
                if "top_down" in node.module:  # made by the reader, with CONTRIBUTING's own words
                    continue
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{document}: {node.module}.{alias.name}"


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (["--config-file", "fcos_R_18_FPN_bccd", "train.max_itr=3"], "max_itr"),
        (["--config-file", "fcos_R_18_FPN", "train.max_iter=3"], "fcos_R_18_FPN"),
        (["--dataset", "FOLDER", "--method", "pdnt"], "no such method"),
        (["--dataset", "FOLDER", "--method", "fcos", "model.clases=3"], "clases"),
        (["--dataset", "FOLDER", "train.maxiter=3"], "maxiter"),
        (
            ["--config-file", "configs/baselines/fcos_R_18_FPN_bccd.yaml", "SOLVER.BASE_L", "1"],
            "BASE_L",
        ),
    ],
)
def test_a_wrong_command_is_noticed(command, complaint, monkeypatch):
    with pytest.raises(ValueError, match=complaint):
        check_meaning(parse("d2_decouple.train", command, monkeypatch))


def test_an_unknown_option_or_recipe_of_a_script_is_noticed(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse("tools/demo.py", ["--config-fil", "x", "--output", "y"], monkeypatch)
    assert "--input" in capsys.readouterr().err
    options = parse(
        "tools/analyze_model.py",
        ["--dataset", "bccd_test", "--output", "x", "--model", "A", "fcos_R_18", "W"],
        monkeypatch,
    )
    with pytest.raises(ValueError, match="fcos_R_18"):
        check_meaning(options)


def test_commands_are_taken_apart():
    assert words_of("A=1 B=2 make test  # note") == [["make", "test"]]
    assert words_of("pip install x && pre-commit install") == [
        ["pip", "install", "x"],
        ["pre-commit", "install"],
    ]
