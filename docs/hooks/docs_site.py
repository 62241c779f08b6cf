# SPDX-License-Identifier: Apache-2.0
"""What the documentation site has beyond its Markdown files: MkDocs calls this while it builds.

- Sections of the READMEs stand on the pages that include them (``docs_text.py``).
- What a page names as a line of code, or links to, gets a page that shows the file.
- Every public module gets a page made from its docstrings.
- The navigation names every page (``docs_nav.py``).
- Notebooks become pages as they were saved (``docs_notebooks.py``).
- Figures are put into the page itself, so that they have its colours.
"""

import json
import logging
import re
from pathlib import PurePosixPath

from docs_nav import api_pages, site_nav
from docs_notebooks import notebook_page
from docs_text import ROOT, Pages, docs_pages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from pygments import highlight  # type: ignore[import-untyped]
from pygments.formatters import HtmlFormatter  # type: ignore[import-untyped]
from pygments.lexers import get_lexer_for_filename  # type: ignore[import-untyped]

__all__ = [
    "on_config",
    "on_files",
    "on_page_content",
    "on_page_markdown",
]

log = logging.getLogger("mkdocs.hooks.docs_site")

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):<code>\.*")
_FIGURE = re.compile(r'<p><img alt="(?P<alt>[^"]*)" src="(?P<src>[^"]+\.svg)" ?/?></p>')

_pages = Pages({})


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Let the navigation name every page."""
    config.nav = site_nav(config.nav or [])
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages and pictures that no file below docs/ has."""
    global _pages
    texts = docs_pages()
    for notebook in [x for x in files if x.src_uri.endswith(".ipynb")]:
        uri = PurePosixPath(notebook.src_uri)
        content = json.loads((ROOT / "docs" / uri).read_text(encoding="utf-8"))
        texts[str(uri.with_suffix(".md"))], pictures = notebook_page(content, uri.stem)
        made: dict[str, str | bytes] = {str(uri.parent / k): v for k, v in pictures.items()}
        made[str(uri.with_suffix(".md"))] = texts[str(uri.with_suffix(".md"))]
        for name, data in made.items():
            files.append(File.generated(config, name, content=data))
    _pages = Pages(texts)
    for page, text in texts.items():
        _pages.markdown(page, text)  # finds out what is needed
    for problem in dict.fromkeys(_pages.problems):
        log.warning(problem)
    for page, module in api_pages().items():
        files.append(File.generated(config, page, content=_api_page(module)))
    for file in sorted(_pages.sources):
        files.append(_unlisted(config, f"source/{file}.md", _source_page(file)))
    for file in sorted(_pages.files):
        files.append(File.generated(config, f"files/{file}", abs_src_path=str(ROOT / file)))
    return files


def _unlisted(config: MkDocsConfig, uri: str, content: str) -> File:
    return File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV)


def _api_page(module: str) -> str:
    return f"# d2_decouple.{module}\n\n::: d2_decouple.{module}\n"


def _source_page(file: str) -> str:
    return f"---\nsearch:\n  exclude: true\nhide:\n  - toc\n---\n\n# {file}\n"


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page's text with what it includes."""
    if page.file.src_uri.startswith(("reference/", "source/")):
        return markdown
    return _pages.markdown(page.file.src_uri, markdown)


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page's HTML: code with numbered lines, figures as part of it, no marks of other markup."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return html + _numbered(uri.removeprefix("source/").removesuffix(".md"))
    folder = ROOT / "docs" / PurePosixPath(uri).parent

    def figure(match: re.Match[str]) -> str:
        drawing = (folder / match["src"]).resolve()
        if not drawing.is_file():
            return match.group()
        svg = drawing.read_text(encoding="utf-8")
        inner = re.sub(r"<\?xml.*?\?>|<!--.*?-->|<style>.*?</style>", "", svg, flags=re.DOTALL)
        return f'<figure class="drawing" role="img" aria-label="{match["alt"]}">{inner}</figure>'

    return _ROLE.sub("<code>", _FIGURE.sub(figure, html))


def _numbered(file: str) -> str:
    """A file's code as HTML; line n has the anchor ``line-n``."""
    code = (ROOT / file).read_text(encoding="utf-8")
    form = HtmlFormatter(
        cssclass="highlight source", linenos="inline", linespans="line", wrapcode=True
    )
    return highlight(code, get_lexer_for_filename(file), form)
