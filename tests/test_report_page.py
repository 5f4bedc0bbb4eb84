# SPDX-License-Identifier: Apache-2.0
"""Reports as files: a page that needs nothing else, and the same numbers for other programs."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser

import pytest
from test_report import CANDIDATES, CHOICE, ERRORS, PAIRS, RECALL, attention

from rainfusion_compile.report import AttentionReport, GraphReport, Observed, Report

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
    assert tags.count("tr") == 3
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
    with pytest.raises(ValueError, match=r"path must end with .html, .json or .csv; got '.*run.txt'"):
        report.save(tmp_path / "run.txt")
