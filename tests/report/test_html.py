"""The report is one file that says what the summary says, whoever named the model, in any browser."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import sites, write_run

from vbp import InputError, Site
from vbp.refit.head import HeadRefit
from vbp.refit.producers import ProducerRefit
from vbp.refit.refits import RefitReport
from vbp.refit.stream import StreamRefit
from vbp.report.finished_run import read_run
from vbp.report.html import clear_report, summary_row, write_report

VOID = {"meta", "link", "br", "img", "hr", "input"}
FIGURES = [
    "accuracy", "accuracy_macs", "latency", "training", "kept_channels", "reconstruction", "spectrum", "convergence",
]  # fmt: skip
HOSTILE = """<script>alert("1")</script>|$x_2$ & <b>'`\\"""


@dataclass
class Element:
    """One element of a page."""

    tag: str
    attributes: dict[str, str]
    children: list[Element] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def all(self, tag: str = "", **attributes: str) -> list[Element]:
        """Return the elements below this one, of a tag and with attributes."""
        found = []
        for child in self.children:
            if tag in ("", child.tag) and attributes.items() <= child.attributes.items():
                found.append(child)
            found += child.all(tag, **attributes)
        return found

    @property
    def text(self) -> str:
        """Return the text in this element and below."""
        return "".join(self.texts + [child.text for child in self.children])

    @property
    def rows(self) -> list[list[str]]:
        """Return the body of the first table below."""
        body = self.all("tbody")[0]
        return [[cell.text for cell in row.children] for row in body.all("tr")]


class Page(HTMLParser):
    """Reads a page into elements, and fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(text)
        self.close()
        assert self.open == [self.root], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"an attribute of {tag} is given twice"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].texts.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with its report."""
    folder = tmp_path_factory.mktemp("report") / "run"
    write_run(folder)
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Element:
    """Return its page."""
    return Page((folder / "report.html").read_text(encoding="utf-8")).root


@pytest.fixture(scope="module")
def summary(folder: Path) -> dict[str, Any]:
    """Return its summary."""
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def figure(page: Element, name: str) -> Element:
    """Return one figure of a page."""
    return page.all("figure", id=name)[0]


def check_closed(page: Element) -> None:
    """Check that nothing in a page is loaded from elsewhere, and that no script runs."""
    for element in page.all():
        assert element.tag not in {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image"}
        for name, value in element.attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                assert value.startswith("#"), value
            assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", value))
    style = page.all("style")[0].text
    assert "url(" not in style
    assert "@import" not in style


def test_the_page_needs_nothing_else(page: Element) -> None:
    check_closed(page)
    (policy,) = [meta for meta in page.all("meta") if meta.attributes.get("http-equiv") == "Content-Security-Policy"]
    assert policy.attributes["content"].startswith("default-src 'none'")


def test_identifiers_are_unique_and_references_have_a_target(page: Element) -> None:
    names = [element.attributes["id"] for element in page.all() if "id" in element.attributes]
    assert len(set(names)) == len(names)
    for element in page.all():
        for name, value in element.attributes.items():
            if name in ("href", "xlink:href"):
                assert value[1:] in names
            if name == "aria-labelledby":
                assert value in names
            assert set(re.findall(r"url\(#([^)]*)\)", value)) <= set(names)


def test_every_figure_can_be_read_without_seeing_it(page: Element) -> None:
    figures = page.all("figure")
    assert [item.attributes["id"] for item in figures] == FIGURES
    for item in figures:
        (picture,) = item.all("svg", role="img")
        assert len(picture.attributes["aria-label"]) > 30
        assert len(item.all("figcaption")[0].text) > 30
        assert item.all("h3")[0].text
        head, body = item.all("thead")[0], item.rows
        assert body
        assert {len(row) for row in body} == {len(head.all("th"))}


def test_colours_and_letters_come_from_the_page(page: Element) -> None:
    for picture in page.all("svg"):
        styles = " ".join(element.attributes.get("style", "") for element in picture.all())
        assert not re.search(r"#[0-9a-f]{6}", styles)
        assert "DejaVu" not in styles
        assert "width" not in picture.attributes
        assert picture.all("text"), "letters are text, not outlines"


def test_the_numbers_are_those_of_the_summary(page: Element, summary: dict[str, Any]) -> None:
    names = ("base", "uncompensated", "pruned", "best", "final")
    assert [row[1:3] for row in figure(page, "accuracy").rows] == [
        [f"{summary[name]['top1']:.2f}", f"{summary[name]['top5']:.2f}"] for name in names
    ]
    assert [row[:3] for row in figure(page, "kept_channels").rows] == [
        [name, str(kept), str(total)] for name, (kept, total) in summary["sites"].items()
    ]
    assert [row[:3] for row in figure(page, "spectrum").rows] == [
        [name, str(total), str(kept)] for name, (kept, total) in summary["sites"].items()
    ]
    assert [row[:2] for row in figure(page, "training").rows] == [
        ["0", "61.12"], ["1", "68.00"], ["2", "70.86"], ["3", "70.50"],
    ]  # fmt: skip
    assert figure(page, "convergence").rows == [["500", "1.23"], ["1,000", "0.87"]]
    own = figure(page, "accuracy_macs").rows[0]
    assert own[2:] == [
        f"{100 * summary['pruned']['macs'] / summary['base']['macs']:.1f}",
        f"{100 * 61.12 / 72.02:.1f}",
        f"{100 * 70.86 / 72.02:.1f}",
    ]


def test_the_page_says_how_the_run_was_made(page: Element, summary: dict[str, Any]) -> None:
    tables = {table.all("caption")[0].text: table for table in page.all("table") if table.all("caption")}
    settings = dict(tables["Settings that were changed from the defaults"].rows)
    assert settings == {"model_name": "deit_tiny_patch16_224", "keep_ratio": "0.5"}
    (folded,) = [item for item in page.all("details") if item.attributes.get("class") == "folded"]
    assert dict(folded.rows) == {"compensation": "mean", "mean": "-"}
    assert "open" not in folded.attributes
    assert summary["command"] in [code.text for code in page.all("code")]
    assert f"{summary['date']} on {summary['hardware']}" in [item.text for item in page.all("p")]
    assert dict(tables["Versions"].rows) == summary["versions"]
    assert dict(tables["Wall-clock time"].rows) == {"calibration": "12.3 s", "finetune": "1.1 min"}


def test_a_report_of_an_earlier_version_shows_all_settings(tmp_path: Path) -> None:
    write_run(tmp_path, changed=None, command=None, date=None, hardware=None)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8")).root
    tables = {table.all("caption")[0].text: table for table in page.all("table") if table.all("caption")}
    assert len(tables["Settings"].rows) == 4
    assert not [item for item in page.all("details") if item.attributes.get("class") == "folded"]


def test_numbers_are_aligned_to_the_right_and_names_are_not(page: Element) -> None:
    def aligned(table: Element) -> list[bool]:
        rows = table.all("thead")[0].all("tr") + table.all("tbody")[0].all("tr")
        ways = {tuple(cell.attributes.get("class") == "number" for cell in row.children) for row in rows}
        (way,) = ways
        return list(way)

    assert aligned(figure(page, "accuracy")) == [False, True, True, True]
    assert aligned(figure(page, "training")) == [True] * 6
    tables = {table.all("caption")[0].text: table for table in page.all("table") if table.all("caption")}
    assert aligned(tables["Versions"]) == [False, False]


def test_the_snippet_loads_the_artefact(page: Element, folder: Path) -> None:
    (snippet,) = [code.text for code in page.all("code") if "load_pruned" in code.text]
    (call,) = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)]
    assert [ast.literal_eval(argument) for argument in call.args] == [os.fspath(folder / "vbp_best.pth")]


def test_the_row_is_markdown(page: Element, folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    row_alone, _, loading = text.partition("\n```python\n")
    assert row_alone in [code.text for code in page.all("code")]
    path = str(folder / "vbp_best.pth")
    held = "fine-tuned, best (epoch 2)"
    assert loading == f"import vbp\n\nmodel = vbp.load_pruned({path!r})  # {held}\n```\n"
    lines = text.splitlines()[:3]
    heading, rule, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert rule == ["---"] * len(heading)
    assert dict(zip(heading, row, strict=True)) == {
        "Model": "deit_tiny_patch16_224",
        "Kept": "50.0%",
        "Top-1 dense": "72.02",
        "Pruned": "61.12",
        "Fine-tuned": "70.86",
        "MACs": "1.26 G → 1.01 G",
        "Parameters": "5.72 M → 4.48 M",
        "Latency": "12.00 → 10.00 ms",
        "Speed-up (quartiles)": "1.25x (1.21 to 1.31) at batch 32 on cpu in float32",
    }


def test_the_page_says_which_row_each_file_is(tmp_path: Path) -> None:
    small = {"top1": 61.12, "top5": 84.5, "macs": 1_010_000_000, "params": 4_480_000, "epoch": 0}
    write_run(tmp_path, best=small)
    (tmp_path / "vbp_final.pth").write_bytes(b"")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8")).root
    told = "No epoch of fine-tuning was better than the pruned model without it."
    assert told in [item.text for item in page.all("p")]
    (section,) = page.all("section", **{"aria-labelledby": "load"})
    assert [row[:2] for row in section.rows] == [
        ["vbp_best.pth", "pruned, mean shift"], ["vbp_final.pth", "fine-tuned, final (epoch 3)"],
    ]  # fmt: skip
    assert all(len(row[2]) > 20 for row in section.rows), "why to take it"
    assert (tmp_path / "report.md").read_text(encoding="utf-8").endswith("  # pruned, mean shift\n```\n")


def test_the_page_tells_the_spread_and_the_conditions_of_the_speedup(page: Element) -> None:
    keys = {item.all("dt")[0].text: [cell.text for cell in item.all("dd")] for item in page.all("dl")[0].all("div")}
    assert keys["Speed-up"] == ["1.25x", "quartiles 1.21x to 1.31x; batch 32 on cpu in float32; 1.25x by MACs"]
    assert "batch 32 on cpu in float32" in figure(page, "latency").all("figcaption")[0].text


def test_figures_are_files_too(folder: Path) -> None:
    for name in FIGURES:
        assert (folder / "figures" / f"{name}.svg").read_text(encoding="utf-8").startswith("<?xml")
        with Image.open(folder / "figures" / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(2**24)) > 20


def test_the_page_tells_of_the_budget_and_of_the_plans_that_were_tried(tmp_path: Path) -> None:
    told = "budget target_macs 0.94 G MACs (dense 1.26 G MACs): 0.93 G MACs; met"
    budget = {"sentence": told, "met": True, "budget": {"quantity": "target_macs"}}
    tried = [
        {"name": "equal shares", "divergence": 0.3, "widths": {}},
        {"name": "priced", "divergence": 0.125, "widths": {}},
    ]
    write_run(tmp_path, budget=budget, candidates=tried)
    text = write_report(tmp_path).read_text()
    assert f"Asked for and reached: {told}." in text
    assert "0.1250" in text
    write_run(tmp_path, budget=budget | {"budget": {"quantity": "keep_ratio"}})  # no budget was asked for
    text = write_report(tmp_path).read_text()
    assert "Asked for" not in text
    assert "auto tried" not in text


def test_the_page_says_what_each_refit_did(tmp_path: Path) -> None:
    producers = ProducerRefit(750, {"a": (0.5, 0.25), "b": (0.25, 0.25)})
    stream = StreamRefit((), 500, 250, 0.5, 0.5)
    head = HeadRefit("head", 1000, math.inf, 0.25, 0.25)
    write_run(tmp_path, **RefitReport(producers, stream, head).to_dict())
    page = Page(write_report(tmp_path).read_text(encoding="utf-8")).root
    assert [item.text for item in page.all("li")] == [one.sentence() for one in (producers, stream, head)]
    (section,) = page.all("section", **{"aria-labelledby": "refits"})
    assert [(row[0], *row[2:]) for row in section.rows] == [
        ("layers that make the channels", "0.3750", "0.2500", "-33.3 %"),
        ("residual stream", "0.5000", "0.5000", "+0.0 %"),
        ("last layer", "0.2500", "0.2500", "+0.0 %"),
    ]
    write_run(tmp_path, head={**RefitReport(head=head).to_dict()["head"], "sentence": HOSTILE})
    page = Page(write_report(tmp_path).read_text(encoding="utf-8")).root
    assert [item.text for item in page.all("li")] == [HOSTILE]


def test_names_from_users_are_text(tmp_path: Path) -> None:
    found = [Site((f"a.{i}.{HOSTILE}",), f"b.{i}", 4) for i in range(2)] + [Site((HOSTILE,), "c", 4)]
    folder = tmp_path / "<i>'\""
    config = {"model_name": HOSTILE, "compensation": HOSTILE, HOSTILE: HOSTILE}
    write_run(folder, found=found, config=config, versions={HOSTILE: HOSTILE}, device=HOSTILE, seconds={HOSTILE: 1.0})
    page = Page(write_report(folder).read_text(encoding="utf-8")).root
    check_closed(page)
    assert not page.all("b")
    assert not page.all("i")
    assert page.all("h1")[0].text == HOSTILE
    assert [row[0] for row in figure(page, "kept_channels").rows] == [site.name for site in found]
    drawn = [text.text for text in figure(page, "kept_channels").all("text")]
    assert HOSTILE in drawn
    table = summary_row(read_run(folder).report)
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert "<script" not in table


def test_scripts_that_the_font_lacks_raise_no_warning(tmp_path: Path) -> None:
    write_run(tmp_path, found=[Site(("层一",), "c", 4), Site(("层二",), "d", 4)])
    assert "层一" in write_report(tmp_path).read_text(encoding="utf-8")


def test_large_models_make_no_large_file(tmp_path: Path) -> None:
    write_run(tmp_path, found=sites(60, 3072))
    page = write_report(tmp_path)
    assert page.stat().st_size < 1_000_000
    drawn = {text.text for text in figure(Page(page.read_text()).root, "kept_channels").all("text")}
    assert {str(number) for number in range(60)} <= drawn


def test_the_same_run_gives_the_same_bytes(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    write_report(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_report(tmp_path)
    base = {"top1": 1.0, "top5": 1.0, "macs": 9, "params": 9}
    write_run(tmp_path, base=base, convergence=None, latency=None)
    (tmp_path / "statistics.safetensors").unlink()
    page = Page(write_report(tmp_path).read_text()).root
    assert "latency" not in {item.attributes["id"] for item in page.all("figure")}
    missing = {item.attributes["id"]: item.text for item in page.all("p") if "id" in item.attributes}
    assert missing.keys() == {"latency", "convergence", "reconstruction", "spectrum"}
    assert missing["latency"] == "Latency: it was not measured."
    left = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert left == {"accuracy", "accuracy_macs", "training", "kept_channels"}
    clear_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
    assert not list((tmp_path / "figures").iterdir())


def test_a_folder_that_is_no_run_gets_no_report(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a run must be a folder with"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def screenshot(page: Path, picture: Path, width: int, height: int) -> Image.Image:
    """Show a page in the browser that is installed, and give what it looks like."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    firefox = shutil.which("firefox")
    if chromium:
        command = [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            f"--user-data-dir={picture.parent / 'profile'}", f"--window-size={width},{height}",
            f"--screenshot={picture}", page.as_uri(),
        ]  # fmt: skip
    elif firefox:
        profile = picture.parent / "profile"
        profile.mkdir(exist_ok=True)
        command = [
            firefox, "--headless", "--profile", str(profile), f"--window-size={width},{height}",
            "--screenshot", str(picture), page.as_uri(),
        ]  # fmt: skip
    else:
        pytest.skip("no browser is installed")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert picture.is_file(), done.stderr
    return Image.open(picture).convert("RGB")


@pytest.mark.parametrize("width", [500, 1100])
def test_a_browser_shows_it(folder: Path, tmp_path: Path, width: int) -> None:
    pixels = np.asarray(screenshot(folder / "report.html", tmp_path / "page.png", width, 3600))
    assert pixels.shape == (3600, width, 3)
    background = pixels[0, 0]
    # Nothing is wider than the page: its margins are empty.
    for margin in (pixels[:, :10], pixels[:, -10:]):
        assert (margin == background).all()
    # Bars, curves and panels are there: each colour covers more than letters would.
    for colour in ((0, 0x72, 0xB2), (0xE6, 0x9F, 0), (0, 0x8A, 0x64)):
        assert (pixels == colour).all(-1).sum() > 3000, colour
    # Down the page there is always something to see.
    empty = (pixels == background).all((1, 2))
    longest = max(len(run) for run in "".join("01"[int(row)] for row in empty[:2500]).split("0"))
    assert longest < 150
