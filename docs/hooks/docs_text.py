# SPDX-License-Identifier: Apache-2.0
"""Pages of the documentation site as text: parts of other documents, links, lines of code.

A page writes nothing twice. ``<!-- include: README.md#speed -->`` on a line of its own stands for
a section of a document, and ``modeling/tscode.py:TSCODE._semantics`` between backquotes for the
line where that is defined now. Nothing here needs MkDocs.
"""

import ast
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

__all__ = [
    "CODE_LINE",
    "INCLUDE",
    "ROOT",
    "CodeLine",
    "Heading",
    "Pages",
    "docs_pages",
    "fragment",
    "headings",
    "include_directives",
    "outside_fences",
    "resolve_line",
    "slug",
]

ROOT = Path(__file__).resolve().parents[2]

INCLUDE = re.compile(
    r"^<!-- include: (?P<file>[^\s#]+)(?P<place>#[\w-]*(?:\.\.)?)?"
    r"(?: level=(?P<level>[1-6]))? -->$",
    re.MULTILINE,
)
CODE_LINE = re.compile(r"`(?P<file>[\w./]+\.py):(?P<name>[A-Za-z_][\w.]*)(?:@(?P<text>[^`]+))?`")

_FENCE = re.compile(r"^ *(`{3,}).*?^ *\1[ ]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?P<text>!?\[[^\[\]]*\])\((?P<target>[^()\s]+)\)")
_COMMENT = re.compile(r"\A<!-- SPDX[^\n]*-->\n")
_SHOWN_AS_CODE = (".py", ".yaml", ".toml", ".cpp", ".cu", ".h", ".sh")


class Heading(NamedTuple):
    """A heading of a document: where its line starts, its level from 1, and its anchor."""

    start: int
    level: int
    anchor: str


class CodeLine(NamedTuple):
    """A place in the code: a path below the repository's root, and a line from 1."""

    path: str
    line: int


def slug(title: str) -> str:
    """The anchor of a heading, as Python-Markdown's table of contents makes it."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def outside_fences(text: str) -> Iterator[tuple[bool, str]]:
    """Pieces of a text, in order, and whether each is prose and not a fenced block."""
    end = 0
    for fence in _FENCE.finditer(text):
        yield True, text[end : fence.start()]
        yield False, fence.group()
        end = fence.end()
    yield True, text[end:]


def headings(text: str) -> list[Heading]:
    """All headings of a document in order; a comment in a block of code is none."""
    found, start = [], 0
    for is_prose, piece in outside_fences(text):
        for match in re.finditer(r"^(#{1,6}) +(.+)$", piece, re.MULTILINE) if is_prose else ():
            level, title = len(match[1]), match[2].strip()
            found.append(Heading(start + match.start(), level, slug(title)))
        start += len(piece)
    return found


def fragment(text: str, place: str | None) -> str:
    """A part of a document.

    Args:
        text: the document.
        place: None, all of it without its title; ``"#"``, what stands before the first section;
            ``"#anchor"``, one section; ``"#anchor.."``, that section and all behind it.

    Raises:
        ValueError: there is no such section.
    """
    text = _COMMENT.sub("", text)
    found = headings(text)
    title = next((x for x in found if x.level == 1), None)
    start = 0 if title is None else text.index("\n", title.start) + 1
    sections = [x for x in found if x.level > 1]
    if place is None:
        return text[start:].strip()
    if place == "#":
        return text[start : sections[0].start if sections else len(text)].strip()
    wanted = place.strip("#.")
    index = next((i for i, x in enumerate(sections) if x.anchor == wanted), None)
    if index is None:
        raise ValueError(f"no section #{wanted}; there are {[x.anchor for x in sections]}")
    level = sections[index].level
    behind = (x.start for x in sections[index + 1 :] if x.level <= level)
    end = len(text) if place.endswith("..") else next(behind, len(text))
    return text[sections[index].start : end].strip()


def include_directives(text: str) -> Iterator[re.Match[str]]:
    """The directives of a page; those in a block of code are shown and not followed."""
    fences = [fence.span() for fence in _FENCE.finditer(text)]
    for match in INCLUDE.finditer(text):
        if not any(start <= match.start() < end for start, end in fences):
            yield match


def resolve_line(file: str, name: str, text: str | None = None, root: Path = ROOT) -> CodeLine:
    """Where the code now has what a page names.

    Args:
        file: below ``d2_decouple``, or below the repository's root.
        name: a function, class, method or variable, with dots: ``TSCODE._semantics``.
        text: of one of its lines; without it, the line on which it is defined.
        root: of the repository.

    Raises:
        ValueError: there is no such file or name, or not one line with the text.
    """
    path = next((x for x in (f"d2_decouple/{file}", file) if (root / x).is_file()), None)
    if path is None:
        raise ValueError(f"there is no {file}, neither in d2_decouple/ nor in the repository")
    source = (root / path).read_text(encoding="utf-8")
    node = _defined(ast.parse(source), name)
    if node is None:
        raise ValueError(f"{path} has no {name}; name on the page what it has")
    first, last = node.lineno, node.end_lineno or node.lineno
    if text is None:
        return CodeLine(path, first)
    lines = source.splitlines()
    found = [i for i in range(first, last + 1) if text in lines[i - 1]]
    if len(found) != 1:
        raise ValueError(f"{len(found)} lines of {name} in {path} have {text!r}; wanted is one")
    return CodeLine(path, found[0])


def _defined(scope: ast.AST, name: str) -> ast.stmt | None:
    """The statement of a scope that defines a name, or calls the function of that name."""
    for statement in getattr(scope, "body", ()):
        for known in _names(statement):
            if known == name:
                return statement
            if name.startswith(f"{known}.") and (
                inner := _defined(statement, name[len(known) + 1 :])
            ):
                return inner
    return None


def _names(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        return [ast.unparse(x) for x in statement.targets]
    if isinstance(statement, ast.AnnAssign):
        return [ast.unparse(statement.target)]
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return [ast.unparse(statement.value.func)]
    return []


def docs_pages(root: Path = ROOT) -> dict[str, str]:
    """Every Markdown page that lies below docs/, by its path there."""
    docs = root / "docs"
    paths = (path.relative_to(docs) for path in sorted(docs.rglob("*.md")))
    return {
        path.as_posix(): (docs / path).read_text(encoding="utf-8")
        for path in paths
        if path.parts[0] != "hooks"
    }


@dataclass
class Pages:
    """All pages, where each document's parts are shown, and what the pages need beside them.

    Attributes:
        texts: Markdown of each page, by its path below docs/.
        root: of the repository.
        shown: where a document's section is: (file, anchor, "" for the document) -> page.
        sources: files that pages link to and that are shown as code.
        files: files that pages link to and that are given as they are, pictures among them.
        problems: what cannot be resolved, one sentence each.
    """

    texts: Mapping[str, str]
    root: Path = ROOT
    shown: dict[tuple[str, str], str] = field(default_factory=dict)
    sources: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for page, text in self.texts.items():
            for match in include_directives(text):
                place, document = match["place"], self._document(match["file"])
                if place in (None, "#"):
                    self.shown.setdefault((match["file"], ""), page)
                for heading in headings(self._fragment(document, match, page)):
                    self.shown.setdefault((match["file"], heading.anchor), page)

    def _document(self, file: str) -> str:
        path = self.root / file
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def _fragment(self, document: str, match: re.Match[str], page: str) -> str:
        try:
            return fragment(document, match["place"])
        except ValueError as error:
            self.problems.append(f"{page}: {match['file']} has {error}")
            return ""

    def markdown(self, page: str, text: str) -> str:
        """A page's text with everything in it that it includes, and links that work on the site."""
        # A comment in front of it would hide the title, and the navigation would name the file.
        text = _COMMENT.sub("", text)
        pieces, end = [], 0
        for match in include_directives(text):
            pieces.append(self._linked(text[end : match.start()], f"docs/{page}", page))
            document = self._document(match["file"])
            if not document:
                self.problems.append(f"{page} includes {match['file']}, which does not exist")
            part = self._fragment(document, match, page)
            if match["level"] and (found := headings(part)):
                part = _shifted(part, int(match["level"]) - found[0].level)
            pieces.append(self._linked(part, match["file"], page))
            end = match.end()
        pieces.append(self._linked(text[end:], f"docs/{page}", page))
        return "".join(pieces)

    def _linked(self, text: str, document: str, page: str) -> str:
        """A document's text whose links, relative to it, are made relative to a page."""

        def link(match: re.Match[str]) -> str:
            if re.match(r"[a-z]+:", match["target"]):
                return match.group()
            target = self._target(match["target"], document, page)
            return match["text"] if target is None else f"{match['text']}({target})"

        def code(match: re.Match[str]) -> str:
            try:
                found = resolve_line(match["file"], match["name"], match["text"], self.root)
            except ValueError as error:
                self.problems.append(f"{page}: {error}")
                return match.group()
            self.sources.add(found.path)
            url = f"{_relative(f'source/{found.path}.html', page)}#line-{found.line}"
            # Underscores are emphasis to Markdown, even here.
            where, name = (
                x.replace("_", "&#95;")
                for x in (f"{found.path.removeprefix('d2_decouple/')}:{found.line}", match["name"])
            )
            return f'<a class="code-line" href="{url}"><code>{name}</code><span>{where}</span></a>'

        done = []
        for is_prose, piece in outside_fences(text):
            done.append(CODE_LINE.sub(code, _LINK.sub(link, piece)) if is_prose else piece)
        return "".join(done)

    def _target(self, target: str, document: str, page: str) -> str | None:
        """A link's target as seen from a page; None for a folder, of which there is no page."""
        path, _, anchor = target.partition("#")
        file = str(PurePosixPath(os.path.normpath(PurePosixPath(document).parent / path)))
        if not path:
            file = document
        end = f"#{anchor}" if anchor else ""
        if file.startswith("docs/"):
            inner = re.sub(r"\.ipynb$", ".md", file.removeprefix("docs/"))
            return end if inner == page and end else _relative(inner, page) + end
        if anchor and (file, "") in self.shown and (file, anchor) not in self.shown:
            self.problems.append(f"{page}: no page shows {file}#{anchor}")
        shown = self.shown.get((file, anchor)) or self.shown.get((file, ""))
        if shown is not None:
            return end if shown == page and end else _relative(shown, page) + end
        if (self.root / file).is_dir():
            return None
        if not (self.root / file).is_file():
            self.problems.append(f"{page}: {document} links to {file}, which does not exist")
            return target
        if file.endswith(".md"):
            self.problems.append(
                f"{page}: no page shows {file}; make docs/project/NAME.md that has the line "
                f"<!-- include: {file} -->"
            )
            return target
        if file.endswith(_SHOWN_AS_CODE):
            self.sources.add(file)
            return _relative(f"source/{file}.md", page)
        self.files.add(file)
        return _relative(f"files/{file}", page)


def _shifted(text: str, levels: int) -> str:
    """A text whose headings are so many levels deeper."""

    def deeper(match: re.Match[str]) -> str:
        return "#" * max(1, len(match[1]) + levels) + " "

    return "".join(
        re.sub(r"^(#{1,6}) +", deeper, piece, flags=re.MULTILINE) if is_prose else piece
        for is_prose, piece in outside_fences(text)
    )


def _relative(path: str, page: str) -> str:
    """A path below the site's root as seen from a page."""
    return PurePosixPath(os.path.relpath(path, PurePosixPath(page).parent)).as_posix()
