# SPDX-License-Identifier: Apache-2.0
"""A hook of mkdocs: pages take sections of the README and other files at the root, which are written once, there.

``[README.md: Options](../README.md#options)`` on a line of its own stands for the section of that heading,
``[README.md](../README.md)`` for what comes before the first. Links are made to lead from the page; those to files that
are no pages stand as plain text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TAKEN = re.compile(r"^\[([\w./]+\.md)(?:: (.+))?\]\(\.\./[\w./#-]+\)$", re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:)([^)#\s]*)(#[^)\s]*)?\)")
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "extending.md", "examples/README.md": "examples.md"}
"""Which page shows most of a file that lies outside `docs`."""


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page's Markdown, with what it takes from elsewhere."""
    here = Path("docs") / page.file.src_uri
    return _with_links(TAKEN.sub(lambda match: _section(match[1], match[2]), markdown), here)


def _section(file: str, heading: str | None) -> str:
    """A section without its heading, its links as from the root. Raises ValueError if the file has no such heading."""
    text = (ROOT / file).read_text()
    parts = re.split(r"^## (.+)$", re.sub(r"^# .+\n", "", text), flags=re.MULTILINE)
    sections = {None: parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}
    if heading not in sections:
        raise ValueError(f"{file} has no section {heading!r}")
    return LINK.sub(lambda match: _moved(match, Path(file).parent), sections[heading].strip())


def _moved(match: re.Match[str], folder: Path) -> str:
    """A link of a file in `folder` as one from the root, marked by a slash."""
    mark, text, target, anchor = match[1], match[2], match[3], match[4] or ""
    return f"{mark}[{text}]({'/' + (folder / target).as_posix() if target else ''}{anchor})"


def _with_links(markdown: str, here: Path) -> str:
    def led(match: re.Match[str]) -> str:
        mark, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        if not target:
            return match[0] if _is_heading(anchor, markdown) else text
        whole = Path(target[1:]) if target.startswith("/") else _resolved(here.parent / target)
        page = PAGES.get(whole.as_posix(), whole.relative_to("docs").as_posix() if whole.parts[0] == "docs" else None)
        if page is None:
            return (
                f"{text} (`{whole.as_posix()}`)" if text.strip("`") not in whole.as_posix() else f"`{whole.as_posix()}`"
            )
        return f"{mark}[{text}]({page}{anchor if whole.as_posix() not in PAGES else ''})"

    return LINK.sub(led, markdown)


def _resolved(path: Path) -> Path:
    """Without `..`."""
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return Path(*parts)


def _is_heading(anchor: str, markdown: str) -> bool:
    headings = re.findall(r"^#+ (.+)$", markdown, re.MULTILINE)
    return anchor[1:] in {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
