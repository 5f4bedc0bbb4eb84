# SPDX-License-Identifier: Apache-2.0
"""Markdown tables of measured figures, for ``docs/performance.md`` and the README: columns say how to show a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.attention.baselines import FA3
from benchmarks.attention.flash_attention_3 import MISSING
from benchmarks.pages.marked import head_of, row_of

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]
NONE = "-"
WITHOUT_FA3 = """\
FlashAttention-3, which is faster than these dense kernels on Hopper GPUs, did not take part in: {}. Where it can be
imported, the benchmarks time it."""


def table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A Markdown table, without the columns that have nothing to say."""
    cells = [[show(row) for row in rows] for _, show in columns]
    kept = [(name, column) for (name, _), column in zip(columns, cells, strict=True) if set(column) != {NONE}]
    lines = head_of([name for name, _ in kept])
    lines += [row_of(*line) for line in zip(*(column for _, column in kept), strict=True)]
    return "\n".join(lines) + "\n"


def cell(key: str, form: str) -> Callable[[Row], str]:
    """Show a row's value in a form like ``"{:.2f}x"``, or a dash where there is none."""
    return lambda row: NONE if row.get(key) is None else form.format(row[key])


def ms(key: str) -> Callable[[Row], str]:
    """Milliseconds with three figures or more."""

    def show(row: Row) -> str:
        value = row.get(key)
        if value is None:
            return NONE
        decimals = 0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 10 else 3
        return f"{value:,.{decimals}f} ms"

    return show


def best_dense(row: Row) -> str:
    name = min(row["dense_ms"], key=row["dense_ms"].__getitem__)
    return f"{ms('best')({'best': row['dense_ms'][name]})} ({name})"


def dense_kernel(row: Row) -> str:
    """A whole forward's time with dense attention, and the kernel that was fastest at its attention."""
    name = next(iter(row["attention_ms"]), None)
    return ms("dense_ms")(row) + (f" ({name})" if name else "")


def baselines(results: dict[str, Row], titles: dict[str, str]) -> str:
    """Whether the fastest dense kernel was among those that were timed."""
    asked = [name for name in results if name not in ("gpu_attention_float32", "gpu_random_blocks")]
    versions = {name: results[name].get("flash_attention_3", MISSING) for name in asked}
    used, without = set(versions.values()) - {MISSING}, [titles[n].lower() for n in asked if versions[n] == MISSING]
    lines = [f"FA3 is FlashAttention-3 ({', '.join(sorted(used))})."] if used else []
    whole = results.get("whole_model", {"rows": []})["rows"] if versions.get("whole_model", MISSING) != MISSING else []
    without += [row["model"] for row in whole if FA3 not in row["attention_ms"] | row["attention_without_mask_ms"]]
    return "\n".join(lines + ([WITHOUT_FA3.format("; ".join(without))] if without else []))


def span(values: Sequence[float]) -> str:
    """'2.05x to 4.02x'."""
    low, high = f"{min(values):.2f}x", f"{max(values):.2f}x"
    return low if low == high else f"{low} to {high}"


SHAPE: Column = ("shape", cell("shape", "{}"))
HEADS: Column = ("heads x dim", lambda row: f"{row['heads']}x{row['head_dim']}")
SPARSITY: Column = ("sparsity", cell("sparsity", "{:g}"))
ASKED: Column = ("sparsity, or preset", lambda row: row.get("preset") or SPARSITY[1](row))
TOKENS: Column = ("tokens", cell("tokens", "{:,}"))
DENSITY: Column = ("density", cell("density", "{:.3f}"))
SPEEDUP: Column = ("speed-up", cell("speedup", "{:.2f}x"))
EFFICIENCY: Column = ("efficiency", cell("efficiency", "{:.2f}"))
UNMASKED: Column = (
    "speed-up if dense had no mask (estimate)",
    cell("speedup_over_dense_without_mask_estimate", "{:.2f}x"),
)
ARM_SHARE: Column = ("ARM / dense", cell("arm_share_of_dense", "{:.2%}"))
