# SPDX-License-Identifier: Apache-2.0
"""The documentation's pages: what they include, link to and name exists; the site builds."""

import importlib.util
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "docs" / "hooks"))

from docs_nav import api_pages, named_pages, site_nav  # noqa: E402
from docs_text import CODE_LINE, Pages, docs_pages, headings, resolve_line  # noqa: E402


def settings() -> dict:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


# The navigation and the pages.


def test_settings_name_pages_that_exist_and_every_page_has_its_place() -> None:
    nav = settings()["nav"]
    pages = docs_pages()
    assert [x for x in named_pages(nav) if "*" not in x and x not in pages] == []
    complete = list(named_pages(site_nav(nav)))
    notebooks = {
        x.relative_to(ROOT / "docs").with_suffix(".md").as_posix()
        for x in (ROOT / "docs").rglob("*.ipynb")
    }
    assert sorted(complete) == sorted({*pages, *notebooks, *api_pages()})
    assert all((ROOT / x).is_file() for x in settings()["hooks"])


def test_every_public_module_of_the_packages_has_a_page_of_the_reference() -> None:
    assert api_pages()["reference/modeling/tscode.md"] == "modeling.tscode"
    assert api_pages()["reference/structures.md"] == "structures"
    packages = {x.split(".")[0] for x in api_pages().values()} - {"structures", "config"}
    folders = {x.parent.name for x in (ROOT / "d2_decouple").glob("*/__init__.py")}
    assert packages == folders - {"benchmarks"}
    order = list(dict.fromkeys(x.split(".")[0] for x in api_pages().values()))
    assert order[:4] == ["structures", "config", "modeling", "layers"]


@pytest.fixture(scope="module")
def pages() -> Pages:
    made = Pages(docs_pages())
    for page, text in made.texts.items():
        made.markdown(page, text)
    return made


def test_pages_include_link_and_name_what_exists(pages: Pages) -> None:
    assert list(dict.fromkeys(pages.problems)) == []


EQUATIONS = {"tscode": 5, "salt": 10, "pdnet": 7, "sapd": 6, "decoupled_rcnn": 8}


@pytest.mark.parametrize("method", EQUATIONS)
def test_every_equation_of_the_paper_has_a_line_of_code(method: str) -> None:
    found = set()
    for row in re.findall(r"^\| (Eq.*) \|$", docs_pages()[f"methods/{method}.md"], re.MULTILINE):
        paper, _, code = row.split(" | ")
        match = CODE_LINE.fullmatch(code)
        assert match, f"{method}: {code} is no line of code"
        assert resolve_line(match["file"], match["name"], match["text"]).line > 0
        found |= {int(x) for x in re.findall(r"\d+", re.match(r"Eqs?\. ([\d, ]+)", paper)[1])}
    assert found == set(range(1, EQUATIONS[method] + 1))


@pytest.mark.parametrize("method", [*EQUATIONS, "composed"])
def test_method_page_has_figure_code_and_the_whole_document(method: str) -> None:
    text = docs_pages()[f"methods/{method}.md"]
    assert f"](figures/{method}.svg)" in text
    (folder,) = set(re.findall(r"<!-- include: projects/(\w+)/README\.md", text))
    shown = Pages({"m.md": text}).markdown("m.md", text)
    document = (ROOT / "projects" / folder / "README.md").read_text(encoding="utf-8")
    wanted = [x.anchor for x in headings(document) if x.level > 1]
    assert [x.anchor for x in headings(shown) if x.anchor in wanted] == wanted


def test_figures_have_no_colours_of_their_own_and_no_name_twice() -> None:
    names: list[str] = []
    figures = sorted((ROOT / "docs" / "methods" / "figures").glob("*.svg"))
    assert len(figures) == 6
    for path in figures:
        root = ElementTree.parse(path).getroot()
        for node in root.iter():
            names += [node.attrib["id"]] if "id" in node.attrib else []
            colours = {node.attrib.get(key, "none") for key in ("fill", "stroke")}
            assert colours <= {"none", "currentColor"}, f"{path.name}: {colours}"
            style = node.attrib.get("style", "fill:var(--drawing-")
            assert re.match(r"(fill|stroke):var\(--drawing-", style), f"{path.name}: {style}"
    assert len(set(names)) == len(names)


# The site.


class Links(HTMLParser):
    """What a page has as anchors, links to, and loads."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors, self.links, self.loaded = {""}, set[str](), set[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.anchors |= {given[key] for key in ("id", "name") if key in given}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        if tag in ("script", "img", "iframe") and "src" in given:
            self.loaded.add(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "preload", "preconnect", "icon"):
            self.loaded.add(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [x for x in ("material", "mkdocstrings") if not importlib.util.find_spec(x)]
    if missing:
        pytest.skip(f"the site needs {missing}: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def read(site: Path) -> dict[Path, Links]:
    found = {}
    for path in site.rglob("*.html"):
        found[path] = Links()
        found[path].feed(path.read_text(encoding="utf-8"))
    return found


def test_every_link_of_the_site_leads_somewhere(site: Path, read: dict[Path, Links]) -> None:
    broken = []
    for path, page in read.items():
        for link in {x for x in page.links | page.loaded if not re.match(r"[a-z]+:", x)}:
            address, _, anchor = link.partition("#")
            file = site if address.startswith("/") else path.parent
            file = (file / unquote(address).lstrip("/")).resolve() if address else path
            known = read[file].anchors if file in read else {""}
            if not file.exists() or (file in read and unquote(anchor) not in known):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []
    assert len(read) > 100


def test_site_loads_nothing_from_elsewhere(read: dict[Path, Links]) -> None:
    loaded = {x for page in read.values() for x in page.loaded}
    assert loaded
    assert {x for x in loaded if re.match(r"[a-z]+:|//", x) and not x.startswith("data:")} == set()


def test_site_shows_docstrings_results_figures_and_code(site: Path) -> None:
    reference = (site / "reference/modeling/tscode.html").read_text(encoding="utf-8")
    assert "what brings P_l to half its size" in reference  # from a docstring
    assert 'id="d2_decouple.modeling.tscode.TSCODE.forward"' in reference
    every = "".join(x.read_text(encoding="utf-8") for x in (site / "reference").rglob("*.html"))
    assert ":class:" not in every
    method = (site / "methods/tscode.html").read_text(encoding="utf-8")
    assert "194,394,483,200" in method  # from the project's README
    assert '<figure class="drawing"' in method
    assert "<title>TSCODE - d2-decouple</title>" in method
    line = resolve_line("modeling/tscode.py", "TSCODE._semantics", "torch.cat").line
    assert f"source/d2_decouple/modeling/tscode.py.html#line-{line}" in method
    code = (site / "source/d2_decouple/modeling/tscode.py.html").read_text(encoding="utf-8")
    (shown,) = re.findall(rf'<span id="line-{line}">(.*)', code)
    words = re.sub(r"<.*?>", "", shown).split()
    assert words == f"{line} torch.cat((down, _fitted(up, down)), dim=1)".split()
