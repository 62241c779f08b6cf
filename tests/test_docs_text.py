# SPDX-License-Identifier: Apache-2.0
"""How pages of the documentation are made: parts of documents, links, lines of code, navigation."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "docs" / "hooks"))

from docs_nav import complete_nav
from docs_notebooks import notebook_page
from docs_text import Pages, fragment, headings, resolve_line, slug

README = """<!-- SPDX-License-Identifier: Apache-2.0 -->
# Title

What it is.

## First part

One.

```bash
# a comment, and no heading
## nor this
```

### Inner

Two.

## Second part, last

Three.
"""


@pytest.mark.parametrize(
    ("place", "first", "last", "headings_inside"),
    [
        (None, "What it is.", "Three.", 3),
        ("#", "What it is.", "What it is.", 0),
        ("#first-part", "## First part", "Two.", 2),
        ("#first-part..", "## First part", "Three.", 3),
        ("#inner", "### Inner", "Two.", 1),
        ("#second-part-last", "## Second part, last", "Three.", 1),
    ],
)
def test_part_of_a_document(place: str | None, first: str, last: str, headings_inside: int) -> None:
    part = fragment(README, place)
    lines = part.splitlines()
    assert (lines[0], lines[-1]) == (first, last)
    assert len(headings(part)) == headings_inside


def test_part_that_is_missing_names_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"no section #third.*first-part.*second-part-last"):
        fragment(README, "#third")


def test_headings_have_their_place_level_and_anchor() -> None:
    found = headings(README)
    assert [(x.level, x.anchor) for x in found] == [
        (1, "title"),
        (2, "first-part"),
        (3, "inner"),
        (2, "second-part-last"),
    ]
    assert [README[x.start] for x in found] == ["#"] * 4
    assert README[found[2].start :].startswith("### Inner")


def test_anchor_of_a_heading() -> None:
    assert slug("Paper, authors' code, ours") == "paper-authors-code-ours"
    assert slug("A -- B_c") == "a-b_c"


CODE = '''"""A module."""

model.losses = terms(
    first=1,
)
model.head.update(
    inner=2,
)
_TABLE: dict = {}


class A:
    size: int = 3

    def run(self):
        """Say what it does."""
        x = 1
        y = x + 1
        return y


def run():
    return 0
'''


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A repository with a page, two documents, a picture and a module."""
    for name, text in {
        "d2_decouple/part.py": CODE,
        "README.md": README,
        "projects/X/README.md": "# X\n\nSee [code](../../d2_decouple/part.py), [main](../../README"
        ".md#inner), ![picture](a.jpg), [web](https://x.y/a.md), [folder](../X), [here](#use).\n\n"
        "```python\nx[0](a.jpg)\n```\n\n## Use\n\n[Top](../../README.md)\n",
        "projects/X/a.jpg": "",
        "OTHER.md": "# Other\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("A", None, 12),
        ("A.run", None, 15),
        ("A.size", None, 13),
        ("A.run", "return y", 19),
        ("run", None, 22),
        ("_TABLE", None, 9),
        ("model.losses", None, 3),
        ("model.losses", "first=1", 4),
        ("model.head.update", "inner", 7),
    ],
)
def test_line_of_code(small: Path, name: str, text: str | None, line: int) -> None:
    # Lines are counted in CODE above: its docstring is line 1.
    assert resolve_line("part.py", name, text, small) == ("d2_decouple/part.py", line)
    assert resolve_line("d2_decouple/part.py", name, text, small).line == line


@pytest.mark.parametrize(
    ("file", "name", "text", "message"),
    [
        ("none.py", "A", None, "there is no none.py"),
        ("part.py", "A.walk", None, r"part.py has no A.walk"),
        ("part.py", "B", None, r"part.py has no B"),
        ("part.py", "A.run", "x", r"2 lines of A.run in d2_decouple/part.py have 'x'"),
        ("part.py", "A.run", "return 0", r"0 lines of A.run"),
    ],
)
def test_line_of_code_that_is_missing(
    small: Path, file: str, name: str, text: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_line(file, name, text, small)


def pages_of(small: Path, **texts: str) -> Pages:
    return Pages({name.replace("__", "/") + ".md": text for name, text in texts.items()}, small)


HOME = "# Home\n\n<!-- include: README.md -->\n"
METHOD = "<!-- SPDX -->\n# X\n\n<!-- include: projects/X/README.md# -->\n\n"
METHOD += "<!-- include: projects/X/README.md#use.. -->\n"


def test_links_of_an_included_document_lead_where_its_parts_are_shown(small: Path) -> None:
    pages = pages_of(small, index=HOME, methods__x=METHOD)
    text = pages.markdown("methods/x.md", METHOD)

    assert pages.problems == []
    assert "[code](../source/d2_decouple/part.py.md)" in text
    assert "[main](../index.md#inner)" in text
    assert "![picture](../files/projects/X/a.jpg)" in text
    assert "[web](https://x.y/a.md)" in text
    assert ", [folder], [here](#use)." in text  # of a folder there is no page
    assert "x[0](a.jpg)" in text  # in a block of code nothing is a link
    assert "[Top](../index.md)" in text
    assert (pages.sources, pages.files) == ({"d2_decouple/part.py"}, {"projects/X/a.jpg"})
    assert "# X\n\nSee" in text
    assert text.startswith("# X\n")  # a comment in front would hide the title
    assert text.count("# X") == 1
    assert "SPDX" not in pages.markdown("index.md", HOME)


def test_a_page_links_to_other_pages_and_documents(small: Path) -> None:
    guide = "[a](../methods/x.md#use) [b](../../projects/X/README.md) [c](../../README.md#inner)"
    guide += " [d](../tutorials/t.ipynb)"
    pages = pages_of(small, index=HOME, methods__x=METHOD, guide__g=guide)
    assert pages.markdown("guide/g.md", guide) == (
        "[a](../methods/x.md#use) [b](../methods/x.md) [c](../index.md#inner)"
        " [d](../tutorials/t.md)"
    )


def test_section_is_sought_where_it_is_shown_and_a_document_where_it_begins(small: Path) -> None:
    index, other = "<!-- include: README.md# -->\n", "<!-- include: README.md#first-part -->\n"
    page = "[a](../README.md#inner) [b](../README.md)"
    pages = pages_of(small, guide__part=other, index=index, p=page)
    assert pages.markdown("p.md", page) == "[a](guide/part.md#inner) [b](index.md)"
    inside = "[c](../../README.md#inner)"
    assert pages.markdown("guide/part.md", inside) == "[c](#inner)"


def test_included_headings_are_moved(small: Path) -> None:
    page = "<!-- include: README.md#first-part level=1 -->\n"
    text = pages_of(small, page=page).markdown("page.md", page)
    assert text.startswith("# First part\n")
    assert "\n## Inner\n" in text
    assert "\n## nor this\n" in text  # a comment of the shell stays
    assert "# Second part" not in text


def test_line_of_code_becomes_a_link_to_its_place_now(small: Path) -> None:
    page = "| Eq. 1 | `part.py:A.run@y = x` | `part.py:_TABLE` |\n"
    pages = pages_of(small, methods__m=page)
    text = pages.markdown("methods/m.md", page)
    assert 'href="../source/d2_decouple/part.py.html#line-18"><code>A.run</code>' in text
    assert "<span>part.py:18</span>" in text
    assert "<code>&#95;TABLE</code>" in text  # underscores are no emphasis
    assert pages.sources == {"d2_decouple/part.py"}


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- include: NONE.md -->", "p.md includes NONE.md, which does not exist"),
        ("<!-- include: README.md#none -->", "p.md: README.md has no section #none"),
        ("[x](../none.txt)", "links to none.txt, which does not exist"),
        ("[x](../README.md#none)", "no page shows README.md#none"),
        ("[x](../OTHER.md#a)", "no page shows OTHER.md; make docs/project/NAME.md"),
        ("`part.py:B`", "part.py has no B"),
    ],
)
def test_what_cannot_be_found_is_said(small: Path, page: str, message: str) -> None:
    pages = pages_of(small, index=HOME, p=page)
    pages.markdown("p.md", page)
    assert len(set(pages.problems)) == 1
    assert message in pages.problems[0]


def test_directive_in_a_block_of_code_is_shown(small: Path) -> None:
    page = "```\n<!-- include: NONE.md -->\n```\n"
    pages = pages_of(small, p=page)
    assert pages.markdown("p.md", page) == page
    assert pages.problems == []


def test_notebook_becomes_a_page() -> None:
    def output(**data: object) -> dict:
        return {"output_type": "display_data", "data": data}

    cells = [
        {"cell_type": "markdown", "source": ["# A\n", "text"]},
        {
            "cell_type": "code",
            "source": "print('```')",
            "outputs": [
                {"output_type": "stream", "text": ["\x1b[31m1\x1b[0m\n", "2\n"]},
                output(**{"image/png": "AAE=", "text/plain": "<Figure>"}),
                output(**{"text/plain": ["3"]}),
                output(**{"image/jpeg": ["AQ", "I="]}),
                {"output_type": "error", "traceback": ["ValueError", "4"]},
            ],
        },
        {"cell_type": "code", "source": [], "outputs": []},
    ]
    text, pictures = notebook_page({"cells": cells}, "tour")
    assert text == (
        "# A\ntext\n\n````python\nprint('```')\n````\n\n```text\n1\n2\n```\n\n"
        "![Output of the cell above](tour_1.png)\n\n```text\n3\n```\n\n"
        "![Output of the cell above](tour_2.jpg)\n\n"
        "```text\nValueError\n4\n```\n\n[This page as a notebook](tour.ipynb)\n"
    )
    assert pictures == {"tour_1.png": b"\x00\x01", "tour_2.jpg": b"\x01\x02"}


def test_patterns_stand_for_the_pages_that_are_not_named() -> None:
    nav = [
        {"Home": "index.md"},
        {"Guide": ["guide/b.md", "guide/*", "*.md"]},
        {"Empty": ["none/*"]},
        {"Rest": ["**"]},
    ]
    pages = ["index.md", "guide/a.md", "guide/b.md", "z.md", "x/y.md", "guide/deep/c.md"]
    assert complete_nav(nav, pages) == [
        {"Home": "index.md"},
        {"Guide": ["guide/b.md", "guide/a.md", "z.md"]},
        {"Rest": ["guide/deep/c.md", "x/y.md"]},
    ]
