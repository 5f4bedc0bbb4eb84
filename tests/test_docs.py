# SPDX-License-Identifier: Apache-2.0
"""Documents: their links lead somewhere, their Python is Python, and the site's pages take sections that are there."""

from __future__ import annotations

import ast
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))

import absolute_links  # noqa: E402
import readme_sections  # noqa: E402

DOCUMENTS = sorted(path for folder in (".", "docs", "examples", "benchmarks") for path in (ROOT / folder).glob("*.md"))
PAGES = [path for path in DOCUMENTS if path.parent.name == "docs"]


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def headings(path: Path) -> set[str]:
    """Anchors of a document, as those who show Markdown make them."""
    found = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(path):
    for _, _, target, anchor in readme_sections.LINK.findall(path.read_text()):
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor[1:] in headings(file), f"{target}{anchor}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_python_in_documents_is_python(path):
    for code in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
        ast.parse(code)


@pytest.mark.parametrize("path", PAGES, ids=ids)
def test_pages_of_the_site_link_to_pages_alone(path):
    page = SimpleNamespace(file=SimpleNamespace(src_uri=path.name))
    shown = readme_sections.on_page_markdown(path.read_text(), page=page)
    assert not readme_sections.TAKEN.search(shown)
    assert "](../" not in shown
    for _, _, target, _ in readme_sections.LINK.findall(shown):
        assert not target or (ROOT / "docs" / target).exists(), target


def test_the_site_has_all_pages():
    pages = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(pages) == [path.name for path in PAGES]


def test_a_section_that_is_not_there_is_an_error():
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    with pytest.raises(ValueError, match=r"README.md has no section 'Nothing'"):
        readme_sections.on_page_markdown("[README.md: Nothing](../README.md#nothing)", page=page)


def test_a_links_way_is_kept():
    page = SimpleNamespace(file=SimpleNamespace(src_uri="performance.md"))
    text = (
        "[a](../README.md#options) [b](quality.md#x) [c](../Makefile) [d](https://e.f) [Makefile](../Makefile) [g](#no)"
    )
    assert readme_sections.on_page_markdown(text, page=page) == (
        "[a](index.md) [b](quality.md#x) c (`Makefile`) [d](https://e.f) `Makefile` g"
    )


def test_the_page_of_several_gpus_has_the_latest_figures():
    from benchmarks.pages import scaling_page

    text = scaling_page.PAGE.read_text()
    assert scaling_page.with_tables(text) == text


def test_for_a_package_index_all_links_lead_to_the_tag(tmp_path):
    if "[project.urls]" in (ROOT / "pyproject.toml").read_text():
        pytest.skip("what is released is ready")
    tomllib, home, tag = pytest.importorskip("tomllib"), "https://github.com/somebody/something", "v1.2.3"
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    absolute_links.ready(tmp_path, home, tag)
    before, after = (readme_sections.LINK.findall((root / "README.md").read_text()) for root in (ROOT, tmp_path))
    assert [link for link in before if not link[2]] == after, "only headings of the page itself are left"
    leading = re.findall(rf"\]\({home}/(raw|blob)/{tag}/([^)#]+)", (tmp_path / "README.md").read_text())
    assert len(leading) == len(before) - len(after)
    assert all((ROOT / target).is_file() for _, target in leading)
    assert {kind for kind, target in leading if target.endswith((".png", ".gif"))} == {"raw"}
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())
    old = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {**old, "project": {**old["project"], "urls": project["project"]["urls"]}} == project
    assert all(place.startswith(home) for place in project["project"]["urls"].values())
    with pytest.raises(ValueError, match="fresh checkout"):
        absolute_links.ready(tmp_path, home, tag)
