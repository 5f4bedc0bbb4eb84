# SPDX-License-Identifier: Apache-2.0
"""Writes the table in ``docs/scaling.md`` from what ``benchmarks.models.ulysses`` measured.

python -m benchmarks.pages.scaling_page
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.pages.marked import put_into
from benchmarks.pages.performance_tables import DENSITY, SPEEDUP, Column, Row, cell, ms, table

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "scaling.md"
RESULTS = ROOT / "benchmarks" / "results"
FACTS = "{gpu}, torch {torch}, Triton {triton}, FlashAttention-3: {flash_attention_3}, {date} ([raw figures]({file})):"

COLUMNS: list[Column] = [
    ("GPUs", cell("gpus", "{}")),
    ("dense", lambda row: f"{ms('dense_ms')(row)} ({row['dense_kernel']})"),
    *(("sparse", ms("sparse_ms")), DENSITY, SPEEDUP),
    ("of one GPU's speed-up", cell("of_first_speedup", "{:.0%}")),
    ("attention of a rank", lambda row: _span(row, "attention_ms", "{:.1f} ms")),
    ("communication, dense", lambda row: _span(row, "communication_dense", "{:.1%}")),
    ("communication, sparse", lambda row: _span(row, "communication_sparse", "{:.1%}")),
]


def _span(row: Row, key: str, form: str) -> str:
    """Least and most of what the ranks have."""
    values = sorted(rank[key] for rank in row["ranks"])
    return " to ".join(dict.fromkeys(form.format(value) for value in (values[0], values[-1])))


def section(file: Path) -> str:
    """The table of one GPU's file."""
    result = json.loads(file.read_text())
    for row in result["rows"]:
        for rank in row["ranks"]:
            rank["communication_dense"], rank["communication_sparse"] = rank["communication_share"]
        row["density"] = sum(rank["density"] for rank in row["ranks"]) / len(row["ranks"])
    return FACTS.format(file=f"../benchmarks/results/{file.name}", **result) + "\n\n" + table(COLUMNS, result["rows"])


def with_tables(text: str) -> str:
    """The page with a table for each GPU that there are figures of."""
    parts = "\n".join(section(file) for file in sorted(RESULTS.glob("ulysses_*.json")))
    return put_into(text, "benchmarks/pages/scaling_page.py", parts)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
