# SPDX-License-Identifier: Apache-2.0
"""Making ``table.json`` from a checkout's documents, results and recipes."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf

from ..config import config_names, find_config, get_config, nearest
from ..evaluation.files import write_text
from .catalogue import TABLE, Costs, ZooError, read_table
from .costs import count_costs

__all__ = ["known_of", "model_hash", "result_rows", "rows_of", "update"]

_logger = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[2]
_ROW = re.compile(
    r"^\| \[(?P<name>\w+)\]\([^)]+\)(?:, )?(?P<about>[^|]*)\|(?P<data>[^|]*)\|(?P<paper>[^|]*)\|",
    re.MULTILINE,
)
# "41.9 to 42.1" is no AP of the paper's, "1.4 below ..." a difference.
_AP = re.compile(r"(\d\d\.\d)(?! to)\b")
_COCO = ("val2017", "test-dev")  # in tables that speak of COCO in their heading


def update(*, recount: bool = False, only: Collection[str] | None = None) -> tuple[int, int]:
    """Write ``table.json`` anew; costs are counted where the model differs from the kept one.

    Args:
        recount: count all costs.
        only: count these recipes' costs alone; others that changed lose theirs.

    Returns:
        How many models there are, and of how many costs were counted.

    Raises:
        ZooError: this is no checkout, a document and the recipes do not agree, or ``only`` names
            no recipe.
    """
    before = read_table() if TABLE.is_file() else {}
    table, changed = known_of(), list[str]()
    if unknown := sorted({*(only or ())} - table.keys()):
        raise ZooError(f"no recipe {unknown[0]!r}; {nearest(unknown[0], table)}")
    for name, known in table.items():
        cfg = get_config(name)
        known.update(_schedule(cfg), model=model_hash(cfg))
        kept = before.get(name, {})
        if "costs" in kept and kept.get("model") == known["model"] and not recount:
            known["costs"] = kept["costs"]
        elif only is None or name in only:
            changed.append(name)
    _write(table)
    for name in changed:  # one by one: who stops it here keeps what was counted
        if costs := _costs(name):
            table[name]["costs"] = {**costs._asdict(), "image": list(costs.image)}
            _write(table)
    return len(table), sum("costs" in table[name] for name in changed)


def _write(table: Mapping[str, Any]) -> None:
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(x)}" for name, x in sorted(table.items()))
    write_text(TABLE, f"{{\n{lines}\n}}\n")
    read_table.cache_clear()


def known_of(root: Path = _ROOT) -> dict[str, dict[str, Any]]:
    """By recipe, what documents and results say of it.

    Raises:
        ZooError: there are no documents, or a recipe has no row or two.
    """
    found: dict[str, dict[str, Any]] = {}
    for document in _documents(root):
        for name, row in rows_of(document.read_text(encoding="utf-8")):
            if name in found:
                raise ZooError(f"{name} has a second row in {document}; take one of them away")
            found[name] = row
    missing = sorted(set(config_names()) - found.keys())
    unknown = sorted(found.keys() - set(config_names()))
    if missing or unknown:
        raise ZooError(
            f"in the documents below {root}, recipes without a row are {missing}, rows without a "
            f"recipe {unknown}; a row is | [NAME](FILE) | data | AP, paper | AP, measured here |"
        )
    measured = result_rows(root / "results" / "bccd")
    for name, row in found.items():
        row["config"] = find_config(name).relative_to(root).as_posix()
        row["measured"] = measured.get(name, [])
    return found


def rows_of(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Recipes and what a document's tables say of each."""
    for match in _ROW.finditer(text):
        about, data, paper = (" ".join(match[key].split()) for key in ("about", "data", "paper"))
        if data in _COCO:
            data = f"COCO {data}"
        ap = _AP.match(paper)
        yield (
            match["name"],
            {
                "about": about,
                "data": data,
                "paper": paper,
                "paper_ap": float(ap[1]) if ap else None,
            },
        )


def result_rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """By recipe, the AP of each kept run, with seed and commit."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.json")):
        result: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        commit = (result["commit"]["id"] or "unknown")[:7]
        run = {
            "seed": result["seed"],
            "ap": round(result["metrics"]["AP"], 2),
            "commit": commit + (" with changes" if result["commit"]["dirty"] else ""),
        }
        runs.setdefault(result["recipe"], []).append(run)
    return {name: sorted(found, key=lambda run: run["seed"]) for name, found in runs.items()}


def model_hash(cfg: DictConfig) -> str:
    """Twelve hexadecimal digits that change with what a recipe's costs depend on."""
    parts = (cfg.model, cfg.dataloader.test.mapper.augmentations[0])
    plain = [_plain(OmegaConf.to_container(part, resolve=False)) for part in parts]
    text = json.dumps(plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _plain(node: Any, key: str = "") -> Any:
    """A config's content as JSON has it; what is called by the name where it is defined."""
    if isinstance(node, dict):
        return {str(name): _plain(value, str(name)) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(value) for value in node]
    if key == "_target_" and isinstance(node, str):  # Detectron2's versions differ in this
        node = locate(node)
    if callable(node):
        return f"{node.__module__}.{node.__qualname__}"
    return node if node is None or isinstance(node, bool | int | float | str) else repr(node)


def _documents(root: Path) -> list[Path]:
    found = [root / "README.md", *sorted(root.glob("projects/*/README.md"))]
    found += sorted(root.glob("docs/**/*.md"))
    if not found[0].is_file():
        raise ZooError(f"{root} is no checkout: the table is made from its documents and results")
    return found


def _schedule(cfg: DictConfig) -> dict[str, int]:
    batch = cfg.dataloader.train.total_batch_size * cfg.train.get("accumulate", 1)
    return {"iterations": int(cfg.train.max_iter), "batch": int(batch)}


def _costs(name: str) -> Costs | None:
    """A model's costs, or None where it cannot be built here."""
    try:
        costs = count_costs(get_config(name))
    except ValueError as error:  # such as a backbone that this Detectron2 does not have
        _logger.warning("%s: costs not counted: %s", name, error)
        return None
    _logger.info("%s: %s", name, costs)
    return costs
