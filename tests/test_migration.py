# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/migration.md name keys of ours that exist, with the values of our recipes."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf

from d2_decouple.checkpoint.convert import CONVERTERS, WAYS_BACK
from d2_decouple.config import config_names, get_config
from d2_decouple.train import parse_arguments

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "migration.md"
COMPARISON = ROOT / "docs" / "comparison.md"

HEADER = ["theirs", "ours", "there", "here"]
KEY = re.compile(r"(?:train|model|dataloader|optimizer|lr_multiplier)\.[\w.]+")
RECIPE = re.compile(r"[a-z0-9_]+_(?:R|R2|X)_\d+_\w+")


class Row(NamedTuple):
    """A row of a table: the recipe above it, the row as written, and what its cells name.

    A value belongs to the key at its place, or to all keys if it is the only one.
    """

    recipe: str
    line: str
    keys: list[str]
    options: list[str]
    values: list[str]


def spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def rows_of(text: str) -> Iterator[Row]:
    """Every row of every table with the header; tables belong to the recipe named above them."""
    recipe, inside = "", False
    for line in text.splitlines():
        named = re.search(r"Recipe: `(\w+)`", line)
        if line.startswith("#"):
            recipe = ""
        if named:
            recipe = named.group(1)
        if not line.startswith("|"):
            inside = False
        elif cells(line) == HEADER:
            inside = True
        elif inside and not re.fullmatch(r"[|\s-]+", line):
            content = cells(line)
            assert len(content) == len(HEADER), f"{len(content)} cells: {line}"
            ours = spans(content[1])
            keys = [span for span in ours if KEY.fullmatch(span)]
            options = [span for span in ours if span.startswith("--")]
            values = spans(content[3])
            if len(values) == 1:
                values *= len(keys)
            assert len(values) in (0, len(keys)), f"keys and values do not match: {line}"
            yield Row(recipe, line, keys, options, values)


def value_at(cfg: Any, key: str) -> Any:
    """What a recipe has at a dotted key, or what the constructor there takes without it.

    Unlike an override, `**options` of a constructor is not enough: somebody must know the name.
    """
    *parents, last = key.split(".")
    node = cfg
    for part in parents:
        node = node[int(part) if isinstance(node, ListConfig) else part]
    if isinstance(node, ListConfig):
        return node[int(last)]
    if last in node:
        return node[last]
    target = node["_target_"]
    called = locate(target) if isinstance(target, str) else target
    family = called.__mro__ if isinstance(called, type) else (called,)
    for kin in family:
        parameter = inspect.signature(kin).parameters.get(last)
        if parameter is not None:
            return parameter.default
    raise KeyError(f"{key}: {called.__name__} has no {last}")


def shown(value: Any) -> str:
    """A value as the tables write it: a literal, or the name of a function or class."""
    if isinstance(value, DictConfig):
        value = value["_target_"]
        value = locate(value) if isinstance(value, str) else value
    if callable(value):
        return value.__name__
    if isinstance(value, ListConfig):
        value = OmegaConf.to_container(value, resolve=True)
    return repr(list(value) if isinstance(value, tuple) else value)


def typed(literal: str) -> str:
    """A literal of Python as it is typed behind a key."""
    return "null" if literal == "None" else literal


def is_literal(value: str) -> bool:
    try:
        ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return False
    return True


@functools.cache
def config(recipe: str) -> Any:
    return get_config(recipe)


TEXT = DOCUMENT.read_text(encoding="utf-8")
PROSE = "".join(TEXT.split("```")[::2])  # every second piece is inside of fences
ROWS = list(rows_of(TEXT))
RECIPES = sorted({row.recipe for row in ROWS})


def test_the_tables_are_read() -> None:
    assert len(ROWS) == TEXT.count("\n| ") - 2 * TEXT.count("\n| theirs | ours |") - 6
    assert len(RECIPES) == 9
    assert sum(len(row.keys) for row in ROWS) > 150
    assert sum(len(row.values) for row in ROWS) > 150


def test_every_named_recipe_exists() -> None:
    named = {span for span in spans(PROSE) if RECIPE.fullmatch(span)}
    commands = set(re.findall(r"--config-file (\S+)", TEXT))
    assert len(named) > 15
    assert named | commands | set(RECIPES) <= set(config_names())


@pytest.mark.parametrize("recipe", RECIPES)
def test_keys_exist_with_the_values_of_the_last_column(recipe: str) -> None:
    for row in (row for row in ROWS if row.recipe == recipe):
        found = [shown(value_at(config(recipe), key)) for key in row.keys]
        assert row.values in ([], found), row.line


@pytest.mark.parametrize("recipe", RECIPES)
def test_keys_can_be_typed(recipe: str) -> None:
    pairs = {
        key: value
        for row in ROWS
        if row.recipe == recipe
        for key, value in zip(row.keys, row.values or [""] * len(row.keys), strict=True)
        if is_literal(value)
    }
    assert pairs
    typed_cfg = get_config(recipe, [f"{key}={typed(value)}" for key, value in pairs.items()])
    for key, value in pairs.items():
        assert shown(value_at(typed_cfg, key)) == value, key


def test_options_of_the_tables_exist() -> None:
    known = {f"--{name.replace('_', '-')}" for name in vars(parse_arguments([]))}
    named = {option for row in ROWS for option in row.options}
    assert {"--dataset", "--resume", "--method"} <= named <= known


def test_overrides_of_commands_and_prose_are_known_keys() -> None:
    words = [word for span in spans(PROSE) for word in span.split()]
    words += [word for block in TEXT.split("```")[1::2] for word in block.split()]
    overrides = {word for word in words if "=" in word and KEY.match(word)}
    assert len(overrides) > 5
    for override in overrides:
        key = override.partition("=")[0]
        assert any(has_key(config(recipe), key) for recipe in RECIPES), override


def has_key(cfg: Any, key: str) -> bool:
    try:
        value_at(cfg, key)
    except (KeyError, AttributeError, TypeError):
        return False
    return True


def test_a_key_that_nobody_knows_is_found_out() -> None:
    """`**options` would swallow it, which is why the tables are not checked with overrides."""
    cfg = get_config("decoupled_rcnn_R_50_FPN_2x", ["model.roi_heads.box_batch=1"])
    assert cfg.model.roi_heads.box_batch == 1
    plain = config("decoupled_rcnn_R_50_FPN_2x")
    with pytest.raises(KeyError, match="DecoupledROIHeads has no box_batch"):
        value_at(plain, "model.roi_heads.box_batch")
    # A name that a base class knows is one: Detectron2's ROIHeads has it, and True without it.
    assert value_at(plain, "model.roi_heads.proposal_append_gt") is True


def test_converters_are_listed_with_their_ways_back() -> None:
    table = TEXT.split("<!-- converters -->")[1].split("<!-- end -->")[0]
    content = [cells(line) for line in table.strip().splitlines()[2:]]
    assert {spans(kind)[0] for kind, _, _ in content} == set(CONVERTERS)
    assert {spans(kind)[0] for kind, _, back in content if back == "yes"} == set(WAYS_BACK)
    assert {word for _, _, word in content} <= {"yes", "no"}
    commands = re.findall(r"convert_checkpoint.py (--back )?(\w+) ", TEXT)
    assert {kind for back, kind in commands if not back} == set(CONVERTERS)
    assert {kind for back, kind in commands if back} == set(WAYS_BACK)


def test_links_of_both_documents_lead_somewhere() -> None:
    for document in (DOCUMENT, COMPARISON):
        links = re.findall(r"\]\((?!https?:)([^)#\s]+)", document.read_text(encoding="utf-8"))
        assert links
        assert all((document.parent / link).exists() for link in links), links


def test_every_cell_about_another_library_has_its_source() -> None:
    body, sources = COMPARISON.read_text(encoding="utf-8").split("## Sources")
    table = [cells(line) for line in body.splitlines() if line.startswith("| ")]
    assert len(table) > 25
    assert {row[0] for row in table if row[2] == "torchvision"} == {"point"}
    marks: set[str] = set()
    for point, _, *others in table:
        assert len(others) == 4, point
        for cell in others if point not in ("point", "---") else []:
            found = re.findall(r"\(((?:[A-Z]\d+(?:, )?)+)\)", cell)
            assert found or cell == "not measured", (point, cell)
            marks.update(mark for group in found for mark in group.split(", "))
    listed = re.findall(r"^- \*\*([A-Z]\d+)\*\*: ", sources, re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == marks
