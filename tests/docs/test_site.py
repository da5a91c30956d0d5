"""The site is built without a warning, so without a dead link, and asks for nothing from the network."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support import pages

import spectra
from spectra.cli import main

pytest.importorskip("sphinx", reason="the documentation's tools are not installed: pip install --group docs")
# What a page loads by itself; a link that a reader may follow is no such thing.
LOADED = re.compile(
    r"<(?:script|img|iframe|source)[^>]*\bsrc=\"(?:https?:)?//|<link(?![^>]*rel=\"canonical\")[^>]*href=\"(?:https?:)?//"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", pages.DOCS, out]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return out


class Anchors(HTMLParser):
    """The ids of a page, and where it leads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids.add(given.get("id") or "")
        if tag in ("a", "img") and (target := given.get("href") or given.get("src")):
            self.targets.add(target)


def test_every_link_of_the_site_leads_somewhere(site):
    pages_of_it = {page: Anchors(page) for page in site.rglob("*.html")}
    assert len(pages_of_it) > 20
    for page, parsed in pages_of_it.items():
        for target in parsed.targets:
            if re.match(r"https?:|mailto:|data:", target):
                continue
            file, _, anchor = target.partition("#")
            there = (page.parent / file).resolve() if file else page
            assert there.exists(), f"{page.name}: {target}"
            if anchor and there in pages_of_it:
                assert anchor in pages_of_it[there].ids, f"{page.name}: {target}"


class Content(HTMLParser):
    """Where the links in the text of a page lead: neither the sidebar's nor those to the next page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.inside = False
        self.targets: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside |= tag == "article"
        if self.inside and tag == "a" and (target := dict(attrs).get("href")):
            self.targets.append(target)

    def handle_endtag(self, tag: str) -> None:
        self.inside &= tag != "article"


def clicks(start: Path) -> dict[Path, int]:
    """Page → how many clicks it is away, breadth first."""
    found = {start: 0}
    for page in (queue := [start]):
        files = [target.partition("#")[0] for target in Content(page).targets if not re.match(r"[a-z]+:", target)]
        for there in [(page.parent / file).resolve() for file in files if file.endswith(".html")]:
            if there not in found:
                found[there] = found[page] + 1
                queue.append(there)
    return found


def test_a_newcomer_is_two_clicks_from_every_page_and_one_from_every_question(site):
    away = clicks(site / "index.html")
    assert {page.stem for page in (site / "howto").glob("*.html")} == {
        page.stem for page in (pages.DOCS / "howto").glob("*.md")
    }
    assert {page: away.get(page) for page in (site / "howto").glob("*.html") if away.get(page) != 1} == {}
    made = {page for page in site.rglob("*.html") if page.stem not in ("search", "genindex", "py-modindex")}
    assert {page.name for page in made if away.get(page, 9) > 2} == set()


def test_the_readme_leads_to_every_question_and_to_the_first_page():
    readme = (pages.DOCS.parent / "README.md").read_text()
    targets = set(re.findall(r"\]\(([^)#]+)", readme))
    wanted = {f"docs/howto/{page.name}" for page in (pages.DOCS / "howto").glob("*.md")} | {"docs/start.md"}
    assert wanted - targets == set()
    assert {target for target in targets if "://" not in target and not (pages.DOCS.parent / target).exists()} == set()


def test_clicks_are_counted_along_the_text_alone(tmp_path):
    (tmp_path / "index.html").write_text(
        '<nav><a href="far.html"></a></nav><article><a href="near.html#a">x</a></article>'
    )
    (tmp_path / "near.html").write_text('<article><a href="far.html">x</a><a href="https://x/y.html">x</a></article>')
    (tmp_path / "far.html").write_text("<article></article>")
    assert {page.stem: away for page, away in clicks(tmp_path / "index.html").items()} == {
        "index": 0,
        "near": 1,
        "far": 2,
    }


def test_nothing_is_loaded_from_the_network(site):
    for page in site.rglob("*.html"):
        assert not LOADED.search(page.read_text()), page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text()), style.name


def test_commands_names_and_metrics_are_on_it(site):
    ids = {page.stem: Anchors(page).ids for page in site.glob("*.html")}
    for name in main.list_commands(None):
        assert f"spectra-{name}" in ids["commands"]
    assert {f"spectra.{name}" for name in spectra.__all__} - ids["api"] == {"spectra.__version__"}
    shown = (site / "metrics.html").read_text()
    for name in [*spectra.METRICS, *spectra.ALIGNMENT, *spectra.INTERFERENCE]:
        assert f">{name}<" in shown or name.startswith("signal_"), name
