"""The documentation site builds without a warning, and holds what mkdocs itself does not check."""

import importlib.util
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt

import emp_callbacks

ROOT = Path(__file__).parents[1]
API = ROOT / "docs" / "api.md"
BLOCKS = ("h1", "h2", "h3", "ul", "ol", "li", "table", "tr", "pre", "blockquote", "img")

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings_handlers")),
    reason="mkdocs-material or mkdocstrings is not installed: pip install 'emp-callbacks[docs]'",
)


def builds(test):
    return pytest.mark.slow(pytest.mark.processes(test))


class Reference(NamedTuple):
    tag: str
    address: str


class HtmlPage(HTMLParser):
    """What a page refers to, what it can be referred to by, and the blocks of its article."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.references, self.blocks = set(), [], Counter()
        self._in_article = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._in_article |= tag == "article"
        if self._in_article and tag in BLOCKS:
            self.blocks[tag] += 1
        for name, value in attributes:
            if name in ("id", "name"):
                self.ids.add(value)
            elif name in ("href", "src", "srcset") and value:
                self.references.append(Reference(tag, value.split()[0]))

    def handle_endtag(self, tag):
        self._in_article &= tag != "article"


def pages_of(folder):
    # the page of a server that did not find another has addresses from the server's root
    found = (path for path in folder.rglob("*.html") if path.name != "404.html")
    return {path: HtmlPage(path.read_text(encoding="utf-8")) for path in found}


def broken(pages):
    """Return the references that lead nowhere, each with its page."""
    return [
        f"{path.name}: {reference.address}"
        for path, page in pages.items()
        for reference in page.references
        if not leads_somewhere(path, reference.address, pages)
    ]


def leads_somewhere(path, address, pages):
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return True
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not target.is_file():
        return False  # a folder, too: opened as files, pages have no server that picks its index
    return not parts.fragment or target not in pages or unquote(parts.fragment) in pages[target].ids


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site").resolve()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return pages_of(folder)


def shown(site, source):
    """Return the page that shows a Markdown file of the repository."""
    home = min(site, key=lambda path: len(path.parts)).parent
    stem = "index" if source.stem == "README" else source.stem
    return site[home / source.relative_to(ROOT).with_name(f"{stem}.html")]


@builds
def test_every_link_anchor_and_picture_of_the_site_is_there(site):
    assert sum(len(page.references) for page in site.values()) > 1000
    assert broken(site) == []


@builds
def test_the_site_loads_nothing_from_elsewhere(site):
    loaded = [
        one for page in site.values() for one in page.references if one.tag in ("script", "link", "img", "iframe")
    ]
    assert loaded
    assert [one for one in loaded if urlsplit(one.address).netloc] == []


@builds
def test_the_reference_has_every_public_name(site):
    ids = shown(site, API).ids
    assert [name for name in emp_callbacks.__all__ if f"emp_callbacks.{name}" not in ids] == []
    assert "emp_callbacks.EMPPruner.masks" in ids  # members that a base class defines


@builds
def test_the_site_reads_markdown_as_code_hosts_do(site):
    for page in {ROOT / "README.md", *ROOT.glob("docs/*.md")} - {API}:
        html = MarkdownIt("commonmark").enable("table").render(page.read_text(encoding="utf-8"))
        assert shown(site, page).blocks == HtmlPage(f"<article>{html}</article>").blocks, page.name


BROKEN = {
    "file": ('<a href="b.html">', "a.html: b.html"),
    "folder": ('<a href=".">', "a.html: ."),
    "anchor": ('<a href="#there">', "a.html: #there"),
    "anchor-elsewhere": ('<a href="c.html#there">', "a.html: c.html#there"),
    "picture": ('<picture><source srcset="dark.png 2x"></picture>', "a.html: dark.png"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_reference_is_found(case, tmp_path):
    text, found = BROKEN[case]
    (tmp_path / "c.html").write_text('<p id="here"><a href="c.html#here"><a href="https://nowhere.invalid/#there">')
    (tmp_path / "a.html").write_text(text)
    assert broken(pages_of(tmp_path)) == [found]
