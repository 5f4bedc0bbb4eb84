# SPDX-License-Identifier: Apache-2.0
"""Write the table of reasons and remedies in ``docs/troubleshooting.md``.

python -m benchmarks.pages.reasons_page
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.pages.marked import put_into
from rainfusion_compile.passes.attention_match import DenseReason

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"


def table() -> str:
    """A row for each kind of reason, those that are as they should be last."""
    reasons = sorted(DenseReason, key=lambda reason: reason.expected)
    rows = [f"| {reason.meaning} | {reason.remedy} |" for reason in reasons]
    return "\n".join(["| attention stays dense because | what to do |", "|---|---|", *rows, ""])


def with_table(text: str) -> str:
    """The page with the table as it should be."""
    return put_into(text, "benchmarks/pages/reasons_page.py", table())


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
