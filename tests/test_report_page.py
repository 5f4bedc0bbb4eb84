# SPDX-License-Identifier: Apache-2.0
"""Reports as files: a page that needs nothing else, and the same numbers for other programs."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from html import escape, unescape
from html.parser import HTMLParser

import pytest
from test_report import CANDIDATES, CHOICE, ERRORS, PAIRS, RECALL, attention

from rainfusion_compile.report import AttentionReport, GraphReport, Observed, Report

CHROMIUM = shutil.which("chromium")
DENSE = AttentionReport("blocks.1.<attn>", "dense", "needs gradients", "call it under torch.no_grad()")


@pytest.fixture
def report():
    report, graph = Report(), GraphReport([attention(**CANDIDATES), DENSE])
    for _ in range(2):
        report.add(graph, [Observed(CHOICE, ERRORS, RECALL)], (PAIRS, PAIRS))
    return report


class Page(HTMLParser):
    """Tags with their attributes, all closed in order; and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.texts = list[str](), list[tuple[str, dict[str, str | None]]](), list[str]()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_a_page_needs_nothing_else(report, tmp_path):
    report.save(tmp_path / "run.html")
    text = (tmp_path / "run.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert not any({"src", "href"} & attributes.keys() for _, attributes in page.tags)
    assert "://" not in text
    assert "prefers-color-scheme: dark" in text


def test_a_page_shows_heads_calls_and_all_attentions(report, tmp_path):
    report.save(str(tmp_path / "run.html"))
    page = Page((tmp_path / "run.html").read_text(encoding="utf-8"))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("rect") == CHOICE.numel()
    assert tags.count("polyline") == 2  # density and error of the sparse attention
    assert tags.count("tr") == 3 + 1 + 4  # of attentions; of heads
    buttons = sum(tag == "button" for tag in tags)  # by mouse or key
    assert buttons == tags.count("th") > 0
    assert "blocks.1.<attn>" in page.texts
    assert "blocks.0, sample 0, head 1: spatial@0.5, density 0.500, error 0.707" in page.texts
    assert "needs gradients; call it under torch.no_grad()" in page.texts


def test_tables_and_dicts_have_every_call(report, tmp_path):
    report.save(tmp_path / "run.csv")
    with open(tmp_path / "run.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["call"]) for row in rows] == [
        ("blocks.0", "0"), ("blocks.0", "1"), ("blocks.1.<attn>", "0"), ("blocks.1.<attn>", "1")
    ]  # fmt: skip
    assert [float(row["density"]) for row in rows] == pytest.approx([0.575, 0.575, 1.0, 1.0])
    assert rows[0]["grid"] == "2x3x4"
    assert rows[2]["remedy"] == "call it under torch.no_grad()"
    report.save(tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text()) == report.to_dict()


def test_an_empty_report_is_a_page(tmp_path):
    Report().save(tmp_path / "run.html")
    page = Page((tmp_path / "run.html").read_text(encoding="utf-8"))
    assert any("no graph of this backend ran" in text for text in page.texts)


def test_other_endings_are_refused(report, tmp_path):
    with pytest.raises(ValueError, match=r"path must end with .html, .png, .json or .csv; got '.*run.txt'"):
        report.save(tmp_path / "run.txt")


def test_a_picture_has_a_square_for_each_head_and_a_line_for_each_attention(report, tmp_path):
    heads, *lines = report.plot().axes
    (image,) = heads.get_images()
    assert image.get_array().shape == (2, 2, 4)  # samples, heads, colours
    assert [label.get_text() for label in heads.get_yticklabels()] == ["blocks.0", ""]
    assert [list(axes.lines[0].get_ydata()) for axes in lines] == [
        pytest.approx([y, y], abs=1e-3) for y in (0.575, 0.639)
    ]
    report.save(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_heads_and_calls_have_whole_numbers(calls):
    one, report = GraphReport([attention(**CANDIDATES, heads=1)]), Report()
    for _ in range(calls):
        report.add(one, [Observed(CHOICE[:1, :1], ERRORS[:1, :1], RECALL[:1, :1])], (PAIRS,))
    for axes in report.plot().axes:
        ticks = axes.get_xticks()
        assert [*ticks] == [round(tick) for tick in ticks]


def test_there_is_no_picture_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="no attention of this report was sparse"):
        Report().save(tmp_path / "run.png")


def test_a_picture_without_matplotlib_says_what_to_install(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        report.plot()


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")
def test_a_browser_sorts_the_tables_and_shows_all_of_the_page_in_400_pixels(report, tmp_path):
    report.save(tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    probe = """<script>
      const tables = document.querySelectorAll("table"), table = tables[tables.length - 1];
      const names = () => [...table.tBodies[0].rows].map((row) => row.cells[0].innerText);
      const sorted = [names()];
      for (let click = 0; click < 2; click++) { table.querySelector("th button").click(); sorted.push(names()); }
      const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
      document.title = JSON.stringify([sorted, wide]);
    </script>"""
    framed = (
        f'<iframe id="page" width="400" height="900" srcdoc="{escape(page.replace("</body>", probe + "</body>"))}">'
    )
    (tmp_path / "frame.html").write_text(
        f"""<!doctype html>{framed}</iframe><script>
        onload = () => document.title = document.getElementById("page").contentDocument.title;</script>""",
        encoding="utf-8",
    )
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        f"file://{tmp_path}/frame.html",
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    sorted_names, too_wide = json.loads(unescape(shown.split("<title>")[1].split("</title>")[0]))
    first, second = "blocks.0", "blocks.1.<attn>"
    assert sorted_names == [[first, second], [first, second], [second, first]]
    assert not too_wide
