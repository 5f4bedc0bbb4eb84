# SPDX-License-Identifier: Apache-2.0
"""Parts of documents, in Markdown, that scripts write: from ``<!-- from SCRIPT -->`` to the next ``<!-- end -->``."""

from __future__ import annotations

from collections.abc import Sequence

END = "<!-- end -->\n"


def put_into(text: str, script: str, part: str) -> str:
    """`text` with `part` where this script writes. Raises ValueError if there is no such place, or more than one."""
    begin = f"<!-- from {script} -->\n"
    before, after = text.split(begin)
    return f"{before}{begin}{part}{END}{after.split(END, 1)[1]}"


def row_of(*cells: str) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def head_of(names: Sequence[str]) -> list[str]:
    """The lines that a table begins with."""
    return [row_of(*names), "|" + "---|" * len(names)]
