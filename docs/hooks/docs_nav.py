# SPDX-License-Identifier: Apache-2.0
"""The navigation of the documentation site: every page is in it, also those that nobody named."""

import fnmatch
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from docs_text import ROOT, docs_pages

__all__ = ["api_pages", "complete_nav", "named_pages", "site_nav"]

# Packages in the order of a detector's parts; others follow. Modules beside them, which are no
# commands.
_FIRST = ("modeling", "layers", "data", "engine", "evaluation", "analysis", "visualization")
_WITHOUT = ("benchmarks",)  # rows of a tool
_MODULES = ("structures", "config")


def api_pages(root: Path = ROOT) -> dict[str, str]:
    """The module of each page of the reference, by the page's path below docs/."""
    modules = [*_MODULES]
    packages = sorted(x.parent.name for x in (root / "d2_decouple").glob("*/__init__.py"))
    for package in dict.fromkeys((*_FIRST, *packages)):
        paths = sorted((root / "d2_decouple" / package).glob("*.py"))
        if package in _WITHOUT:
            continue
        modules += [f"{package}.{x.stem}" for x in paths if not x.stem.startswith("_")]
    return {f"reference/{x.replace('.', '/')}.md": x for x in modules}


def named_pages(nav: Iterable[Any]) -> Iterator[str]:
    """What a navigation names: paths below docs/ and patterns."""
    for item in nav:
        inside = list(item.values()) if isinstance(item, dict) else [item]
        for value in inside:
            if isinstance(value, str):
                yield value
            else:
                yield from named_pages(value)


def complete_nav(nav: list[Any], pages: Iterable[str]) -> list[Any]:
    """A navigation whose patterns stand for all pages that it does not name.

    Args:
        nav: as in mkdocs.yml; a string with ``*`` is a pattern of paths below docs/, in which a
            ``*`` ends at a slash, and ``**`` alone is all that is left. Sections without a page
            are left out.
        pages: that exist.
    """
    named = set(named_pages(nav))
    left = [x for x in sorted(pages) if x not in named]

    def expanded(items: list[Any]) -> list[Any]:
        done: list[Any] = []
        for item in items:
            if isinstance(item, dict):
                parts = {k: expanded(v) if isinstance(v, list) else v for k, v in item.items()}
                done += [{k: v} for k, v in parts.items() if v]
            elif "*" in item:
                found = [x for x in left if _matches(x, item)]
                done += found
                left[:] = [x for x in left if x not in found]
            else:
                done.append(item)
        return done

    return expanded(nav)


def _matches(path: str, pattern: str) -> bool:
    same_depth = path.count("/") == pattern.count("/")
    return pattern == "**" or (same_depth and fnmatch.fnmatchcase(path, pattern))


def site_nav(nav: list[Any], root: Path = ROOT) -> list[Any]:
    """The navigation of the whole site: pages, notebooks, and the reference by packages."""
    notebooks = (x.relative_to(root / "docs") for x in (root / "docs").rglob("*.ipynb"))
    pages = {*docs_pages(root), *(x.with_suffix(".md").as_posix() for x in notebooks)}
    nav = complete_nav(nav, pages)
    by_package: dict[str, list[Any]] = {}
    for page, module in api_pages(root).items():
        package, _, name = module.rpartition(".")
        by_package.setdefault(package, []).append({name: page})
    reference = next(x for x in nav if isinstance(x, dict) and "Reference" in x)
    reference["Reference"] += by_package.pop("")
    reference["Reference"] += [{package: inside} for package, inside in by_package.items()]
    return nav
