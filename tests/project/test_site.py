"""The documentation site: built strictly, whole, and without anything from the network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import vbp

ROOT = Path(__file__).parents[2]
TAGS = set(
    "a abbr address article aside b base blockquote body br button circle code dd details div dl dt em figure form g "
    "h1 h2 h3 h4 h5 h6 head header hr html img input label li link main meta nav noscript ol p path pre script "
    "section span strong style sub summary sup svg table tbody td th thead title tr ul footer".split()
)


class Page(HTMLParser):
    """What a page links to, what it loads, and its anchors."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.tags: set[str] = set()
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.anchors.add(values.get("id", ""))
        self.loaded += [values[name] for name in ("src", "srcset", "poster", "data") if values.get(name)]
        if values.get("href"):
            (self.links if tag == "a" else self.loaded).append(values["href"])
        self.loaded += re.findall(r"url\(([^)]*)\)", values.get("style", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        # Every request ends at a port where nobody listens.
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"} | dict.fromkeys(("http_proxy", "https_proxy"), "localhost:9"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    """Read all pages."""
    return {file: Page(file) for file in sorted(site.rglob("*.html"))}


def test_every_document_is_a_page(site: Path) -> None:
    for document in (ROOT / "docs").rglob("*.md"):
        assert (site / document.relative_to(ROOT / "docs").with_suffix(".html")).is_file(), document
    assert (site / "benchmarks/vbp/index.html").is_file()
    for document in (ROOT / "benchmarks/results").glob("*.md"):
        assert (site / "benchmarks/results" / f"{document.stem}.html").is_file(), document


def test_pages_load_nothing_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    loaded = {address for page in pages.values() for address in page.loaded}
    assert any(address.endswith(".css") for address in loaded)
    assert any(address.endswith(".js") for address in loaded)
    assert [address for address in sorted(loaded) if re.match(r"(\w+:)?//", address)] == []
    for sheet in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)]*", sheet.read_text()) == [], sheet


def test_the_search_works_from_the_disk(site: Path, tmp_path: Path) -> None:
    assert (site / "search/search_index.js").read_text().startswith("var __index = ")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no browser is installed")
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=60000", "--dump-dom",
        f"{(site / 'index.html').as_uri()}?q=retention",
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.search(r"[1-9]\d* matching documents", shown)


def test_guide_mathematics_and_laboratory_notes_are_apart(pages: dict[Path, Page], site: Path) -> None:
    text = (site / "index.html").read_text()
    places = [text.index(f"{part}\n") for part in ("Guide", "Mathematics", "Laboratory notes", "Reference")]
    assert places == sorted(places)
    assert {"pruning.svg", "retention.svg"} <= {*pages[site / "index.html"].loaded}, "the start page has pictures"


def test_every_link_within_the_site_has_its_target(site: Path, pages: dict[Path, Page]) -> None:
    checked = 0
    for file, page in pages.items():
        if file.name == "404.html":
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), (file, link)
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors, (file, link)
            checked += 1
    assert checked > 100


def test_nothing_in_a_text_is_taken_for_a_tag(pages: dict[Path, Page]) -> None:
    # <class> and the like in a help text would vanish from the page.
    assert {tag for page in pages.values() for tag in page.tags} <= TAGS


def test_the_reference_has_every_room_and_every_public_name(pages: dict[Path, Page], site: Path) -> None:
    anchors = Counter(
        anchor
        for file, page in pages.items()
        if file.parent == site / "reference"
        for anchor in page.anchors
        if anchor.startswith("vbp.")
    )
    named = [getattr(vbp, name) for name in vbp.__all__]
    for room in {path.parent.name for path in (ROOT / "src/vbp").glob("*/__init__.py")} - {"cli"}:
        assert anchors[f"vbp.{room}"] == 1, room
    for value in named:
        assert anchors[f"{value.__module__}.{value.__qualname__}"] == 1, value
